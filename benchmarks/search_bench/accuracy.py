"""How well losses and latencies are predicted, on random mixed plans that nothing was fitted to."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from autoq.profiler.end_to_end import UNQUANTIZED
from autoq.scheme import NONE, Scheme
from autoq.search import Assignment, Problem
from search_bench.frozen import Frozen, Prepared
from search_bench.store import Measurer

_SMALL = 0.10  # plans that lose no more are ranked by themselves as well


def random_plans(frozen: Frozen, count: int, seed: int) -> list[Assignment]:
    """Mixed plans: the share of quantized layers is drawn uniformly, then the layers, then their schemes."""
    drawn = random.Random(seed)
    plans = []
    for _ in range(count):
        plan = list(frozen.none)
        units = frozen.problem.units
        for index in drawn.sample(range(len(units)), round(drawn.random() * len(units))):
            choices = [i for i, option in enumerate(units[index].options) if option.scheme != str(NONE)]
            plan[index] = drawn.choice(choices)
        plans.append(tuple(plan))
    return plans


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; NaN of fewer than three."""
    if len(a) < 3:
        return float("nan")
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    array = np.asarray(values, dtype=np.float64)
    return np.array([((array < one).sum() + (array <= one).sum() - 1) / 2 for one in array])


def losses(
    frozen: Frozen, models: Mapping[str, Problem], measuring: Measurer, rows: int, *, count: int, seed: int, say: Any
) -> dict[str, Any]:
    """Correlation of predicted and measured losses, for each of several models of the loss.

    Args:
        frozen: the problem whose plans are drawn.
        models: name → the problem with that model's losses.
        measuring: measures the plans.
        rows: of 512 tokens.
        count: plans.
        seed: of the drawing.
        say: called with a line now and then.
    """
    plans = random_plans(frozen, count, seed)
    measured = []
    for done, plan in enumerate(plans):
        measured.append(float(np.mean(measuring.changes(frozen.problem.schemes(plan), rows))))
        say(f"random plan {done + 1} of {count}: {measured[-1]:+.4f}")
    small = [index for index, loss in enumerate(measured) if loss <= _SMALL]
    found: dict[str, Any] = {"measured": measured, "plans": count, "small_plans": len(small), "models": {}}
    for name, problem in models.items():
        predicted = [problem.loss(plan) for plan in plans]
        ratios = [p / m for p, m in zip(predicted, measured, strict=True) if m > 0]
        found["models"][name] = {
            "predicted": predicted,
            "spearman": spearman(predicted, measured),
            "spearman_small": spearman([predicted[i] for i in small], [measured[i] for i in small]),
            "ratio_median": statistics.median(ratios) if ratios else float("nan"),
        }
    return found


def latencies(prepared: Prepared, frozen: Frozen, *, count: int, seed: int) -> dict[str, Any]:
    """Error of the modelled latency, as the ratio to ``none`` timed in the same window, in every phase.

    Args:
        prepared: this machine's measurements.
        frozen: its problem, at this machine's times.
        count: random mixed plans.
        seed: of the drawing.
    """
    plans = {str(number): frozen.problem.schemes(one) for number, one in enumerate(random_plans(frozen, count, seed))}
    none = frozen.problem.schemes(frozen.none)
    tuning = prepared.tuning
    stock = tuning.none_is_stock
    timed = {label: _parsed(plan) for label, plan in plans.items()} | ({} if stock else {"none": _parsed(none)})
    times = tuning.timer.time(timed, "latency")
    reference = times[UNQUANTIZED if stock else "none"]
    rows = []
    for label, plan in plans.items():
        for phase in frozen.calls:
            predicted = frozen.phase_us(plan, phase) / frozen.phase_us(none, phase)
            measured = times[label][phase].median_us / reference[phase].median_us
            rows.append({"plan": label, "phase": phase, "predicted": predicted, "measured": measured})
    errors = {
        phase: [abs(row["predicted"] / row["measured"] - 1.0) for row in rows if row["phase"] == phase]
        for phase in frozen.calls
    }
    return {
        "rows": rows,
        "median": statistics.median(error for found in errors.values() for error in found),
        "median_by_phase": {phase: statistics.median(found) for phase, found in errors.items()},
        "largest_by_phase": {phase: max(found) for phase, found in errors.items()},
    }


def _parsed(plan: Mapping[str, str]) -> dict[str, Scheme]:
    return {layer: Scheme.parse(scheme) for layer, scheme in plan.items()}
