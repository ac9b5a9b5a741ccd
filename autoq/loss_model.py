"""The additive model of the loss, corrected by measurements, and the small changes of a plan it recommends.

Array suffixes: P measured plans, F families, S schemes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from autoq.errors import SearchError
from autoq.knapsack import Assignment, Metric, Problem
from autoq.search_values import Budget, PlanPoint

Floats = npt.NDArray[np.float64]

# A fitted multiplier stays within e³ = 20: beyond that the sensitivities are broken, not biased.
_LARGEST = 3.0
# Prior spread of the log-multipliers: common to all layers, and of one family or scheme.
_COMMON_SPREAD, _OWN_SPREAD = 1.0, 0.5
# Relative error the additive model keeps after fitting, for plans at the limit.
_MODEL_ERROR = 0.1
# The least it keeps, relative to a usual loss; and from how many standard deviations on a plan counts less.
_FLOOR, _FAR = 0.02, 2.5
# Local moves: the best switches of either kind that are paired.
_SWITCHES = 300


class LossModel:
    """The additive loss with one log-multiplier per family and per scheme, fitted to measured plans.

    ``loss(plan) = Σ_units loss[unit, scheme] · exp(m[family of unit] + m[scheme])``

    Args:
        problem: units and options with their uncorrected losses.
        families: each unit's family.
        limit: the loss limit near which the model should be right; None where the loss is not limited.

    Raises:
        SearchError: if a unit has no family.

    Attributes:
        names: the multipliers' names, ``family:NAME`` and ``scheme:NAME``.
    """

    def __init__(self, problem: Problem, families: Mapping[str, str], limit: float | None) -> None:
        missing = [unit.name for unit in problem.units if unit.name not in families]
        if missing:
            raise SearchError("every unit needs a family", got=", ".join(missing[:5]))
        self.problem, self.limit = problem, limit
        self.family_of = [families[unit.name] for unit in problem.units]
        self.families = sorted(set(self.family_of))
        # A scheme that costs nothing anywhere has nothing to correct.
        self.schemes = sorted({o.scheme for unit in problem.units for o in unit.options if o.loss != 0.0})
        self.names = tuple([f"family:{f}" for f in self.families] + [f"scheme:{s}" for s in self.schemes])
        self._known_shares: dict[Assignment, Floats] = {}

    def corrected(self, multipliers: Mapping[str, float]) -> Problem:
        """The problem with its losses multiplied."""
        units = []
        for unit, family in zip(self.problem.units, self.family_of, strict=True):
            m = multipliers[f"family:{family}"]
            options = tuple(
                replace(o, loss=o.loss * math.exp(m + multipliers.get(f"scheme:{o.scheme}", 0.0))) for o in unit.options
            )
            units.append(replace(unit, options=options))
        return replace(self.problem, units=tuple(units))

    def predict(self, multipliers: Mapping[str, float], assignment: Assignment) -> float:
        """The corrected loss of one plan."""
        family_F = np.exp([multipliers[f"family:{f}"] for f in self.families])
        scheme_S = np.exp([multipliers[f"scheme:{s}"] for s in self.schemes])
        return float(family_F @ self._shares(assignment) @ scheme_S)

    def fit(self, points: Sequence[PlanPoint]) -> dict[str, float]:
        """Ridge (maximum a posteriori) fit of the log-multipliers by Gauss-Newton steps.

        A plan counts by its interval and by the error the model keeps anyway, which grows with the distance from
        the loss limit: interactions make far plans poor guides.
        """
        points = [point for point in points if math.isfinite(point.evaluation.spread)]
        F, S = len(self.families), len(self.schemes)
        if not points:
            return dict.fromkeys(self.names, 0.0)
        share_PFS = np.stack([self._shares(point.assignment) for point in points])
        delta_P = np.array([point.evaluation.loss_delta for point in points])
        spread_P = np.array([point.evaluation.spread for point in points]) / 1.96
        spread = np.array([_COMMON_SPREAD] + [_OWN_SPREAD] * (F + S))
        theta = np.zeros(1 + F + S)
        for _ in range(30):
            log_FS = theta[0] + theta[1 : F + 1, None] + theta[F + 1 :]
            part_PFS = share_PFS * np.exp(np.clip(log_FS, -_LARGEST, _LARGEST))
            predicted_P = part_PFS.sum(axis=(1, 2))
            noise_P = self._noise(spread_P, delta_P, predicted_P)
            # What lies far off (a loss of exactly zero, of a measure in steps) gives hardly more than a direction.
            far_P = np.abs(delta_P - predicted_P) / noise_P
            counted_P = noise_P * np.sqrt(np.maximum(far_P / _FAR, 1.0))
            slope = np.hstack([predicted_P[:, None], part_PFS.sum(axis=2), part_PFS.sum(axis=1)]) / counted_P[:, None]
            gradient = slope.T @ ((delta_P - predicted_P) / counted_P) - theta / spread**2
            step = np.linalg.solve(slope.T @ slope + np.diag(spread**-2.0), gradient)
            theta += np.clip(step, -0.5, 0.5)
            if np.abs(step).max() < 1e-9:
                break
        fitted = np.clip(np.concatenate([theta[0] + theta[1 : F + 1], theta[F + 1 :]]), -_LARGEST, _LARGEST)
        return dict(zip(self.names, fitted.tolist(), strict=True))

    def error(self, points: Sequence[PlanPoint]) -> float | None:
        """Median absolute error of the loss on points that each were left out of the fit.

        Plans of schemes that cost nothing are predicted without a model and do not count. None for fewer than two.
        """
        points = [p for p in points if math.isfinite(p.evaluation.spread) and self._shares(p.assignment).any()]
        errors = []
        for index, point in enumerate(points):
            others = self.fit([*points[:index], *points[index + 1 :]])
            errors.append(abs(point.evaluation.loss_delta - self.predict(others, point.assignment)))
        return statistics.median(errors) if len(errors) > 1 else None

    def _noise(self, spread_P: Floats, delta_P: Floats, predicted_P: Floats) -> Floats:
        """Standard deviation of each measurement around the model.

        A loss measured as zero is as uncertain as the loss predicted for it.
        """
        size_P = np.maximum(np.abs(delta_P), np.abs(predicted_P))
        distance_P = np.zeros(len(delta_P))
        if self.limit:
            distance_P = np.minimum(np.abs(delta_P - self.limit) / self.limit, 5.0)
        usual = np.abs(delta_P[delta_P != 0.0])
        floor = _FLOOR * float(np.median(usual)) if len(usual) else 1e-12
        model_P = _MODEL_ERROR * (1.0 + distance_P) * size_P
        return np.asarray(np.sqrt(spread_P**2 + model_P**2 + floor**2))

    def _shares(self, assignment: Assignment) -> Floats:
        """The plan's uncorrected loss by family and scheme."""
        found = self._known_shares.get(assignment)
        if found is None:
            found = np.zeros((len(self.families), len(self.schemes)))
            for option, family in zip(self.problem.options(assignment), self.family_of, strict=True):
                if option.scheme in self.schemes:
                    found[self.families.index(family), self.schemes.index(option.scheme)] += option.loss
            self._known_shares[assignment] = found
        return found


def neighbours(problem: Problem, base: PlanPoint, budget: Budget) -> Iterator[Assignment]:
    """Plans one or two switches from ``base`` that should be within the limits and better, the best first.

    ``base`` counts as measured; only the switches are modelled, with a margin of the model's error.
    """
    metrics: tuple[Metric, ...] = ("time", "loss", "bytes")
    where, change = _switches(problem, base.assignment)
    if not len(where):
        return
    objective, payment = metrics.index(budget.metric), metrics.index(budget.primary)
    over = base.excess(budget) > 0
    # Over the limits, what must gain is the limited metric and the objective pays.
    if over:
        objective, payment = payment, objective
    ratio = change[objective] / np.maximum(change[payment], 1e-12 * (1.0 + np.abs(change[payment]).max()))
    gains = np.flatnonzero(change[objective] < 0)
    gains = gains[np.argsort(ratio[gains], kind="stable")][:_SWITCHES]
    price = change[objective] / np.minimum(change[payment], -1e-300)
    pays = np.flatnonzero((change[payment] < 0) & (change[objective] >= 0))
    pays = pays[np.argsort(-price[pays], kind="stable")][:_SWITCHES]
    # Column 0 is the gain alone.
    total = change[:, gains, None] + np.concatenate([np.zeros((3, 1)), change[:, pays]], axis=1)[:, None, :]
    fits = np.ones(total.shape[1:], dtype=bool)
    for index, metric in enumerate(metrics):
        if metric in budget.limits:
            now = base.evaluation.high if metric == "loss" else base.value(metric)
            margin = _MODEL_ERROR * np.abs(total[index]) if metric == "loss" else 0.0
            fits &= now + total[index] + margin <= budget.limits[metric]
    fits[:, 1:] &= where[gains, 0][:, None] != where[pays, 0][None, :]
    score = total[metrics.index(budget.metric)]
    if not over:
        fits &= score < 0
    row, column = np.nonzero(fits)
    for index in np.argsort(score[row, column], kind="stable"):
        plan = list(base.assignment)
        moves = [gains[row[index]]] + ([pays[column[index] - 1]] if column[index] else [])
        for unit, option in where[moves]:
            plan[unit] = int(option)
        yield tuple(plan)


def _switches(problem: Problem, assignment: Assignment) -> tuple[npt.NDArray[np.int64], Floats]:
    """Every single switch: (unit, option) rows, and the change of time, loss and bytes as [3, switches]."""
    where, change = [], []
    for index, (unit, chosen) in enumerate(zip(problem.units, assignment, strict=True)):
        now = unit.options[chosen]
        for position, option in enumerate(unit.options):
            if position != chosen:
                where.append((index, position))
                change.append((option.time_us - now.time_us, option.loss - now.loss, option.bytes - now.bytes))
    return np.array(where, dtype=np.int64).reshape(-1, 2), np.array(change, dtype=np.float64).reshape(-1, 3).T
