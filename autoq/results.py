"""What ``tune`` was asked and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq import search, tables
from autoq.additive import Additive
from autoq.candidates import Candidate, Packed
from autoq.cost_figures import times_figure
from autoq.errors import InputError
from autoq.evaluation import EvalFn, loss_budget
from autoq.figures import front_figure, heatmap
from autoq.losses import LossFn
from autoq.modules import FilterFn
from autoq.plan import Plan
from autoq.scheme import Scheme
from autoq.search import Budget, Problem
from autoq.ties import tied
from autoq.workload import Workload

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# What a retargeted plan does not know of itself.
_UNKNOWN = ("measured", "predicted", "certificate", "decoding")
TRIALS = 26  # plans whose loss is measured at most, unless told otherwise: 18 beside eight uniform ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user asked for; ``tune`` describes each field."""

    loss_fn: LossFn | None = None
    eval_fn: EvalFn | None = None
    candidates: tuple[Candidate, ...] = ()
    max_degradation: float = 0.01
    max_increase: float | None = None
    objective: search.Objective = "latency"
    max_latency_us: float | None = None
    max_weight_bytes: int | None = None
    cache_dir: Path | None = None
    profile_from: str | None = None
    filter_fn: FilterFn | None = None
    n_trials: int = TRIALS
    storage: str | None = None
    ties: tuple[str, ...] = ()
    kv_cache: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in ("latency", "memory", "loss"):
            raise InputError("objective is latency, memory or loss", got=repr(self.objective))
        if self.objective == "loss" and self.max_latency_us is None and self.max_weight_bytes is None:
            raise InputError(
                "objective='loss' needs something that limits it",
                fix="Pass max_latency_us= or max_weight_bytes=.",
            )
        if self.n_trials < 1:
            raise InputError("n_trials is at least 1", got=self.n_trials)
        # Now, and not after minutes of measuring.
        for name in ("max_degradation", "max_increase", "max_latency_us", "max_weight_bytes"):
            limit = getattr(self, name)
            if limit is not None and not 0 <= limit < math.inf:
                raise InputError("a limit is a finite number, at least 0", where=name, got=limit)

    def request(self) -> dict[str, float | int | str | list[str] | None]:
        """What a plan file is compared with when it is replayed."""
        return {
            "max_degradation": self.max_degradation,
            "max_increase": self.max_increase,
            "objective": self.objective,
            "max_latency_us": self.max_latency_us,
            "max_weight_bytes": self.max_weight_bytes,
            "ties": list(self.ties) or None,
            **({"kv_cache": list(self.kv_cache)} if self.kv_cache else {}),
        }


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What ``tune`` measured and decided.

    Attributes:
        plan: the chosen plan, with its provenance.
        workload: what was recorded.
        notes: what autoq decided by itself, in sentences.
        front_rows: rows of the front's table.
        measurement_rows: rows of the measurements' table.
        sensitivity_rows: rows of the sensitivity table.
        cost_rows: rows of the costs' table.
        problem: the additive model of loss, time and bytes, corrected by all measurements.
        budget: what the search was held to.
        scale: on which losses of layers add up, that of ``problem`` and ``budget``.
        metric: what plans were judged by.
        baseline_loss: the unquantized model's mean loss.
        packed: layer → packed weight of the plan, as far as they are still in memory; applying them costs nothing.
    """

    plan: Plan
    workload: Workload
    notes: tuple[str, ...]
    front_rows: Sequence[Mapping[str, Any]]
    measurement_rows: Sequence[Mapping[str, Any]]
    sensitivity_rows: Sequence[Mapping[str, Any]]
    problem: Problem
    budget: Budget
    scale: Additive
    metric: str
    baseline_loss: float
    cost_rows: Sequence[Mapping[str, Any]] = ()
    packed: Mapping[str, Packed] = field(default_factory=dict, repr=False)

    @cached_property
    def front(self) -> pd.DataFrame:
        """Every plan that was evaluated (columns of ``tables.FRONT``)."""
        return tables.frame(self.front_rows, tables.FRONT)

    @cached_property
    def measurements(self) -> pd.DataFrame:
        """Times of single layers (columns of ``tables.MEASUREMENTS``)."""
        return tables.frame(self.measurement_rows, tables.MEASUREMENTS)

    @cached_property
    def sensitivity(self) -> pd.DataFrame:
        """What each scheme costs on each layer (columns of ``tables.SENSITIVITY``)."""
        return tables.frame(self.sensitivity_rows, tables.SENSITIVITY)

    @cached_property
    def costs(self) -> pd.DataFrame:
        """What the search took each scheme on each layer to cost (columns of ``tables.COSTS``)."""
        return tables.frame(self.cost_rows, tables.COSTS)

    def plot_front(self) -> Figure:
        """The measured trade-off; see ``figures.front_figure``."""
        return front_figure(self.front, self.plan.provenance.get("budget") or {})

    def plot_sensitivity(self) -> Figure:
        """Where each scheme hurts; see ``figures.heatmap``."""
        return heatmap(self.sensitivity, unit=str((self.plan.provenance.get("budget") or {}).get("unit", "")))

    def plot_times(self) -> Figure:
        """How long each kind of layer takes under each scheme; see ``cost_figures.times_figure``."""
        return times_figure(self.costs)

    def retarget(
        self,
        *,
        max_degradation: float | None = None,
        max_increase: float | None = None,
        objective: search.Objective | None = None,
        max_latency_us: float | None = None,
        max_weight_bytes: int | None = None,
    ) -> Plan:
        """The best plan for another budget, from what was measured already: under a second, nothing runs.

        The plan's figures are predictions and marked so; ``autoq.measure`` verifies them.

        Args:
            max_degradation: as in ``tune``; by default the loss limit stays. Not for a KL divergence.
            max_increase: as in ``tune``.
            objective: as in ``tune``; by default unchanged.
            max_latency_us: as in ``tune``.
            max_weight_bytes: as in ``tune``.

        Raises:
            InputError: if a limit is not usable for the metric.
            SearchError: if no plan is predicted to be within the limits.
        """
        if self.metric == "kl" and max_degradation is not None and max_increase is None:
            raise InputError(
                "a KL divergence has no baseline that max_degradation could be relative to",
                got=max_degradation,
                fix="Pass max_increase= in nats.",
            )
        limit = self.budget.max_loss
        if max_degradation is not None or max_increase is not None:
            found = loss_budget(
                self.metric, self.baseline_loss, max_degradation=max_degradation or 0.0, max_increase=max_increase
            )
            limit = self.scale.to(found.max_increase)
        objective = objective or self.budget.objective
        budget = Budget(
            objective=objective,
            max_loss=None if objective == "loss" else limit,
            max_time_us=max_latency_us,
            max_bytes=max_weight_bytes,
        )
        solution = search.retarget(self.problem, budget)
        layers = {name: Scheme.parse(text) for name, text in self.problem.schemes(solution.assignment).items()}
        kept = {k: v for k, v in self.plan.provenance.items() if k not in _UNKNOWN}
        predicted = {
            "loss_delta": self.scale.back(self.problem.loss(solution.assignment)),
            "latency_us": self.problem.time_us(solution.assignment),
            "weight_bytes": self.problem.bytes(solution.assignment),
        }
        limits = kept["budget"] | {
            "objective": objective,
            "max_increase": None if limit is None else self.scale.back(limit),
            "max_latency_us": max_latency_us,
            "max_weight_bytes": max_weight_bytes,
        }
        return replace(
            self.plan,
            layers=layers,
            units=tied(self.problem),
            provenance=kept | {"budget": limits, "predicted": predicted, "retargeted": True},
        )
