"""Multiple-choice knapsack: one scheme per unit, additive time, loss and bytes.

Array suffixes: U units, S options of a unit (short units padded), M constraints.

The trade-off's supported points come from merging the units' convex hulls by slope; a constrained optimum comes
from the Lagrangian dual and a dynamic programme over what it leaves open (``autoq.knapsack_core``). The gap it
reports is proven, not hoped for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from autoq.errors import SearchError
from autoq.knapsack_core import Core, Floats, pick
from autoq.knapsack_problem import Assignment, Metric, Option, Point, Problem, Solution, Unit

__all__ = ["Assignment", "Metric", "Option", "Point", "Problem", "Solution", "Unit", "frontier", "solve"]

# Pruning slack per number of constraints: well inside the promised 0.1 % (one) and 1 % (two).
_TOLERANCE = (0.0, 1e-4, 2e-3)
# Partial assignments kept per unit: a quick pass finds a good incumbent, the others close the gap.
_STATES = (500, 4_000, 32_000)
_UNITS_OF = {"time": "us", "loss": "", "bytes": "bytes"}


def frontier(problem: Problem, *, objective: Literal["time", "bytes"] = "time") -> list[Point]:
    """All supported points of the (objective, loss) trade-off, fastest (or smallest) first.

    Every vertex of the convex hull of all plans is there, and one plan per hull edge that ties with another:
    consecutive points differ in one unit. O(total options · log).
    """
    current: list[int] = []
    steps: list[tuple[float, int, int, int]] = []
    for index, unit in enumerate(problem.units):
        xs = [option.time_us if objective == "time" else float(option.bytes) for option in unit.options]
        ys = [option.loss for option in unit.options]
        hull = _lower_hull(xs, ys)
        current.append(hull[0])
        slope = -math.inf
        for position, (a, b) in enumerate(itertools.pairwise(hull)):
            # The running maximum keeps a unit's edges in order when rounding makes two slopes swap.
            slope = max(slope, (ys[b] - ys[a]) / (xs[b] - xs[a]))
            steps.append((slope, index, position, b))
    points = [_point(problem, current)]
    for _, index, _, option in sorted(steps):
        before, after = problem.units[index].options[current[index]], problem.units[index].options[option]
        current[index] = option
        last = points[-1]
        points.append(
            Point(
                tuple(current),
                last.time_us + (after.time_us - before.time_us),
                last.loss + (after.loss - before.loss),
                last.bytes + (after.bytes - before.bytes),
            )
        )
    return points


def solve(
    problem: Problem,
    *,
    objective: Metric,
    max_loss: float | None = None,
    max_time_us: float | None = None,
    max_bytes: float | None = None,
) -> Solution:
    """The assignment with the least objective within the limits, with a proven bound.

    Limits hold up to a billionth of their value (sums of floats). The gap is at most 0.1 % with one binding
    metric besides the objective and 1 % with two on problems of a model's size; it is stated either way.

    Args:
        problem: units, options and fixed parts.
        objective: what is minimised.
        max_loss: limit on the additive loss.
        max_time_us: limit on the time, fixed part included.
        max_bytes: limit on the bytes, fixed part included.

    Raises:
        SearchError: if no assignment is within the limits; the message has the nearest value.
    """
    limits: dict[Metric, float] = {}
    for metric, limit in (("loss", max_loss), ("time", max_time_us), ("bytes", max_bytes)):
        if limit is not None and math.isnan(limit):
            raise SearchError("a limit must be a number", where=f"max {metric}", got=limit)
        if limit is not None and limit != math.inf:
            limits[metric] = limit  # type: ignore[index]  # the loop's names are Metric literals
    own = limits.pop(objective, None)
    others = list(limits)
    incumbent = _cheapest(problem, objective, others)
    if len(others) == 1:
        incumbent = _cheapest(problem, others[0], [objective])
    elif others:
        # The least first metric within the second limit: a feasible start, or the proof that there is none.
        start = _bounded(problem, others[0], {others[1]: limits[others[1]]}, _cheapest(problem, others[1], others))
        incumbent = start.assignment
    solution = _bounded(problem, objective, limits, incumbent)
    if own is not None and not _within(solution.value, own):
        raise _infeasible(objective, own, solution.value)
    return solution


def _bounded(problem: Problem, objective: Metric, limits: Mapping[Metric, float], start: Assignment) -> Solution:
    """``solve`` from an assignment that is feasible if any is."""
    for metric, limit in limits.items():
        if not _within(problem.value(start, metric), limit):
            raise _infeasible(metric, limit, problem.value(start, metric))
    fixed: dict[Metric, float] = {"time": problem.fixed_time_us, "bytes": float(problem.fixed_bytes), "loss": 0.0}
    cost_US = np.nan_to_num(_snap(_matrix(problem, objective)), nan=np.inf)
    weight_MUS = np.zeros((len(limits), *cost_US.shape))
    for weight_US, metric in zip(weight_MUS, limits, strict=True):
        weight_US[...] = np.nan_to_num(_snap(_matrix(problem, metric)))
    # A start that is feasible in floats stays so on the grid.
    limit_M = np.array(
        [
            max(limit - fixed[m] + 1e-9 * abs(limit), float(pick(weight_MUS[i], start).sum()))
            for i, (m, limit) in enumerate(limits.items())
        ]
    )
    core = Core(cost_US, weight_MUS, limit_M, np.array(start))
    tolerance = _TOLERANCE[len(limits)]
    for states in _STATES:
        core.descend(states=states, tolerance=tolerance)
        if core.value - core.bound <= 2 * tolerance * abs(core.value):
            break
    assignment = tuple(int(index) for index in core.best_U)
    value = problem.value(assignment, objective)
    bound = min(value, core.bound + fixed[objective])
    scale = abs(value - fixed[objective])
    gap = 0.0 if value == bound else (value - bound) / scale if scale else math.inf
    return Solution(assignment=assignment, value=value, bound=bound, gap=gap)


def _matrix(problem: Problem, metric: Metric) -> Floats:
    """[U, S] values, NaN where a unit has fewer options than others."""
    width = max(len(unit.options) for unit in problem.units)
    matrix_US = np.full((len(problem.units), width), np.nan)
    for row, unit in zip(matrix_US, problem.units, strict=True):
        for index, option in enumerate(unit.options):
            row[index] = {"time": option.time_us, "loss": option.loss, "bytes": option.bytes}[metric]
    return matrix_US


def _snap(matrix_US: Floats) -> Floats:
    """Round to a power-of-two grid on which every sum is exact.

    Thirty equal layers would otherwise give thousands of partial sums that differ in the last bit only, none of
    which dominates another.
    """
    total = float(np.nanmax(np.abs(matrix_US), axis=1).sum())
    if total == 0:
        return matrix_US
    step = 2.0 ** (math.ceil(math.log2(total)) - 50)
    return np.round(matrix_US / step) * step


def _cheapest(problem: Problem, metric: Metric, ties: Sequence[Metric]) -> Assignment:
    """The least ``metric`` per unit, ties by the other metrics in turn."""
    value: dict[Metric, Callable[[Option], float]] = {
        "time": lambda option: option.time_us,
        "loss": lambda option: option.loss,
        "bytes": lambda option: option.bytes,
    }
    keys = [value[m] for m in (metric, *ties, "loss", "time", "bytes")]
    return tuple(
        min(range(len(unit.options)), key=lambda i: tuple(key(unit.options[i]) for key in keys))
        for unit in problem.units
    )


def _lower_hull(xs: Sequence[float], ys: Sequence[float]) -> list[int]:
    """Indices of the lower left hull: x strictly rising, y strictly falling, slopes strictly rising."""
    hull: list[int] = []
    for i in sorted(range(len(xs)), key=lambda i: (xs[i], ys[i], i)):
        if hull and (ys[i] >= ys[hull[-1]] or xs[i] == xs[hull[-1]]):
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (xs[b] - xs[a]) * (ys[i] - ys[a]) > (ys[b] - ys[a]) * (xs[i] - xs[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def _point(problem: Problem, current: Sequence[int]) -> Point:
    assignment = tuple(current)
    return Point(assignment, problem.time_us(assignment), problem.loss(assignment), problem.bytes(assignment))


def _within(value: float, limit: float) -> bool:
    return value <= limit + 1e-9 * abs(limit)


def _infeasible(metric: Metric, limit: float, nearest: float) -> SearchError:
    unit = f" {_UNITS_OF[metric]}" if _UNITS_OF[metric] else ""
    return SearchError(
        f"some plan must have a {metric} of at most {limit:.6g}{unit}",
        got=f"{nearest:.6g}{unit} as the nearest",
        fix="Raise the limit, or offer more schemes.",
    )
