"""Times of one cell: autoq's kernels, default and tuned, beside cuBLAS and the rivals, in one window.

Legend: N output features, K input features, M rows of the activation, R rows of the weight that are packed and then
repeated up to N (times do not depend on values).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoq import candidates
from autoq.candidates import LinearOp, Packed
from autoq.numerics import relative_rms
from autoq.profiler.gpu import bandwidth_gb_s
from autoq_kernels import layout
from autoq_kernels.tolerance import TOLERANCE
from gpu_bench import roofline, run_rivals
from gpu_bench.run_checks import DTYPES, Row, first_line
from gpu_bench.run_rivals import CHECKED_ROWS, Engine, Problem

TimeFunction = Callable[..., Mapping[str, Sequence[float]]]
COLUMNS = (
    "n", "k", "m", "dtype", "engine", "scheme", "kernel", "status", "reason", "error", "time_us", "mad_us", "calls",
    "weight_bytes", "gb_s", "bandwidth_share", "over_cublas", "predicted_us", "over_predicted",
)  # fmt: skip
OURS = ("autoq, default", "autoq, tuned")
_PACKED_ROWS = 8192
_TUNE_S = 2.0  # for timing the choices of one product


class Cell(NamedTuple):
    """One product in one setting; all engines of a cell are timed in one window."""

    n: int
    k: int
    m: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.n}x{self.k} M={self.m} {self.dtype}"


def cells(shapes: Sequence[tuple[int, int]], rows: Sequence[int], dtypes: Sequence[str]) -> list[Cell]:
    """All combinations: M = 1 of all shapes first, then the other rows."""
    return [Cell(n, k, m, dtype) for dtype in dtypes for m in rows for n, k in shapes]


class Bench:
    """Times cells on one device.

    Args:
        device: of all tensors.
        name: as its driver gives it.
        schemes: autoq's, as `candidates.parse` reads them.
        tuner: `tuning.Tuner` of the device.
        time: called as `timing.time_interleaved` is.
        bandwidth_gb_s: measured.
        seconds: of a cell's timing; checks, tuning and compilation come on top.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        name: str,
        schemes: Sequence[str],
        tuner: Any,
        time: TimeFunction,
        bandwidth_gb_s: float,
        seconds: float,
    ) -> None:
        self.bandwidth_gb_s = bandwidth_gb_s
        self._device, self._name, self._schemes = device, name, schemes
        self._tuner, self._time, self._seconds = tuner, time, seconds

    @classmethod
    def of(cls, device: torch.device, schemes: Sequence[str], seconds: float) -> Bench:
        """On a GPU, with autoq's own tuned choices: what is tuned here is kept."""
        from autoq_kernels.triton import register
        from autoq_kernels.triton.timing import time_interleaved

        return cls(
            device,
            name=torch.cuda.get_device_name(device),
            schemes=schemes,
            tuner=register.tuner(device),
            time=time_interleaved,
            bandwidth_gb_s=bandwidth_gb_s(device),
            seconds=seconds,
        )

    def rows(self, cell: Cell) -> list[Row]:
        """One row per engine, those that failed or are absent included."""
        torch._dynamo.reset()  # compiled rivals of an earlier cell would count towards the limit of recompilations
        generator = torch.Generator().manual_seed(cell.n)
        rows, times = split(cell.n)
        dtype = DTYPES[cell.dtype]
        problem = Problem(
            x=torch.randn(cell.m, cell.k, generator=generator).to(self._device, dtype),
            part=torch.randn(rows, cell.k, generator=generator).mul_(0.02).to(self._device, dtype),
            times=times,
        )
        found, calls = [], {}
        makers = [*self._ours(problem), *run_rivals.engines(problem)]
        with torch.no_grad():
            for name, scheme, make in makers:
                row, call = _checked(name, scheme, make)
                if call is not None:
                    calls[str(len(found))] = call
                found.append(row)
            self._time_into(found, calls)
        return [complete(row, cell, found, self.bandwidth_gb_s, self._name) for row in found]

    def _time_into(self, rows: Sequence[Row], calls: dict[str, Callable[[], object]]) -> None:
        for key, times in self._time(calls, budget_s=self._seconds, device=self._device).items():
            middle = median(times)
            spread = median(abs(one - middle) for one in times)
            rows[int(key)] |= {"time_us": middle, "mad_us": spread, "calls": len(times)}

    def _ours(self, problem: Problem) -> Iterator[tuple[str, str, Callable[[], Engine]]]:
        """autoq's schemes, each with what runs untuned and with what tuning finds."""
        for scheme in self._schemes:
            if candidates.parse(scheme).key == "none":
                continue  # it is cuBLAS
            shared: dict[str, Any] = {}
            for name in OURS:
                yield (
                    name,
                    scheme,
                    lambda name=name, scheme=scheme, shared=shared: self._our(name, scheme, problem, shared),
                )

    def _our(self, name: str, scheme: str, problem: Problem, shared: dict[str, Any]) -> Engine:
        """One of autoq's products; ``shared`` keeps what default and tuned have in common.

        Raises:
            ValueError: with the reason, if the scheme refuses the product.
        """
        from autoq_kernels.triton import products
        from autoq_kernels.triton.weight import Weights

        candidate, x = candidates.parse(scheme), problem.x
        m = len(x)
        reason = candidate.why_not(LinearOp(m=m, k=problem.k, n=problem.n, dtype=x.dtype, device=str(self._device)))
        if reason is not None:
            raise ValueError(reason)
        if not shared:
            packed = candidate.pack(problem.part)
            shared["weight"] = Weights().of(layout.repeat_rows(packed.data, problem.times)[: layout.HEADER_BYTES])
            shared["expected"] = candidate.at_rows(m).reference(x[:CHECKED_ROWS], packed)
        weight = shared["weight"]
        if name == OURS[0]:
            choice = products.default_choice(weight.form, m, x.dtype)
        else:
            choice = self._tuner.tune(weight, m, x.dtype, budget_s=_TUNE_S)
        return Engine(
            name=name,
            scheme=scheme,
            kernel=choice.label,
            weight_bytes=candidate.weight_bytes(Packed(layout.buffer(weight.head))),
            call=lambda: products.multiply(choice, x, weight, None),
            expected=shared["expected"],
            tolerance=TOLERANCE[x.dtype],
        )


def split(n: int) -> tuple[int, int]:
    """(rows, times) with rows × times = n and few enough rows to pack in no time."""
    times = -(-n // _PACKED_ROWS)
    while n % times:
        times += 1
    return n // times, times


def _checked(name: str, scheme: str, make: Callable[[], Engine]) -> tuple[Row, Callable[[], Tensor] | None]:
    """An engine's row without a time, and what can be timed if its result is right."""
    row: Row = {"engine": name, "scheme": scheme, "status": "error"}
    try:
        engine = make()
        row |= {"kernel": engine.kernel, "weight_bytes": engine.weight_bytes}
        y = engine.call()
        expected = engine.expected
        got = y[: len(expected)].view(len(expected), -1, expected.shape[1])
        row["error"] = relative_rms(got, expected.unsqueeze(1).expand_as(got))
    except NotImplementedError as problem:
        return row | {"status": "absent", "reason": first_line(problem)}, None
    except ValueError as problem:
        return row | {"status": "refused", "reason": first_line(problem)}, None
    except Exception as problem:  # whatever somebody's kernel meets; the others are timed all the same
        return row | {"reason": f"{type(problem).__name__}: {first_line(problem)}"}, None
    if not row["error"] <= engine.tolerance:
        reason = f"relative RMS {row['error']:.2e} above {engine.tolerance:.0e}"
        return row | {"status": "wrong", "reason": reason}, None
    return row | {"status": "ok"}, engine.call


def complete(row: Row, cell: Cell, rows: Sequence[Row], bandwidth: float, device_name: str) -> Row:
    """A row with every column, in order.

    Args:
        row: with or without a time.
        cell: whose row it is.
        rows: all of the cell.
        bandwidth: measured, 10⁹ bytes a second.
        device_name: as the driver gives it.
    """
    full = dict.fromkeys(COLUMNS) | cell._asdict() | row
    time_us = row.get("time_us")
    if time_us is not None:
        moved = row["weight_bytes"] + DTYPES[cell.dtype].itemsize * cell.m * (cell.n + cell.k)
        full["gb_s"] = moved / time_us / 1e3
        full["bandwidth_share"] = full["gb_s"] / bandwidth
        base = next((one.get("time_us") for one in rows if one["engine"] == "cuBLAS"), None)
        full["over_cublas"] = None if base is None else time_us / base
        if row["engine"] in (*OURS, "cuBLAS"):
            shape = (cell.n, cell.k)
            predicted = roofline.predicted_us(device_name, row["scheme"], shape, cell.m, DTYPES[cell.dtype])
            full["predicted_us"] = predicted
            full["over_predicted"] = None if predicted is None else time_us / predicted
    return {name: full[name] for name in COLUMNS}
