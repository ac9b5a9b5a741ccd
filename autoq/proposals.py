"""Which plan to measure next: a function of the finished trials alone, so that an interrupted search goes on alike.

Array suffixes: P measured plans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from autoq.errors import SearchError
from autoq.knapsack import Assignment, solve
from autoq.loss_model import LossModel, neighbours
from autoq.search_values import Budget, PlanPoint, Source

# Natural logarithms of the share of the limit that the frontier plans spend, the likeliest first.
_LOSS_TARGETS = (0.0, -0.3, 0.2, -0.6, 0.1, -0.15, -0.95, -0.45)
_HARD_TARGETS = (0.0, -0.02, -0.05, -0.1)
_LOSS_RANGE, _HARD_RANGE = (-1.0, 0.3), (-0.1, 0.0)
# Trials move the fitted log-multipliers by up to a factor of two.
_OFFSET = 0.7
# How many trials in a row may repeat known plans.
_REPEATS = 5


class Proposal(NamedTuple):
    """A trial to start. Optuna chooses the parameters where they are None and there is no plan."""

    source: Source
    label: str
    assignment: Assignment | None = None
    params: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposer:
    """Proposes the uniform plans, then the frontier's, then in turn a refitted one, Optuna's and a local move.

    Attributes:
        budget: objective and limits.
        model: the additive model of the loss, without corrections.
        uniform: the uniform plans by name.
    """

    budget: Budget
    model: LossModel
    uniform: Mapping[str, Assignment]

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Range of each parameter that a trial of Optuna's chooses."""
        target = _LOSS_RANGE if self.budget.primary == "loss" else _HARD_RANGE
        return dict.fromkeys(self.model.names, (-_OFFSET, _OFFSET)) | {"target": target}

    def propose(
        self, points: Sequence[PlanPoint], plans: Sequence[Mapping[str, Any]], n_trials: int
    ) -> Proposal | None:
        """The next trial; None when done.

        Args:
            points: every plan measured, once.
            plans: what each finished trial noted of its plan, in order.
            n_trials: how many different plans are wanted.
        """
        seen = {point.assignment for point in points}
        for label, assignment in self.uniform.items():
            if assignment not in seen:
                return Proposal("uniform", label, assignment)
        if len(seen) >= n_trials:
            return None
        fitted = self.model.fit(points)
        labels = {point.label for point in points}
        targets = _LOSS_TARGETS if self.budget.primary == "loss" else _HARD_TARGETS
        for target in targets:
            label = f"frontier {target:+g}"
            if label not in labels:
                proposal = self._on_frontier(label, target, fitted, points)
                if proposal is not None:
                    return proposal
        steps = (
            lambda: self._on_frontier(f"refit {len(seen)}", 0.0, fitted, points),
            lambda: self._by_optuna(plans),
            lambda: self._local(fitted, points),
        )
        for turn in range(3):
            proposal = steps[(len(seen) + turn) % 3]()
            if proposal is not None:
                return proposal
        return None

    def _on_frontier(
        self, label: str, target: float, fitted: Mapping[str, float], points: Sequence[PlanPoint]
    ) -> Proposal | None:
        params = dict.fromkeys(self.model.names, 0.0) | {"target": target}
        assignment = self.decode(params, fitted, points)
        if any(point.assignment == assignment for point in points):
            return None
        return Proposal("frontier", label, assignment, params)

    def _by_optuna(self, plans: Sequence[Mapping[str, Any]]) -> Proposal | None:
        """A trial whose parameters the sampler chooses, unless it has run dry of new plans."""
        recent = plans[-_REPEATS:]
        if len(recent) == _REPEATS and all(plan["source"] == "optuna" and plan["repeated"] for plan in recent):
            return None
        return Proposal("optuna", "optuna")

    def _local(self, fitted: Mapping[str, float], points: Sequence[PlanPoint]) -> Proposal | None:
        """The best unmeasured neighbour of the best plan: one switch, or one that gains and one that pays for it."""
        full = [point for point in points if point.full]
        if not full:
            return None
        base = min(full, key=lambda point: (point.excess(self.budget), point.value(self.budget.metric)))
        seen = {point.assignment for point in points}
        for assignment in neighbours(self.model.corrected(fitted), base, self.budget):
            if assignment not in seen:
                return Proposal("local", f"local {len(seen)}", assignment)
        return None

    def decode(
        self, params: Mapping[str, float], fitted: Mapping[str, float], points: Sequence[PlanPoint]
    ) -> Assignment:
        """The knapsack's plan for the fitted model moved by a trial's parameters."""
        moved = {name: fitted[name] + params[name] for name in self.model.names}
        problem = self.model.corrected(moved)
        target = params["target"] + self._reserve(fitted, points)
        try:
            return self.budget.solve(problem, target=target).assignment
        except SearchError:
            # Nothing fits by the model: the plan that comes nearest may still measure within.
            return solve(problem, objective=self.budget.primary).assignment

    def _reserve(self, fitted: Mapping[str, float], points: Sequence[PlanPoint]) -> float:
        """Logarithm of the share of the loss limit to aim at, so that the measured upper bound meets the limit.

        Takes off the interval's half-width and the fitted model's bias, both as seen on plans near the limit.
        """
        limit = self.budget.limits[self.budget.primary]
        near = [point for point in points if point.full and math.isfinite(point.evaluation.high)]
        if self.budget.primary != "loss" or not near or limit <= 0:
            return 0.0
        delta_P = np.array([point.evaluation.loss_delta for point in near])
        weight_P = np.exp(-0.5 * ((delta_P - limit) / (0.3 * limit)) ** 2)
        spread_P = np.array([point.evaluation.spread for point in near])
        error_P = delta_P - np.array([self.model.predict(fitted, point.assignment) for point in near])
        spread = float(weight_P @ spread_P / weight_P.sum()) if weight_P.sum() > 1e-6 else 0.0
        bias = float(weight_P @ error_P / (weight_P.sum() + 1.0))
        return math.log(min(max(1.0 - (spread + bias) / limit, 0.2), 2.0))
