"""Interleaved wall-clock timing: every round calls each function once, so drift hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

from autoq.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Quantiles of repeated measurements, in microseconds.

    Attributes:
        median_us: the figure to quote.
        low_us: 10 % quantile.
        high_us: 90 % quantile.
        repeats: measurements taken.
    """

    median_us: float
    low_us: float
    high_us: float
    repeats: int

    @classmethod
    def of(cls, times_us: list[float]) -> Timing:
        """From single measurements.

        Raises:
            InputError: if there is none.
        """
        if not times_us:
            raise InputError("a timing has at least one measurement")
        if len(times_us) == 1:
            return cls(median_us=times_us[0], low_us=times_us[0], high_us=times_us[0], repeats=1)
        cuts = quantiles(times_us, n=10, method="inclusive")
        return cls(median_us=median(times_us), low_us=cuts[0], high_us=cuts[-1], repeats=len(times_us))


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    min_rounds: int = 5,
    max_rounds: int = 60,
    prepare: Callable[[str], None] | None = None,
    synchronize: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time functions in turn, A B C A B C …, after one untimed round.

    Args:
        functions: name → what to time.
        budget_s: rounds go on until this much wall-clock time has passed.
        min_rounds: rounds taken whatever the budget.
        max_rounds: never more than these.
        prepare: called with the name before each timed call, untimed.
        synchronize: waits for the device; called before and after each timed call.

    Returns:
        Name → its timing.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    for round_number in range(max_rounds + 1):
        for name, function in functions.items():
            if prepare is not None:
                prepare(name)
            if synchronize is not None:
                synchronize()
            begin = time.perf_counter_ns()
            function()
            if synchronize is not None:
                synchronize()
            if round_number > 0:
                times[name].append((time.perf_counter_ns() - begin) / 1000)
        if round_number >= min_rounds and time.perf_counter() - started > budget_s:
            break
    return {name: Timing.of(values) for name, values in times.items()}
