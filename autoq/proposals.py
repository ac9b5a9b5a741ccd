"""Which plan to measure next: a function of the trials so far alone, so that an interrupted search goes on alike.

Array suffixes: P measured plans.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from autoq.errors import SearchError
from autoq.hypervolume import gain_and_noise, improvements
from autoq.knapsack import Assignment, Metric, frontier
from autoq.loss_model import LossModel, neighbours
from autoq.search_values import Budget, PlanPoint, Source

# Natural logarithm of the share of the limit that trials spend; of a limit on time or bytes they leave little.
_LOSS_RANGE, _HARD_RANGE = (-2.0, 0.3), (-0.1, 0.0)
# Trials move the fitted log-multipliers by up to a factor of two.
_OFFSET = 0.7
# How many plans of the refitted frontier come before Optuna's; and how many make a front known.
_FRONTIER_PLANS = 8
# After those every third is one of Optuna's and a local move by turns.
_EVERY = 3
# How many trials in a row may repeat known plans.
_REPEATS = 5
# A plan at the limit is tried for at least this relative gain; what is less, no clock would tell from noise.
_WORTHWHILE = 2e-3
# When the search has converged, so many plans at the limit or beside the best may still fail to be the best.
_LIMIT_TRIES = 2
_LIMIT, _LAST = "limit", "last"  # labels of those plans
# Where there are no more plans than this, all are weighed by what they promise, and _PATIENCE of them may fail.
_FEW_PLANS = 4096
# The search ends when this many trials together gained no more than chance would.
_PATIENCE = 6
# Standard deviations of the model's misses that a plan stays below the limit by; their number, summed weights.
_CAUTION, _ONE_PLAN, _NO_PLAN = 2.0, 1.0, 1e-6
# Of those misses, as a share of the limit: plans alike miss alike, the next one may not.
_LEAST_DEVIATION = 0.04
# A measured plan corrects predictions of plans with about its loss: half-width as a ratio of losses.
_NEARBY = 0.4


class Proposal(NamedTuple):
    """A trial to start. Optuna chooses the parameters where they are None and there is no plan."""

    source: Source
    label: str
    assignment: Assignment | None = None
    params: Mapping[str, float] | None = None


class _View(NamedTuple):
    """What a proposal rests on.

    Attributes:
        points: every plan measured, once.
        plans: what each finished trial noted of its plan, in order.
        pending: the plans that others are measuring.
        fitted: the model's log-multipliers as fitted to the points.
        turn: how many plans there are that were not given.
    """

    points: Sequence[PlanPoint]
    plans: Sequence[Mapping[str, Any]]
    pending: Sequence[Assignment]
    fitted: Mapping[str, float]
    turn: int

    @property
    def taken(self) -> set[Assignment]:
        """The plans that need not be proposed again."""
        return {point.assignment for point in self.points} | set(self.pending)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposer:
    """Proposes the given plans, then some of the frontier's, then by turns those, Optuna's and local moves.

    Attributes:
        budget: objective and limits.
        model: the additive model of the loss, without corrections.
        uniform: the uniform plans by name.
        known: plans whose losses an earlier search measured; they cost nothing and teach the model.
    """

    budget: Budget
    model: LossModel
    uniform: Mapping[str, Assignment]
    known: Sequence[Assignment] = ()

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Range of each parameter that a trial of Optuna's chooses."""
        target = _LOSS_RANGE if self.budget.primary == "loss" else _HARD_RANGE
        return dict.fromkeys(self.model.names, (-_OFFSET, _OFFSET)) | {"target": target}

    def propose(
        self,
        points: Sequence[PlanPoint],
        plans: Sequence[Mapping[str, Any]],
        n_trials: int,
        pending: Sequence[Mapping[str, Any]] = (),
    ) -> Proposal | None:
        """The next trial; None when done, or when what others are measuring has to be waited for.

        Args:
            points: every plan measured, once.
            plans: what each finished trial noted of its plan, in order.
            n_trials: how many different plans are wanted at most, the known ones not counted.
            pending: what the trials that others are measuring noted of their plans.
        """
        others = [tuple(plan["assignment"]) for plan in pending]
        taken = {point.assignment for point in points} | set(others)
        for label, assignment in self.uniform.items():
            if assignment not in taken:
                return Proposal("uniform", label, assignment)
        for number, assignment in enumerate(self.known):
            if assignment not in taken:
                return Proposal("known", f"known {number}", assignment)
        if not points or len(taken - set(self.known)) >= n_trials:
            return None
        turn = len(taken) - len(set(self.uniform.values()))
        view = _View(points, plans, others, self.model.fit(points), turn)
        for step in self._steps(view):
            proposal = step(view)
            if proposal is not None:
                return proposal
        return None

    def _steps(self, view: _View) -> list[Callable[[_View], Proposal | None]]:
        """What to try, in this order."""
        if self._explored(view.points):
            return [self._known_best, self._at_limit]
        if self.converged(view.points):
            last = view.points[-(_PATIENCE if self._is_small else _LIMIT_TRIES) :]
            best = min(self._fitting(view.points), default=math.inf)
            tried = all(
                point.label.startswith((_LIMIT, _LAST))
                and not (point.fits(self.budget) and point.value(self.budget.metric) <= best)
                for point in last
            )
            if tried:
                return [self._known_best]
            return [self._known_best, self._at_limit, self._close_to_limit, self._last_move, self._likeliest]
        others = [self._by_optuna, self._local] if view.turn // _EVERY % 2 else [self._local, self._by_optuna]
        if view.turn >= _FRONTIER_PLANS and view.turn % _EVERY == 0:
            return [self._known_best, self._at_limit, *others, self._into_gap]
        return [self._known_best, self._at_limit, self._into_gap, *others]

    @property
    def _is_small(self) -> bool:
        return math.prod(len(unit.options) for unit in self.model.problem.units) <= _FEW_PLANS

    def _explored(self, points: Sequence[PlanPoint]) -> bool:
        """Whether an earlier search showed the front on both sides of the limit: only its best plan is missing then."""
        primary = self.budget.primary
        known = [point.value(primary) for point in points if point.source == "known" and point.comparable]
        below = [value for value in known if value <= self.budget.limits[primary]]
        return len(below) >= _FRONTIER_PLANS and len(below) < len(known)

    def _fitting(self, points: Sequence[PlanPoint]) -> list[float]:
        """The objective of the fully measured plans within the limits."""
        return [point.value(self.budget.metric) for point in points if point.fits(self.budget)]

    def converged(self, points: Sequence[PlanPoint]) -> bool:
        """Whether the last trials gained no hypervolume beyond what chance would."""
        chosen = [point for point in points if point.source != "uniform"]
        new = any(point.source != "known" for point in chosen)  # one for this budget, however many are known
        if len(chosen) < _FRONTIER_PLANS + _PATIENCE or not new:
            return False
        refined = chosen[-_PATIENCE:]
        if not any(len(point.evaluation.rows) > 1 for point in points):
            return False  # nothing is known of chance
        comparable = [
            point
            for point in points
            if point.comparable and len(point.evaluation.rows) > 1 and point.affordable(self.budget)
        ]
        recent = [point for point in comparable if point in refined]
        older = [point for point in comparable if point not in refined]
        if not recent:
            return True
        rows = min(len(point.evaluation.rows) for point in comparable)
        gain, noise = gain_and_noise(
            [point.value(self.budget.axis) for point in (*older, *recent)],
            [point.evaluation.rows[:rows] for point in (*older, *recent)],
            recent=len(recent),
            reference=self.reference(points),
        )
        return gain <= noise

    def reference(self, points: Sequence[PlanPoint]) -> tuple[float, float]:
        """The corner of the box in which plans are worth having: (time or bytes, loss)."""
        limits, axis = self.budget.limits, self.budget.axis
        uniform = [p for p in points if p.source == "uniform" and math.isfinite(p.evaluation.loss_delta)] or points
        return (
            limits.get(axis, max(point.value(axis) for point in uniform)),
            limits.get("loss", max(point.evaluation.loss_delta for point in uniform)),
        )

    def _known_best(self, view: _View) -> Proposal | None:
        """A known plan that would be the best within the limits, were it measured on all samples."""
        metric, best = self.budget.metric, min(self._fitting(view.points), default=math.inf)
        promising = [
            point
            for point in view.points
            if not point.full and point.comparable and point.excess(self.budget) == 0 and point.value(metric) < best
        ]
        for point in sorted(promising, key=lambda point: point.value(metric)):
            if point.source == "known" and point.assignment not in view.pending:
                return Proposal("local", f"{point.label} again", point.assignment)
        return None

    def _close_to_limit(self, view: _View) -> Proposal | None:
        """The plan at the limit without caution: where plans are few, the last bit of the limit may be worth a lot."""
        return self._at_limit(view, caution=0.0)

    def _at_limit(self, view: _View, caution: float = _CAUTION) -> Proposal | None:
        """The best plan within the limits as the fitted model sees it, if it beats the best that was measured."""
        params = dict.fromkeys(self.model.names, 0.0) | {"target": 0.0}
        assignment = self.decode(params, view.fitted, view.points, caution)
        expected = self.model.predict(view.fitted, assignment)
        if self.budget.metric != "loss":
            expected = self.model.problem.value(assignment, self.budget.metric)
        best = min(self._fitting(view.points), default=math.inf)
        if assignment in view.taken or expected > best - _WORTHWHILE * abs(expected):
            return None
        return Proposal("frontier", f"{_LIMIT} {view.turn}", assignment, params)

    def _into_gap(self, view: _View) -> Proposal | None:
        """The frontier's plan that should add most to what the measured plans cover, and the pending ones will."""
        axis, limits, problem = self.budget.axis, self.budget.limits, self.model.problem
        hard: list[Metric] = [metric for metric in ("time", "bytes") if metric in limits]
        plans = [
            point
            for point in frontier(self.model.corrected(view.fitted), objective=axis)
            if all(problem.value(point.assignment, metric) <= limits[metric] for metric in hard)
        ]
        losses = self._debiased([point.loss for point in plans], view)
        candidates = [
            (point.time_us if axis == "time" else float(point.bytes), loss)
            for point, loss in zip(plans, losses, strict=True)
        ]
        known = [
            (point.value(axis), point.evaluation.loss_delta)
            for point in view.points
            if math.isfinite(point.evaluation.loss_delta) and point.affordable(self.budget)
        ]
        known += [(problem.value(one, axis), self.model.predict(view.fitted, one)) for one in view.pending]
        gains = improvements(candidates, known, self.reference(view.points))
        taken = view.taken
        for index in sorted(range(len(plans)), key=lambda i: -gains[i]):
            if gains[index] > 0 and plans[index].assignment not in taken:
                params = dict.fromkeys(self.model.names, 0.0) | {"target": self._target(plans[index].loss)}
                return Proposal("frontier", f"gap {view.turn}", plans[index].assignment, params)
        return None

    def _target(self, loss: float) -> float:
        """The parameter that stands for spending this much, within the range of it."""
        low, high = self.ranges["target"]
        limit = self.budget.limits.get("loss", 0.0)
        if self.budget.primary != "loss" or limit <= 0 or loss <= 0:
            return high if self.budget.primary != "loss" else low
        return min(max(math.log(loss / limit), low), high)

    def _debiased(self, losses: Sequence[float], view: _View) -> list[float]:
        """Predicted losses, corrected by how far the model is off on measured plans with about the same loss."""
        known = [
            (point.evaluation.loss_delta, self.model.predict(view.fitted, point.assignment))
            for point in view.points
            if point.source != "uniform" and math.isfinite(point.evaluation.loss_delta)
        ]
        pairs = np.log(np.array([pair for pair in known if min(pair) > 0.0]).reshape(-1, 2))
        found = []
        for loss in losses:
            if loss <= 0.0 or not len(pairs):
                found.append(loss)
                continue
            weight_P = np.exp(-0.5 * ((pairs[:, 1] - math.log(loss)) / _NEARBY) ** 2)
            bias = float(weight_P @ (pairs[:, 0] - pairs[:, 1]) / (weight_P.sum() + 1.0))
            found.append(loss * math.exp(bias))
        return found

    def _by_optuna(self, view: _View) -> Proposal | None:
        """A trial whose parameters the sampler chooses, unless it has run dry of new plans."""
        recent = view.plans[-_REPEATS:]
        if len(recent) == _REPEATS and all(plan["source"] == "optuna" and plan["repeated"] for plan in recent):
            return None
        return Proposal("optuna", "optuna")

    def _local(self, view: _View) -> Proposal | None:
        """The best unmeasured neighbour of the best plan: one switch, or one that gains and one that pays for it."""
        full = [point for point in view.points if point.full]
        if not full:
            return None
        taken = view.taken
        base = min(full, key=lambda point: (point.excess(self.budget), point.value(self.budget.metric)))
        for assignment in neighbours(self.model.corrected(view.fitted), base, self.budget):
            if assignment not in taken:
                return Proposal("local", f"local {view.turn}", assignment)
        return None

    def _last_move(self, view: _View) -> Proposal | None:
        """The best neighbour of the best plan within the limits, if it is expected to be worth a measurement."""
        found = self._local(view)
        fitting = [point for point in view.points if point.fits(self.budget)]
        if found is None or found.assignment is None or not fitting:
            return None
        metric, problem = self.budget.metric, self.model.corrected(view.fitted)
        base = problem.value(min(fitting, key=lambda point: point.value(metric)).assignment, metric)
        if problem.value(found.assignment, metric) > base - _WORTHWHILE * abs(base):
            return None
        return found._replace(label=f"{_LAST} {view.turn}")

    def _likeliest(self, view: _View) -> Proposal | None:
        """Of few plans, the one with the largest expected gain: what it is better by, times how likely it fits.

        In a small problem a plan may be far better than its neighbours, and the model wrong about it.
        """
        metric, limits = self.budget.metric, self.budget.limits
        best = min(self._fitting(view.points), default=math.inf)
        if not self._is_small or self.budget.primary != "loss" or not math.isfinite(best):
            return None
        bias, deviation = self._misses(view)
        problem, taken = self.model.problem, view.taken
        hard: list[Metric] = [one for one in ("time", "bytes") if one in limits]
        worth: dict[Assignment, float] = {}
        for plan in itertools.product(*(range(len(unit.options)) for unit in problem.units)):
            gain = best - problem.value(plan, metric)
            if plan in taken or gain < _WORTHWHILE * best or any(problem.value(plan, x) > limits[x] for x in hard):
                continue
            distance = (limits["loss"] - self.model.predict(view.fitted, plan) - bias) / deviation
            worth[plan] = gain * math.erfc(-distance / math.sqrt(2.0))
        found = max(worth, key=lambda plan: worth[plan], default=None)
        return None if found is None else Proposal("local", f"{_LAST} {view.turn}", found)

    def _misses(self, view: _View) -> tuple[float, float]:
        """Mean and spread of how far plans near the limit measure, at their interval's end, above prediction."""
        limit = self.budget.limits["loss"]
        mixed = [one for one in view.points if one.source != "uniform" and one.full]
        near = [one for one in mixed if math.isfinite(one.evaluation.high)]
        if not near or limit <= 0:
            return 0.0, max(limit, 1e-12)
        miss_P = np.array([one.evaluation.high - self.model.predict(view.fitted, one.assignment) for one in near])
        weight_P = np.exp(-0.5 * ((np.array([one.evaluation.loss_delta for one in near]) / limit - 1.0) / 0.5) ** 2)
        if weight_P.sum() <= _NO_PLAN:
            return 0.0, limit
        return _mean_and_deviation(miss_P, weight_P, limit)

    def decode(
        self,
        params: Mapping[str, float],
        fitted: Mapping[str, float],
        points: Sequence[PlanPoint],
        caution: float = _CAUTION,
    ) -> Assignment:
        """The knapsack's plan for the fitted model moved by a trial's parameters."""
        moved = {name: fitted[name] + params[name] for name in self.model.names}
        problem = self.model.corrected(moved)
        target = params["target"] + self._reserve(fitted, points, caution)
        try:
            return self.budget.solve(problem, target=target).assignment
        except SearchError:
            # Nothing fits by the model: the plan that comes nearest may still measure within.
            return self.budget.nearest(problem).assignment

    def _reserve(self, fitted: Mapping[str, float], points: Sequence[PlanPoint], caution: float) -> float:
        """Logarithm of the share of the loss limit to aim at, so that the measured upper bound meets the limit.

        Takes off the interval's half-width, the fitted model's bias and ``caution`` times its spread, as seen on plans
        near the limit: there a little less loss costs hardly any time, but a plan just over it costs a measurement.
        """
        limit = self.budget.limits[self.budget.primary]
        near = [point for point in points if point.full and math.isfinite(point.evaluation.high)]
        if self.budget.primary != "loss" or not near or limit <= 0:
            return 0.0
        delta_P = np.array([point.evaluation.loss_delta for point in near])
        weight_P = np.exp(-0.5 * ((delta_P - limit) / (0.3 * limit)) ** 2)
        spread_P = np.array([point.evaluation.spread for point in near])
        error_P = delta_P - np.array([self.model.predict(fitted, point.assignment) for point in near])
        spread = float(weight_P @ spread_P / weight_P.sum()) if weight_P.sum() > _NO_PLAN else 0.0
        bias = float(weight_P @ error_P / (weight_P.sum() + 1.0))
        # Uniform plans are off in ways that mixed ones are not.
        mixed_P = weight_P * np.array([point.source != "uniform" for point in near])
        deviation = 0.0
        if mixed_P.sum() > _ONE_PLAN:
            _, deviation = _mean_and_deviation(error_P + spread_P, mixed_P, limit)
        return math.log(min(max(1.0 - (spread + bias + caution * deviation) / limit, 0.2), 2.0))


def _mean_and_deviation(
    miss_P: npt.NDArray[np.float64], weight_P: npt.NDArray[np.float64], limit: float
) -> tuple[float, float]:
    """Of plans' misses, weighted; the next plan may miss by more than these differ by."""
    mean = float(weight_P @ miss_P / weight_P.sum())
    squares = float(weight_P @ (miss_P - mean) ** 2 / weight_P.sum())
    return mean, math.hypot(math.sqrt(squares), _LEAST_DEVIATION * limit)
