"""Every kernel against its scheme's reference in float64, on shapes that fit the blocks and on shapes that do not.

Legend: N output features, K input features, M rows of the activation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from autoq import candidates
from autoq.candidates import LinearOp, Packed
from autoq.numerics import relative_rms
from autoq.quant_linear import QuantLinear
from autoq_kernels import layout
from autoq_kernels.tolerance import TOLERANCE

Row = dict[str, Any]
ROWS = (1, 2, 3, 4, 8, 16, 17, 64, 512)
SHAPES = ((512, 1024), (257, 331), (130, 1056), (4096, 4096))
SMALL_ROWS = (1, 3, 17, 64)
SMALL_SHAPES = ((48, 128), (33, 99))
BASE = (*candidates.DEFAULT, candidates.parse("int4dq(group_size=64,method=hqq)"))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BOTH_BIASES = (1, 16)  # the rows that are checked with and without a bias; the others with one


@dataclass(frozen=True, kw_only=True)
class Case:
    """One product.

    Attributes:
        scheme: as `candidates.parse` reads it.
        n: outputs.
        k: inputs.
        m: rows.
        dtype: short name.
        bias: whether there is one.
    """

    scheme: str
    n: int
    k: int
    m: int
    dtype: str
    bias: bool

    def __str__(self) -> str:
        return f"{self.scheme} {self.n}x{self.k} M={self.m} {self.dtype}{' bias' if self.bias else ''}"


class DeviceLostError(RuntimeError):
    """A kernel did something after which the process cannot use the GPU any more."""


def cases(
    schemes: Sequence[str], shapes: Sequence[tuple[int, int]], rows: Sequence[int], dtypes: Sequence[str]
) -> list[Case]:
    """All combinations; those of one weight lie together, and what most depends on comes first."""
    return [
        Case(scheme=scheme, n=n, k=k, m=m, dtype=dtype, bias=bias)
        for dtype in dtypes
        for n, k in shapes
        for scheme in schemes
        for m in rows
        for bias in ((False, True) if m in BOTH_BIASES else (True,))
    ]


class Checker:
    """Runs cases; keeps the last weight.

    Args:
        device: of all tensors; "cpu" is for Triton's interpreter.
        everything: check all configurations of the tuning space, not each method's first.
    """

    def __init__(self, device: torch.device, *, everything: bool) -> None:
        self._device, self._everything = device, everything
        self._known: tuple[tuple[str, int, int, str], Packed] | None = None

    def rows(self, case: Case) -> Iterator[Row]:
        """One row per kernel that could run the case.

        Raises:
            DeviceLostError: as it says; the rows until then were yielded.
        """
        from autoq_kernels.triton import products
        from autoq_kernels.triton.weight import Weights

        candidate = candidates.parse(case.scheme)
        dtype = DTYPES[case.dtype]
        reason = candidate.why_not(
            LinearOp(m=case.m, k=case.k, n=case.n, dtype=dtype, device=str(self._device), bias=case.bias)
        )
        if reason is not None:
            yield _row(case, "", "refused", reason)
            return
        packed = self._packed(case)
        x = torch.randn(case.m, case.k, generator=torch.Generator().manual_seed(case.m)).to(self._device, dtype)
        bias = torch.randn(case.n, generator=torch.Generator().manual_seed(case.n)).to(self._device, dtype)
        bias = bias if case.bias else None
        expected = candidate.at_rows(case.m).reference(x, packed, bias)
        weight = Weights().of(packed.head)
        has_column_scale = weight.form.column_scale_offset != 0
        seen = set()
        for choice in products.choices(weight.form, case.m, dtype, has_column_scale=has_column_scale):
            if choice.method in seen or (self._device.type == "cpu" and not choice.method.startswith("triton.")):
                continue
            if not self._everything:
                seen.add(choice.method)
            yield self._checked(case, choice.label, lambda: products.multiply(choice, x, weight, bias), expected)  # noqa: B023

    def _packed(self, case: Case) -> Packed:
        key = (case.scheme, case.n, case.k, case.dtype)
        if self._known is None or self._known[0] != key:
            w = torch.randn(case.n, case.k, generator=torch.Generator().manual_seed(case.k)).mul_(0.02)
            self._known = key, candidates.parse(case.scheme).pack(w.to(self._device, DTYPES[case.dtype]))
        return self._known[1]

    def _checked(self, case: Case, label: str, call: Callable[[], Tensor], expected: Tensor) -> Row:
        """One kernel's row: right, and on a GPU the same bits the second time."""
        limit = TOLERANCE[DTYPES[case.dtype]]
        try:
            y = call()
            error = relative_rms(y, expected)
            steady = self._device.type == "cpu" or torch.equal(y, call())
        except Exception as problem:  # whatever compiling or running it meets; the next kernel is tried
            self._alive(case, label, problem)
            return _row(case, label, "error", f"{type(problem).__name__}: {first_line(problem)}")
        row = _row(case, label, "ok", "") | {"error": error}
        if not error <= limit:
            return row | {"status": "wrong", "reason": f"relative RMS {error:.2e} above {limit:.0e}"}
        if not steady:
            return row | {"status": "wrong", "reason": "a second call gives other bits"}
        return row

    def _alive(self, case: Case, label: str, problem: Exception) -> None:
        if self._device.type == "cpu":
            return
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError as lost:
            raise DeviceLostError(f"{case}, {label}: {type(problem).__name__}: {first_line(problem)}") from lost


def operator(scheme: str, shape: tuple[int, int], m: int, dtype: str, device: torch.device) -> Row:
    """The row of a quantized layer: called, compiled, and compiled with CUDA graphs, all the same bits."""
    from autoq_kernels.triton import register

    n, k = shape
    case = Case(scheme=scheme, n=n, k=k, m=m, dtype=dtype, bias=False)
    candidate = candidates.parse(scheme)
    torch._dynamo.reset()  # layers of earlier rows would count towards the limit of recompilations
    register.load()
    label, same = "autoq::linear", True
    try:
        w = torch.randn(n, k, generator=torch.Generator().manual_seed(k)).mul_(0.02).to(device, DTYPES[dtype])
        packed = candidate.pack(w)
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(device, DTYPES[dtype])
        layer = QuantLinear(candidate, packed, None, k, n, dtype=x.dtype)
        with torch.no_grad():
            label = f"autoq::linear ({register.kernel_name(layer.head, m, x.dtype)})"
            y = layer(x)
            for mode in ("default", "reduce-overhead"):
                compiled = torch.compile(layer, mode=mode, fullgraph=True, dynamic=False)
                for _ in range(3):  # of CUDA graphs the second call records one, the third replays it
                    same = same and torch.equal(compiled(x).clone(), y)
        error = relative_rms(y, candidate.at_rows(m).reference(x, packed))
    except Exception as problem:  # as above
        return _row(case, label, "error", f"{type(problem).__name__}: {first_line(problem)}")
    row = _row(case, label, "ok", "") | {"error": error}
    limit = TOLERANCE[DTYPES[dtype]]
    if not error <= limit:
        return row | {"status": "wrong", "reason": f"relative RMS {error:.2e} above {limit:.0e}"}
    return row if same else row | {"status": "wrong", "reason": "compiled it gives other bits"}


def _row(case: Case, label: str, status: str, reason: str) -> Row:
    return asdict(case) | {"kernel": label, "status": status, "error": None, "reason": reason}


def first_line(problem: Exception) -> str:
    """What a table has room for of an error."""
    return next((line for line in str(problem).splitlines() if line.strip()), "")


def forms(schemes: Sequence[str], shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[layout.Header, bool]]:
    """Headers of quantized weights without values, and whether they have column scales: to ask what could run."""
    for scheme in schemes:
        small = layout.header(candidates.parse(scheme).pack(torch.randn(32, 128)).data)
        if small.kind is layout.Kind.DENSE:
            continue
        for n, k in shapes:
            groups = -(-k // small.group_size) if small.group_size else 0
            yield small._replace(n=n, k=k, groups=groups), small.column_scale_offset != 0
