"""The knapsack on arrays: a Lagrangian bound, and a dynamic programme over the options that can still win.

Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", EJOR 83, 1995. Where the programme must
forget partial assignments, it remembers the best bound among them, so the bound it reports is proven.

Array suffixes: U units, S options of a unit (short units padded), M constraints, P partial assignments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class Core:
    """The best assignment found and the bound proven, tightened by ``descend``.

    Costs and weights should lie on a grid on which their sums are exact, or equal sums will not be found equal.

    Args:
        cost_US: what is minimised; infinite where a unit has fewer options than others.
        weight_MUS: what each constraint sums up.
        limit_M: the constraints' limits.
        start_U: an option index per unit, within the limits.

    Attributes:
        best_U: the best assignment found.
        value: its cost.
        bound: no assignment within the limits costs less.
    """

    def __init__(self, cost_US: Floats, weight_MUS: Floats, limit_M: Floats, start_U: Integers) -> None:
        self.cost_US, self.weight_MUS, self.limit_M = cost_US, weight_MUS, limit_M
        self.lambda_M = _multipliers(cost_US, weight_MUS, limit_M)
        priced_US = _priced(cost_US, weight_MUS, self.lambda_M)
        self.base_U = priced_US.argmin(axis=1)
        self.floor_U = priced_US.min(axis=1)
        self.reduced_US = priced_US - self.floor_U[:, None]
        self.dual = float(self.floor_U.sum() - self.lambda_M @ limit_M)
        self.best_U = start_U
        self.value = float(pick(cost_US, start_U).sum())
        self.bound = min(self.dual, self.value)

    def descend(self, *, states: int, tolerance: float) -> None:
        """One pass over the units, keeping at most ``states`` partial assignments after each."""
        # Units whose second choice is nearly free come first: they decide, the others follow.
        second_U = np.partition(self.reduced_US, 1, axis=1)[:, 1] if self.cost_US.shape[1] > 1 else self.floor_U * 0
        order = np.argsort(second_U, kind="stable")
        cost_P, weight_MP = np.zeros(1), np.zeros((len(self.limit_M), 1))
        trail: list[tuple[Integers, Integers]] = []
        found: tuple[int, int] | None = None
        forgotten = math.inf
        base_cost, base_weight_M, least_weight_M, floor = self._rest(order)
        for depth, unit in enumerate(order):
            threshold = self.value - tolerance * abs(self.value)
            options = np.flatnonzero(self.dual + self.reduced_US[unit] < threshold)
            if not options.size:
                break
            cost_P = (cost_P[:, None] + self.cost_US[unit, options]).ravel()
            added_MS = self.weight_MUS[:, unit][:, options]
            weight_MP = (weight_MP[:, :, None] + added_MS[:, None, :]).reshape(len(self.limit_M), cost_P.size)
            bound_P = cost_P + self.lambda_M @ weight_MP + (floor[depth] - self.lambda_M @ self.limit_M)
            done_P = cost_P + base_cost[depth]
            fits_P = (weight_MP + base_weight_M[:, depth, None] <= self.limit_M[:, None]).all(axis=0)
            done_P = np.where(fits_P, done_P, np.inf)
            first = int(done_P.argmin())
            improved = done_P[first] < self.value
            if improved:
                self.value = float(done_P[first])
            open_P = (weight_MP + least_weight_M[:, depth, None] <= self.limit_M[:, None]).all(axis=0)
            open_P &= bound_P < self.value - tolerance * abs(self.value)
            keep = _undominated(cost_P, weight_MP, np.flatnonzero(open_P))
            if keep.size > states:
                ranked = keep[np.argsort(bound_P[keep], kind="stable")]
                forgotten = min(forgotten, float(bound_P[ranked[states]]))
                keep = ranked[:states]
            if improved:
                # The incumbent stays in the trail even when its own partial assignment is closed.
                keep = np.append(keep[keep != first], first)
                found = (depth, keep.size - 1)
            trail.append((keep // options.size, options[keep % options.size]))
            cost_P, weight_MP = cost_P[keep], weight_MP[:, keep]
            if not keep.size:
                break
        if found is not None:
            self.best_U = self._retrace(order, trail, found)
        proven = min(self.value, forgotten, self.value - tolerance * abs(self.value))
        self.bound = min(self.value, max(self.bound, proven))

    def _rest(self, order: Integers) -> tuple[Floats, Floats, Floats, Floats]:
        """Sums over the units after each depth: base cost and weight, least weight; and the floor of the units
        still open, so that ``cost + λ·weight + floor − λ·limit`` bounds every completion.
        """
        base_cost_U = pick(self.cost_US, self.base_U)[order]
        base_weight_MU = self.weight_MUS[:, order, self.base_U[order]]
        least_MU = np.where(np.isfinite(self.cost_US), self.weight_MUS, np.inf).min(axis=2)[:, order]
        return (
            _after(base_cost_U),
            _after(base_weight_MU),
            _after(least_MU),
            _after(self.floor_U[order]),
        )

    def _retrace(
        self,
        order: Integers,
        trail: Sequence[tuple[Integers, Integers]],
        found: tuple[int, int],
    ) -> Integers:
        best_U: Integers = self.base_U.copy()
        depth, state = found
        while depth >= 0:
            parents, options = trail[depth]
            best_U[order[depth]] = options[state]
            state = int(parents[state])
            depth -= 1
        return best_U


def _undominated(cost_P: Floats, weight_MP: Floats, open_: Integers) -> Integers:
    """Drop partial assignments that another one beats (one constraint) or equals (several)."""
    cost, weight = cost_P[open_], weight_MP[:, open_]
    order = np.lexsort((cost, *weight[::-1]))
    open_, cost, weight = open_[order], cost[order], weight[:, order]
    if len(weight) <= 1:
        keep = np.ones(open_.size, dtype=bool)
        keep[1:] = cost[1:] < np.minimum.accumulate(cost)[:-1]
    else:
        keep = np.ones(open_.size, dtype=bool)
        keep[1:] = (weight[:, 1:] != weight[:, :-1]).any(axis=0)
    kept: Integers = open_[keep]
    return kept


def _multipliers(cost_US: Floats, weight_MUS: Floats, limit_M: Floats) -> Floats:
    """Maximise the concave dual, one multiplier inside the other.

    Any multipliers give a valid bound, so a search that stops early costs tightness, never truth.
    """
    lambda_M = np.zeros(len(limit_M))

    def dual() -> float:
        return float(_priced(cost_US, weight_MUS, lambda_M).min(axis=1).sum() - lambda_M @ limit_M)

    def best_over(index: int) -> float:
        if index == len(lambda_M):
            return dual()

        def at(multiplier: float) -> float:
            lambda_M[index] = multiplier
            return best_over(index + 1)

        start = 2.0**-30 * _range(cost_US) / max(_range(weight_MUS[index]), 1e-300)
        return _maximise(at, start)

    best_over(0)
    return lambda_M


def _maximise(function: Callable[[float], float], start: float) -> float:
    """Maximum of a concave function over [0, ∞), left evaluated at its argument: doubling, then golden section."""
    seen = {0.0: function(0.0)}
    low, high = 0.0, start or 1.0
    seen[high] = function(high)
    for _ in range(120):
        seen[2 * high] = function(2 * high)
        rising = seen[2 * high] > seen[high]
        if not rising and seen[high] >= seen[low]:
            break
        if not rising:
            return function(max(seen, key=lambda x: seen[x]))
        low, high = high, 2 * high
    left, right = low, 2 * high
    ratio = (math.sqrt(5) - 1) / 2
    a, b = right - ratio * (right - left), left + ratio * (right - left)
    value_a, value_b = function(a), function(b)
    for _ in range(32):
        if value_a >= value_b:
            right, b, value_b = b, a, value_a
            a = right - ratio * (right - left)
            value_a = seen[a] = function(a)
        else:
            left, a, value_a = a, b, value_b
            b = left + ratio * (right - left)
            value_b = seen[b] = function(b)
    return function(max(seen, key=lambda x: seen[x]))


def _priced(cost_US: Floats, weight_MUS: Floats, lambda_M: Floats) -> Floats:
    priced_US = cost_US.copy()
    for multiplier, weight_US in zip(lambda_M, weight_MUS, strict=True):
        priced_US += multiplier * weight_US
    return priced_US


def pick(matrix_US: Floats, choice_U: npt.ArrayLike) -> Floats:
    """Each unit's value [U] under the choice of one option index per unit."""
    index_U = np.asarray(choice_U)
    picked_U: Floats = matrix_US[np.arange(len(index_U)), index_U]
    return picked_U


def _after(values: Floats) -> Floats:
    """Sums over the later positions of the last axis."""
    inclusive: Floats = np.cumsum(values[..., ::-1], axis=-1)[..., ::-1]
    return inclusive - values


def _range(matrix_US: Floats) -> float:
    finite = matrix_US[np.isfinite(matrix_US)]
    return float(finite.max() - finite.min())
