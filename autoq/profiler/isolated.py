"""Times of single layers: every distinct (M, K, N, dtype) under every scheme, on the kernels a model would run."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from autoq.cache.fingerprint import last_level_cache_bytes
from autoq.candidates import Candidate, LinearOp, Packed
from autoq.errors import AutoqError
from autoq.numerics import relative_rms
from autoq.profiler.gpu import Gpu
from autoq.profiler.timing import Timing, interleaved
from autoq.workload import Workload
from autoq_kernels import layout
from autoq_kernels.cpu.memory import use_large_pages
from autoq_kernels.tolerance import limit

_log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]

_MAX_COPIES = 256
_SECONDS_PER_SHAPE = 1.5
_PACKED_ROWS = 2048  # of a taller weight only these are packed, and repeated: times do not depend on values


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Shape:
    """One distinct product: rows, inputs, outputs, activation dtype, with or without bias."""

    m: int
    k: int
    n: int
    dtype: str
    bias: bool


def shapes_of(workload: Workload) -> list[Shape]:
    """The distinct shapes that the quantizable layers see, smallest first."""
    found = set()
    for layer in workload.quantizable:
        for call in workload.calls_of(layer.name):
            if call.m > 0:
                found.add(Shape(m=call.m, k=layer.k, n=layer.n, dtype=call.dtype, bias=layer.bias))
    return sorted(found)


def profile(
    workload: Workload,
    candidates: Sequence[Candidate],
    *,
    device_key: str,
    device: str = "cpu",
    known: Sequence[Mapping[str, Any]] = (),
    keep: Callable[[Sequence[Mapping[str, Any]]], None] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure what is not known yet.

    Args:
        workload: its shapes are measured.
        candidates: the schemes; the unquantized layer is always measured beside them.
        device_key: written into the rows.
        device: what to measure, ``"cpu"`` or ``"cuda"`` with or without an index; on a GPU every product is tuned
            before it is timed.
        known: rows of the measurements table from the cache.
        keep: called with the rows of each finished shape, so that an interrupted run loses one shape at most.
        progress: called with (text, done, total).

    Returns:
        One row of the measurements table per (shape, scheme) of this workload, old and new.
    """
    threads = torch.get_num_threads()
    have = {_key(row): dict(row) for row in known}
    shapes = shapes_of(workload)
    where = _device(device)
    rows: list[dict[str, Any]] = []
    for done, shape in enumerate(shapes):
        if progress is not None:
            progress(f"M={shape.m} K={shape.k} N={shape.n}", done, len(shapes))
        found = {str(one.scheme): have.get(_wanted(shape, one, threads, device_key)) for one in candidates}
        missing = [one for one in candidates if found[str(one.scheme)] is None]
        new = _measure(shape, missing, device_key, where) if missing else []
        if new and keep is not None:
            keep(new)
        rows += [row for row in found.values() if row is not None] + new
    if progress is not None:
        progress("", len(shapes), len(shapes))
    return rows


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("m", "k", "n", "dtype", "bias", "scheme", "threads", "device"))


def _wanted(shape: Shape, candidate: Candidate, threads: int, device: str) -> tuple[Any, ...]:
    return (shape.m, shape.k, shape.n, shape.dtype, shape.bias, str(candidate.scheme), threads, device)


class _Device(Protocol):
    """What differs between a CPU and a GPU."""

    device: torch.device

    def prepare(self, head: Tensor, m: int, dtype: torch.dtype) -> None:
        """Make ready for products of m rows of x with a packed weight."""

    def kernel_name(self, head: Tensor, m: int, dtype: torch.dtype) -> str:
        """What runs such a product."""

    def repeatable(self, weight: Tensor, function: Callable[[Tensor], object]) -> Callable[[], object]:
        """Calls the function on the weight, or copies of it, so that it is not found in a cache."""

    def time(self, runs: Mapping[str, Callable[[], object]], budget_s: float) -> dict[str, Timing]:
        """Interleaved times."""

    def bandwidth_gb_s(self) -> float:
        """The memory's read bandwidth in 10⁹ bytes a second, measured now."""


class _Cpu:
    device = torch.device("cpu")

    def prepare(self, head: Tensor, m: int, dtype: torch.dtype) -> None:
        pass

    def kernel_name(self, head: Tensor, m: int, dtype: torch.dtype) -> str:
        from autoq_kernels.cpu import build

        return str(build.kernel_name(head, m, dtype))

    def repeatable(self, weight: Tensor, function: Callable[[Tensor], object]) -> Callable[[], object]:
        return _Rotating(weight, function)

    def time(self, runs: Mapping[str, Callable[[], object]], budget_s: float) -> dict[str, Timing]:
        return interleaved(runs, budget_s=budget_s)

    def bandwidth_gb_s(self) -> float:
        return read_bandwidth_gb_s()


def _device(name: str) -> _Device:
    found = torch.device(name)
    return Gpu(found) if found.type == "cuda" else _Cpu()


def _measure(shape: Shape, candidates: Sequence[Candidate], device_key: str, device: _Device) -> list[dict[str, Any]]:
    """All candidates of one shape in one window, interleaved with the unquantized layer."""
    generator = torch.Generator().manual_seed(shape.n)
    dtype = getattr(torch, shape.dtype)
    place = {"device": device.device, "dtype": dtype}
    rows, times = _split(shape.n)
    weight = torch.randn(rows, shape.k, generator=generator).mul_(0.02).to(**place)
    x = torch.randn(shape.m, shape.k, generator=generator).to(**place)
    bias = torch.randn(rows, generator=generator).to(**place).repeat(times) if shape.bias else None
    whole = weight.repeat(times, 1)
    runs = {"": device.repeatable(whole, lambda one: torch.nn.functional.linear(x, one, bias))}
    window = _Window(device, weight, times, x, bias, runs)
    found = []
    for candidate in candidates:
        row = _new_row(shape, candidate, device_key)
        if candidate.leaves_alone(dtype, x.device.type):
            row |= {"status": "ok", "kernel": "stock", "error": 0.0, "weight_bytes": whole.nbytes}
        else:
            _prepare(row, candidate, window)
        found.append(row)
    _time(found, window)
    return found


def _split(n: int) -> tuple[int, int]:
    """(rows, times) with rows × times = n: few enough rows to pack in no time."""
    times = -(-n // _PACKED_ROWS)
    while n % times:
        times += 1
    return n // times, times


def _new_row(shape: Shape, candidate: Candidate, device_key: str) -> dict[str, Any]:
    return {
        "m": shape.m,
        "k": shape.k,
        "n": shape.n,
        "dtype": shape.dtype,
        "bias": shape.bias,
        "scheme": str(candidate.scheme),
        "kernel": "",
        "status": "error",
        "reason": "",
        "threads": torch.get_num_threads(),
        "device": device_key,
    }


class _Rotating:
    """Calls a function on one copy of a weight after the other, so that none is found in the cache."""

    def __init__(self, weight: Tensor, function: Callable[[Tensor], object]) -> None:
        copies = min(_MAX_COPIES, -(-3 * last_level_cache_bytes() // (2 * max(1, weight.nbytes))))
        self._weights = [weight] + [weight.clone() for _ in range(copies - 1)]
        self._function = function
        self._next = 0

    def __call__(self) -> None:
        self._next = (self._next + 1) % len(self._weights)
        self._function(self._weights[self._next])


class _Window(NamedTuple):
    """What is measured together, on one shape."""

    device: _Device
    weight: Tensor  # 1/times of the shape's rows
    times: int
    x: Tensor
    bias: Tensor | None  # of all rows
    runs: dict[str, Callable[[], object]]  # by scheme; the stock layer's is ""


def _prepare(row: dict[str, Any], candidate: Candidate, window: _Window) -> None:
    """Check one candidate on this shape; if it may be timed, add it to the runs. Fills the row's status."""
    device, weight, times, x, bias, runs = window
    m, n, k = x.shape[0], weight.shape[0] * times, weight.shape[1]
    op = LinearOp(m=m, k=k, n=n, dtype=x.dtype, device=x.device.type, bias=bias is not None)
    reason = candidate.why_not(op)
    if reason is not None:
        row |= {"status": "unsupported", "reason": reason}
        return
    try:
        part = candidate.pack(weight)
        whole = Packed(layout.repeat_rows(part.data, times)) if times > 1 else part
        device.prepare(whole.head, m, x.dtype)
        error = _error(candidate, x, (part, whole), bias)
        kernel = device.kernel_name(whole.head, m, x.dtype)
    except AutoqError as problem:
        row |= {"status": "unsupported", "reason": str(problem)}
        return
    except Exception as problem:  # the one place where any failure becomes a row
        _log.warning("%s failed on %s: %s", row["scheme"], op, problem)
        row |= {"status": "error", "reason": f"{type(problem).__name__}: {problem}"}
        return
    row |= {"kernel": kernel, "error": error, "weight_bytes": candidate.weight_bytes_for(n, k)}
    allowed = limit(x.dtype, x.device)
    if not error <= allowed:
        row |= {"status": "wrong", "reason": f"relative RMS {error:.2e} above {allowed:.0e}"}
        return
    row["status"] = "ok"
    multiply = torch.ops.autoq.linear
    runs[row["scheme"]] = device.repeatable(whole.data, lambda one: multiply(x, one[: layout.HEADER_BYTES], bias, n))


def _error(candidate: Candidate, x: Tensor, packed: tuple[Packed, Packed], bias: Tensor | None) -> float:
    """The worst relative RMS of the product, over the repeats of the first weight that the second consists of."""
    part, whole = packed
    rows = part.shape[0]
    expected = candidate.reference(x, part, None if bias is None else bias[:rows])
    actual = candidate.linear(x, whole, bias)
    errors = [relative_rms(one, expected) for one in torch.split(actual, rows, dim=1)]
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _time(rows: list[dict[str, Any]], window: _Window) -> None:
    bandwidth = window.device.bandwidth_gb_s()
    timings = window.device.time(window.runs, _SECONDS_PER_SHAPE)
    baseline = timings[""]
    for row in rows:
        timing = timings.get("" if row["kernel"] == "stock" else row["scheme"])
        if row["status"] != "ok" or timing is None:
            continue
        row |= {
            "time_us": timing.median_us,
            "time_low_us": timing.low_us,
            "time_high_us": timing.high_us,
            "baseline_us": baseline.median_us,
            "ratio": timing.median_us / baseline.median_us,
            "bandwidth_gb_s": bandwidth,
            "repeats": timing.repeats,
        }


def read_bandwidth_gb_s(size_bytes: int = 128 << 20, rounds: int = 3) -> float:
    """Bytes summed per second by all the CPU's threads, in 10⁹: the ceiling of any product with few rows.

    Args:
        size_bytes: of the array read; several times the last-level cache.
        rounds: the best of these is taken.
    """
    data = torch.ones(size_bytes // 8, dtype=torch.int64)
    use_large_pages(data)
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - begin)
    return data.nbytes / best / 1e9
