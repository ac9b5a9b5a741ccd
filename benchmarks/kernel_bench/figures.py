"""The figures that the CPU kernels are held to, judged on the rows of a run."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kernel_bench.engines import ONEDNN_U8S8
from kernel_bench.roofline import SHORT, Row
from kernel_bench.shapes import LARGE, SMALL

_BANDWIDTH = {"int8wo": 0.85, "int4wo-hqq": 0.85, "sinq": 0.85, "int4dq": 0.85, "fp6": 0.80, "none": 0.80}
_QUANTIZED = ("int8wo", "int4wo-hqq", "sinq", "fp6", "int8dq", "int4dq", "int8mix", "int4mix")
_WEIGHT_ONLY = ("int8wo", "int4wo-hqq", "sinq", "fp6")
_OF_INT8DQ = {128: 1.15, 64: 1.2, 32: 1.35}
_ERRORS = {"bfloat16": 3e-3, "float16": 4e-4, "float32": 1e-5}
_INT4_ATEN = ("aten._weight_int4pack_mm_for_cpu", "int4wo(group_size=64)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure of one scheme: the worst of its cells.

    Attributes:
        line: what is asked.
        scheme: whose figure it is.
        target: the bound.
        at_least: whether the bound is one from below.
        values: cell → measured; empty where nothing was.
    """

    line: str
    scheme: str
    target: float
    at_least: bool
    values: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float] | None:
        """(cell, value) that is farthest from the target; None without values."""
        choose = min if self.at_least else max
        return choose(self.values.items(), key=lambda item: item[1]) if self.values else None

    @property
    def met(self) -> int:
        """Cells within the bound."""
        return sum(v >= self.target if self.at_least else v <= self.target for v in self.values.values())

    @property
    def verdict(self) -> str:
        """``met``, ``MISSED`` or ``not measured``."""
        if not self.values:
            return "not measured"
        return "met" if self.met == len(self.values) else "MISSED"


class _Rows:
    """The timed rows of one number of threads, found by cell and engine."""

    def __init__(self, rows: list[Row], threads: int) -> None:
        self.timed = [row for row in rows if row["status"] == "ok" and row["threads"] == threads]
        self._found = {self._key(row, row["engine"], row["scheme"]): row for row in self.timed}

    @staticmethod
    def _key(cell: Row, engine: str, scheme: str) -> tuple[Any, ...]:
        return (cell["n"], cell["k"], cell["m"], cell["dtype"], engine, scheme)

    def ours(self, keys: tuple[str, ...], shapes: tuple[tuple[int, int], ...], dtype: str = "bfloat16") -> list[Row]:
        """autoq's rows of some schemes and shapes."""
        return [
            row
            for row in self.timed
            if row["engine"] == "autoq"
            and row["scheme"].partition("(")[0] in keys
            and (row["n"], row["k"]) in shapes
            and row["dtype"] == dtype
        ]

    def ratio(self, row: Row, engine: str, scheme: str) -> float | None:
        """The row's time over another engine's in the same cell; None where that has none."""
        other = self._found.get(self._key(row, engine, scheme))
        return row["time_us"] / other["time_us"] if other else None

    def over_aten(self, row: Row) -> float | None:
        """The row's time over ATen's best with as many bits."""
        times = [
            other["time_us"]
            for other in self.timed
            if other["engine"].startswith("aten.")
            and other["bits"] == row["bits"]
            and all(other[name] == row[name] for name in ("n", "k", "m", "dtype"))
        ]
        return row["time_us"] / min(times) if times else None


def judge(data: Mapping[str, Any], threads: int | None = None) -> list[Figure]:
    """Every figure, for every scheme that was measured.

    Args:
        data: a run's JSON.
        threads: whose rows are judged; None takes the largest number there is.
    """
    threads = threads or max((row["threads"] for row in data["rows"]), default=1)
    rows = _Rows(data["rows"], threads)
    return [*_memory(rows), *_roofline(rows), *_large_m(rows), *_int8(rows), *_errors(rows, data["machine"])]


def _figures(
    line: str,
    found: list[Row],
    value: Callable[[Row], float | None],
    target: float | Callable[[str], float],
    *,
    at_least: bool = False,
) -> Iterator[Figure]:
    """One figure per scheme among the rows; one without values where there is no row."""
    schemes: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for row in found:
        measured = value(row)
        if measured is not None:
            schemes[row["scheme"]][f"{row['n']}x{row['k']} M={row['m']}"] = measured
    for scheme, values in (schemes or {"": {}}).items():
        bound = target(scheme) if callable(target) else target
        yield Figure(line=line, scheme=scheme, target=bound, at_least=at_least, values=values)


def _memory(rows: _Rows) -> Iterator[Figure]:
    for key, target in _BANDWIDTH.items():
        found = [row for row in rows.ours((key,), LARGE) if row["m"] == 1]
        line = f"M = 1, large: {key}, share of the read bandwidth"
        yield from _figures(line, found, lambda row: row["gbps"] / row["bandwidth_gb_s"], target, at_least=True)
    found = [row for row in rows.ours(_QUANTIZED, SMALL) if row["m"] == 1]
    yield from _figures("M = 1, small: time over ATen's best for the same bits", found, rows.over_aten, 1.05)


def _roofline(rows: _Rows) -> Iterator[Figure]:
    for dtype, short in SHORT.items():
        found = [row for row in rows.ours(_QUANTIZED, LARGE, dtype) if row["m"] in (2, 4, 8, 16, 32)]
        yield from _figures(f"M = 2 to 32, large, {short}: time over the roofline", found, _over_roofline, 1.5)
    found = [row for row in rows.ours(("int4wo-hqq",), LARGE) if row["m"] == 8 and "64" in row["scheme"]]
    line = "M = 8, large: int4 over"
    yield from _figures(f"{line} ATen's int4 (about)", found, lambda row: rows.ratio(row, *_INT4_ATEN), 0.7)
    yield from _figures(f"{line} bf16 (about)", found, lambda row: rows.ratio(row, "aten.linear", "none"), 1 / 3)


def _over_roofline(row: Row) -> float | None:
    return row["time_us"] / row["roofline_us"] if row["roofline_us"] else None


def _large_m(rows: _Rows) -> Iterator[Figure]:
    for ms, target in (((64,), 1.15), ((512, 2048), 1.10)):
        found = [row for row in rows.ours(_WEIGHT_ONLY, LARGE) if row["m"] in ms]
        line = f"M = {' and '.join(map(str, ms))}, large: weight-only over bf16 oneDNN"
        yield from _figures(line, found, lambda row: rows.ratio(row, "aten.linear", "none"), target)


def _int8(rows: _Rows) -> Iterator[Figure]:
    found = [row for row in rows.ours(("int8dq",), LARGE) if row["m"] >= 64]
    line = "M ≥ 64, large: int8dq over oneDNN's bare u8s8"
    yield from _figures(line, found, lambda row: rows.ratio(row, ONEDNN_U8S8, "int8dq"), 1.15)
    found = [row for row in rows.ours(("int4dq",), LARGE) if row["m"] == 512]
    line = "M = 512, large: int4dq over int8dq"
    yield from _figures(
        line, found, lambda row: rows.ratio(row, "autoq", "int8dq"), lambda scheme: _OF_INT8DQ.get(_group(scheme), 1.35)
    )


def _group(scheme: str) -> int:
    match = re.search(r"group_size=(\d+)", scheme)
    return int(match[1]) if match else 0


def _errors(rows: _Rows, machine: Mapping[str, Any]) -> Iterator[Figure]:
    for dtype, target in _ERRORS.items():
        found = [row for row in rows.timed if row["engine"] == "autoq" and row["dtype"] == dtype]
        line = f"{SHORT[dtype]}: relative RMS against float64"
        yield from _figures(line, found, lambda row: row["error"], target)
    exact = machine.get("int32_exact")
    values = {} if exact is None else {"K=16384, all ±127": float(exact)}
    yield Figure(line="int32 sums are exact", scheme="int8dq", target=1.0, at_least=True, values=values)


def text(data: Mapping[str, Any], threads: int | None = None) -> str:
    """All figures as a table, and what to know when reading it."""
    figures = judge(data, threads)
    lines = [f"{'figure':58} {'scheme':44} {'target':>9} {'worst':>9}  {'verdict':12} cells met, worst cell"]
    for one in figures:
        sign = "≥" if one.at_least else "≤"
        worst = one.worst
        shown = f"{worst[1]:9.3g}" if worst else f"{'':>9}"
        place = f"{one.met}/{len(one.values)}, {worst[0]}" if worst else ""
        lines.append(
            f"{one.line:58} {one.scheme:44} {sign + format(one.target, '.3g'):>9} {shown}  {one.verdict:12} {place}"
        )
    verdicts = [one.verdict for one in figures]
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in ("met", "MISSED", "not measured"))
    return "\n".join([*lines, "", counts, *_notes(data["machine"])])


def _notes(machine: Mapping[str, Any]) -> Iterator[str]:
    for threads, rates in machine.get("rates", {}).items():
        low = [name for name in ("bf16", "fp16") if rates.get(name, 1e9) < rates.get("fp32", 0.0)]
        if low:
            yield (
                f"With {threads} threads oneDNN's {' and '.join(low)} rate is below its fp32 rate: the processor lacks "
                "such arithmetic, a roofline from that rate is no limit, and ratios below 1 are no error."
            )
