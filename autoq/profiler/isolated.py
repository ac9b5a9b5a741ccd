"""Times of one shape under many schemes, on the kernels that a model would run, each checked before it is timed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from autoq.cache import CONDITIONS, STOCK, Fingerprint, ShapeKey
from autoq.cache.fingerprint import last_level_cache_bytes
from autoq.candidates import Candidate, LinearOp, Packed
from autoq.errors import AutoqError
from autoq.numerics import relative_rms
from autoq.profiler.gpu import Gpu
from autoq.profiler.timing import Timing, interleaved
from autoq_kernels import layout
from autoq_kernels.cpu.memory import use_large_pages
from autoq_kernels.tolerance import limit

_log = logging.getLogger(__name__)

_MAX_COPIES = 256
_SECONDS_PER_SHAPE = 1.5
_PREDICTED = ("ratio", *CONDITIONS)  # what a predicted row has of the one that predicts it
_PACKED_ROWS = 2048  # of a taller weight only these are packed, and repeated: times do not depend on values


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Shape:
    """One distinct product: rows, inputs, outputs, activation dtype, with or without bias."""

    m: int
    k: int
    n: int
    dtype: str
    bias: bool

    @property
    def key(self) -> ShapeKey:
        """The columns of the measurements."""
        return self.m, self.k, self.n, self.dtype, self.bias


def would_run(row: Mapping[str, Any], candidate: Candidate, device: str = "cpu") -> bool:
    """Whether what a known row names would run now: a compiler may have come or gone since."""
    where = _device(device)
    stock = candidate.leaves_alone(getattr(torch, row["dtype"]), where.device.type)
    return bool(stock == (row["kernel"] == STOCK) and (stock or where.runs(row["kernel"])))


class _Device(Protocol):
    """What differs between a CPU and a GPU."""

    device: torch.device

    def prepare(self, head: Tensor, m: int, dtype: torch.dtype) -> None:
        """Make ready for products of m rows of x with a packed weight."""

    def kernel_name(self, head: Tensor, m: int, dtype: torch.dtype) -> str:
        """What runs such a product."""

    def runs(self, kernel: str) -> bool:
        """Whether this process has what was measured under a name; nothing, where a product was refused."""

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

    def runs(self, kernel: str) -> bool:
        from autoq_kernels.cpu import build

        isa = build.status().isa
        family = kernel.partition(".")[0]
        return family in ("", isa or "torch") or (family == "aten" and isa is not None)

    def repeatable(self, weight: Tensor, function: Callable[[Tensor], object]) -> Callable[[], object]:
        return _Rotating(weight, function)

    def time(self, runs: Mapping[str, Callable[[], object]], budget_s: float) -> dict[str, Timing]:
        return interleaved(runs, budget_s=budget_s)

    def bandwidth_gb_s(self) -> float:
        return read_bandwidth_gb_s()


def _device(name: str) -> _Device:
    found = torch.device(name)
    return Gpu(found) if found.type == "cuda" else _Cpu()


def measure_shape(
    shape: Shape,
    candidates: Sequence[Candidate],
    *,
    fingerprint: Fingerprint,
    device: str = "cpu",
    ratios: Mapping[tuple[ShapeKey, str], Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """All candidates of one shape in one window, interleaved with the unquantized layer; see ``profile``."""
    window = _window(shape, _device(device))
    found = []
    for candidate in candidates:
        row = _new_row(shape, candidate, fingerprint)
        known = (ratios or {}).get((shape.key, row["scheme"])) if candidate.key != "none" else None
        foreign = None if known is None else known["kernel"]
        if candidate.leaves_alone(window.x.dtype, window.x.device.type):
            row |= {"status": "ok", "kernel": STOCK, "error": 0.0, "weight_bytes": window.weight_bytes}
        else:
            _prepare(row, candidate, window, foreign)
        row |= fingerprint.conditions(row["kernel"])
        if known is not None and row["status"] == "ok" and _is_alike(row["kernel"], known["kernel"]):
            row |= {name: known[name] for name in _PREDICTED} | {"origin": known["device"]}
        found.append(row)
    _time(found, window)
    return found


def _window(shape: Shape, device: _Device) -> _Window:
    """The tensors of one shape, and the unquantized layer to time."""
    generator = torch.Generator().manual_seed(shape.n)
    dtype = getattr(torch, shape.dtype)
    place = {"device": device.device, "dtype": dtype}
    rows, times = _split(shape.n)
    weight = torch.randn(rows, shape.k, generator=generator).mul_(0.02).to(**place)
    x = torch.randn(shape.m, shape.k, generator=generator).to(**place)
    bias = torch.randn(rows, generator=generator).to(**place).repeat(times) if shape.bias else None
    whole = weight.repeat(times, 1)
    runs = {"": device.repeatable(whole, lambda one: torch.nn.functional.linear(x, one, bias))}
    return _Window(device, weight, times, x, bias, runs)


def _split(n: int) -> tuple[int, int]:
    """(rows, times) with rows × times = n: few enough rows to pack in no time."""
    times = -(-n // _PACKED_ROWS)
    while n % times:
        times += 1
    return n // times, times


def _new_row(shape: Shape, candidate: Candidate, fingerprint: Fingerprint) -> dict[str, Any]:
    return {
        **asdict(shape),
        "scheme": str(candidate.scheme),
        "kernel": "",
        "status": "error",
        "reason": "",
        "device": fingerprint.device_key,
        "origin": "",
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

    @property
    def weight_bytes(self) -> int:
        """Of the unquantized weight."""
        return self.weight.nbytes * self.times


def _is_alike(kernel: str, other: str) -> bool:
    """Whether two kernels are of the same kind: PyTorch's own layer, plain PyTorch code, or compiled."""
    kinds = {STOCK: 0, "torch": 1}
    one, two = (kinds.get(name.partition(".")[0], 2) for name in (kernel, other))
    return one == two


def _prepare(row: dict[str, Any], candidate: Candidate, window: _Window, foreign: str | None) -> None:
    """Check one candidate on this shape, and add it to the runs unless what ran elsewhere predicts it.

    Args:
        row: its status is filled in.
        candidate: of the row.
        window: of the shape.
        foreign: kernel of the row that may predict it, if there is one.
    """
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
    if foreign is not None and _is_alike(kernel, foreign):
        return
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
        if row["origin"]:
            row |= {"time_us": row["ratio"] * baseline.median_us, "baseline_us": baseline.median_us}
            continue
        timing = timings.get("" if row["kernel"] == STOCK else row["scheme"])
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
