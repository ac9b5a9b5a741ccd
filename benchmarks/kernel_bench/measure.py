"""The rows of one cell: all engines checked, then timed in one window, round by round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Protocol

import torch

from autoq.candidates import Candidate
from kernel_bench.engines import Engine, Rotating, Weights, checked, ours, torch_rivals
from kernel_bench.machine import Read
from kernel_bench.rivals import Rivals
from kernel_bench.roofline import Row, rate_name
from kernel_bench.shapes import Cell, names

COLUMNS = (
    "scheme", "engine", "kernel", "m", "k", "n", "dtype", "threads", "time_us", "mad_us", "roofline_us", "gbps",
    "status", "reason", "layers", "bits", "rate", "weight_bytes", "bandwidth_gb_s", "error", "rounds", "burst",
)  # fmt: skip
_READ = "read"
_BURST_US = 300.0  # a round calls a fast engine this long, so that neither clock nor wake-up is what is timed
_MIN_ROUNDS, _MAX_ROUNDS = 5, 50


class Runner(Protocol):
    """Something that can be called and timed.

    Attributes:
        max_burst: calls in a row at most.
        first_us: what its first call took, if that is known.
    """

    max_burst: int
    first_us: float

    def time(self, calls: int) -> float:
        """Microseconds per call."""


class Measurer:
    """Measures cells; keeps the packed weights of the last shape and the read kernel per number of threads.

    Args:
        candidates: the schemes.
        rivals: the side environment, or what stands for it.
        seconds: a cell's time, after the checks, unless five rounds take longer.
    """

    def __init__(self, candidates: Sequence[Candidate], rivals: Rivals, seconds: float) -> None:
        self._candidates, self._rivals, self._seconds = candidates, rivals, seconds
        self._weights: Weights | None = None
        self._reads: dict[int, Read] = {}

    def read(self, threads: int) -> Read:
        """The read kernel for that many threads, which are set."""
        torch.set_num_threads(threads)
        if threads not in self._reads:
            self._reads[threads] = Read()
        return self._reads[threads]

    def rows(self, cell: Cell, candidates: Sequence[Candidate]) -> list[Row]:
        """One row per engine, those that failed or are absent included."""
        runners: dict[int, Runner] = {-1: self.read(cell.threads)}
        dtype = getattr(torch, cell.dtype)
        weights = self._weights_of(cell, dtype)
        x = torch.randn(cell.m, cell.k, generator=torch.Generator().manual_seed(cell.m)).to(dtype)
        found: list[tuple[Row, Runner | None]] = []
        with torch.no_grad():
            for one in candidates:
                found.append(_checked("autoq", str(one), lambda one=one: ours(one, weights, x), weights, cell.m))
            for name, scheme, make in torch_rivals(weights, x):
                found.append(_checked(name, scheme, make, weights, cell.m))
            found += self._rivals.prepare(cell)
            runners |= {number: runner for number, (_, runner) in enumerate(found) if runner is not None}
            times, bursts = rounds(runners, budget_s=self._seconds)
        bandwidth = Read.gb_s(median(times[-1]))
        for number, (row, _) in enumerate(found):
            if number in times:
                _fill(row, times[number], bursts[number], bandwidth)
        return [_complete(row, cell) for row, _ in found]

    def _weights_of(self, cell: Cell, dtype: torch.dtype) -> Weights:
        known = self._weights
        if known is None or (known.n, known.k, known.dtype) != (cell.n, cell.k, dtype):
            self._weights = known = None  # two shapes need not fit in memory
            self._weights = Weights(cell.n, cell.k, dtype)
        return self._weights


def _checked(
    name: str, scheme: str, make: Callable[[], Engine], weights: Weights, m: int
) -> tuple[Row, Rotating | None]:
    try:
        return checked(make(), weights, m)
    except (RuntimeError, ValueError, NotImplementedError) as problem:  # refusals of operators and candidates
        reason = str(problem).partition("\n")[0]
        return {"scheme": scheme, "engine": name, "status": "unsupported", "reason": reason}, None


def rounds(runners: Mapping[int, Runner], *, budget_s: float) -> tuple[dict[int, list[float]], dict[int, int]]:
    """Time all runners in turn, A B C A B C …, after untimed calls.

    Args:
        runners: key → what to time.
        budget_s: rounds go on until this much time has passed; at least 5, at most 50 are made. What takes longer
            than half of it for one call is in three rounds, what takes longer than all of it is called once.

    Returns:
        Key → microseconds per call, one per round; and key → calls in a row that a round made.
    """
    times: dict[int, list[float]] = {key: [] for key in runners}
    bursts, shares = {}, {}
    for key, runner in runners.items():
        first = runner.first_us if runner.first_us > 1e6 * budget_s else runner.time(1)
        if first < 10 * _BURST_US:
            first = runner.time(min(2, runner.max_burst))
        bursts[key] = min(runner.max_burst, max(1, math.ceil(_BURST_US / first)))
        shares[key] = 3 if first > 5e5 * budget_s else _MAX_ROUNDS
        if first > 1e6 * budget_s:
            times[key], shares[key] = [first], 0
    started = time.perf_counter()
    for number in range(1, _MAX_ROUNDS + 1):
        for key, runner in runners.items():
            if number <= shares[key]:
                times[key].append(runner.time(bursts[key]))
        if number >= _MIN_ROUNDS and time.perf_counter() - started > budget_s:
            break
    return times, bursts


def _fill(row: Row, times_us: list[float], burst: int, bandwidth_gb_s: float) -> None:
    middle = median(times_us)
    row |= {
        "time_us": middle,
        "mad_us": median(abs(one - middle) for one in times_us),
        "rounds": len(times_us),
        "burst": burst,
        "gbps": row["weight_bytes"] / middle / 1e3,
        "bandwidth_gb_s": bandwidth_gb_s,
    }


def _complete(row: Row, cell: Cell) -> Row:
    """The row with every column, in order."""
    full = dict.fromkeys(COLUMNS) | cell._asdict() | {"layers": names(cell.n, cell.k)} | row
    full["rate"] = row.get("rate") or rate_name(cell.dtype, int8=False)
    return {name: full[name] for name in COLUMNS}
