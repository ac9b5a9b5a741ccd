"""What a compiled kernel must keep to. A row is what `proof_inspect.inspected` gave, with its case's columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_bench.proof_targets import ARCHITECTURES

Row = Mapping[str, Any]
PRODUCTS = ("gemv", "gemm")
_WIDE = 16  # bytes: the most that one load takes


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownFailure:
    """A check that is known to fail, with the reason.

    Attributes:
        check: its name.
        architecture: where.
        triton: versions that begin so; "" is all.
        kernel: the function.
        where: columns of the row that must be equal.
        reason: why nothing can be done about it here.
    """

    check: str
    architecture: str
    triton: str
    kernel: str
    where: Mapping[str, Any]
    reason: str

    def covers(self, check: str, row: Row) -> bool:
        """Whether this is that failure."""
        return (
            (self.check, self.architecture, self.kernel) == (check, row["architecture"], row["kernel"])
            and row["triton"].startswith(self.triton)
            and all(row.get(name) == value for name, value in self.where.items())
        )


EXCEPTIONS = (
    KnownFailure(
        check="matrix",
        architecture="sm_100",
        triton="3.7",
        kernel="gemm_tile",
        where={"dynamic": True},
        reason="this Triton has no tcgen05.mma for int8; 3.9 has",
    ),
    KnownFailure(
        check="width",
        architecture="sm_90",
        triton="",
        kernel="gemm_tile",
        where={"dynamic": False},
        reason="for the left operand of a wgmma out of registers, Triton's shared memory holds 8 elements in a row, "
        "whatever their size, and cp.async takes no more",
    ),
)


def failures(row: Row) -> list[tuple[str, str]]:
    """The checks that a row fails: (name of the check, what was found)."""
    if "error" in row:
        return [("compiles", row["error"])]
    checks = (_spills, _shared_memory, _matrix, _width)
    return [(check.__name__.removeprefix("_"), found) for check in checks if (found := check(row))]


def judged(
    rows: Sequence[Row], exceptions: Sequence[KnownFailure] = EXCEPTIONS
) -> tuple[list[tuple[Row, str, str]], list[tuple[Row, str, str]]]:
    """(failures, known exceptions), each a row, the check's name and what was found (of an exception: the reason)."""
    failed, known = [], []
    for row in rows:
        for check, found in failures(row):
            excuse = next((one for one in exceptions if one.covers(check, row)), None)
            if excuse:
                known.append((row, check, f"{found}: {excuse.reason}"))
            else:
                failed.append((row, check, found))
    return failed, known


def _spills(row: Row) -> str | None:
    """A default configuration keeps its registers. AMD's scalar registers may move to vector registers, not memory."""
    if row["default"] and (row["spilled"] or row["stack_bytes"]):
        return f"{row['spilled']} spilled, {row['stack_bytes']} bytes of stack"
    return None


def _shared_memory(row: Row) -> str | None:
    limit = ARCHITECTURES[row["architecture"]].shared_bytes
    if row["shared_bytes"] > limit:
        return f"{row['shared_bytes']} bytes of shared memory, the limit is {limit}"
    return None


def _matrix(row: Row) -> str | None:
    """A gemm has its architecture's own matrix instruction and no other; nothing else has any."""
    own = ARCHITECTURES[row["architecture"]].matrix
    if row["main"] and row["family"] == "gemm":
        return None if set(row["matrix"]) == {own} else f"{row['matrix'] or 'no matrix instruction'} instead of {own}"
    return f"{row['matrix']} where none is wanted" if row["matrix"] else None


def _width(row: Row) -> str | None:
    """A default configuration takes planes of 4 and 8 bits 16 bytes at a time where K is a multiple of 128."""
    return narrow_loads(row) if row["default"] else None


def narrow_loads(row: Row) -> str | None:
    """What is wrong with the widths of a product's loads of the weight, if anything."""
    if not row["main"] or row["family"] not in PRODUCTS or row["k"] % 128:
        return None
    loads = {int(size): count for size, count in row["weight_loads"].items()}
    if not loads:
        return "no load of the weight found"
    narrow = {size: count for size, count in loads.items() if size < _WIDE}
    share = 1 - sum(size * count for size, count in narrow.items()) / sum(size * count for size, count in loads.items())
    wide_bits = row["bits"] & 12  # of a code, those in a plane of 4 or 8 bits: 4 of 5 and 6, none of 3
    if share < wide_bits / row["bits"] - 1e-9:
        return f"loads of {narrow} bytes; {share:.0%} of the weight comes 16 bytes at a time"
    return None
