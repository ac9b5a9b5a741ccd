"""What a search is given and what it returns: the budget, measured plans and what is known of the best one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from autoq.errors import SearchError
from autoq.knapsack import Assignment, Metric, Problem, Solution, solve

Objective = Literal["latency", "memory", "loss"]
FINALISTS = 3
_MODELLED = 0.05  # error of modelled times
_PAIRED_ROWS = 4  # fewer tell nothing of their spread
Source = Literal["uniform", "known", "frontier", "optuna", "local"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What is minimised and within which limits.

    Attributes:
        objective: ``latency`` (microseconds per request), ``memory`` (bytes of weights) or ``loss``.
        max_loss: limit on the loss increase; its upper 95 % bound must be within.
        max_time_us: limit on the microseconds per request.
        max_bytes: limit on the bytes of weights.
    """

    objective: Objective = "latency"
    max_loss: float | None = None
    max_time_us: float | None = None
    max_bytes: float | None = None

    def __post_init__(self) -> None:
        if self.objective not in ("latency", "memory", "loss"):
            raise SearchError("an objective is latency, memory or loss", got=repr(self.objective))
        if not set(self.limits) - {self.metric}:
            raise SearchError(
                "a budget needs a limit on something besides its objective",
                got=self,
                fix="Set max_loss, max_time_us or max_bytes.",
            )
        for metric, limit in self.limits.items():
            if not math.isfinite(limit) or limit < 0:
                raise SearchError("a limit must be a finite number, at least 0", where=metric, got=limit)

    @property
    def metric(self) -> Metric:
        """The objective as the knapsack names it."""
        names: dict[Objective, Metric] = {"latency": "time", "memory": "bytes", "loss": "loss"}
        return names[self.objective]

    @property
    def axis(self) -> Literal["time", "bytes"]:
        """What the loss is traded against on the front."""
        return "bytes" if self.objective == "memory" else "time"

    @property
    def primary(self) -> Metric:
        """The limit that trials vary: the loss where it is limited and not the objective."""
        return next(metric for metric in self.limits if metric != self.metric)

    @property
    def limits(self) -> dict[Metric, float]:
        """The limits that are set, the loss first."""
        all_: tuple[tuple[Metric, float | None], ...] = (
            ("loss", self.max_loss),
            ("time", self.max_time_us),
            ("bytes", self.max_bytes),
        )
        return {metric: limit for metric, limit in all_ if limit is not None}

    def solve(self, problem: Problem, *, target: float = 0.0) -> Solution:
        """The knapsack's best plan within the limits, the primary limit multiplied by ``exp(target)``.

        Raises:
            SearchError: if no plan is within the limits.
        """
        limits = self.limits
        limits[self.primary] *= math.exp(target)
        return _solve(problem, self.metric, limits)

    def nearest(self, problem: Problem) -> Solution:
        """The plan with the least of the primary limit's metric, within the other limits if there is one there."""
        limits = self.limits
        del limits[self.primary]
        try:
            return _solve(problem, self.primary, limits)
        except SearchError:
            return _solve(problem, self.primary, {})


def _solve(problem: Problem, objective: Metric, limits: Mapping[Metric, float]) -> Solution:
    return solve(
        problem,
        objective=objective,
        max_loss=limits.get("loss"),
        max_time_us=limits.get("time"),
        max_bytes=limits.get("bytes"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A plan's measured loss, as paired difference to the unquantized model on the same samples.

    Attributes:
        loss_delta: mean difference; infinite when the plan breaks the model.
        low: lower end of its 95 % interval, resampled by row.
        high: upper end.
        samples: rows measured.
        rows: the differences of which ``loss_delta`` is the mean, in the order of the samples (at most 64 means of
            equal runs of them); plans measured on the same samples are resampled together. Empty if not known.
    """

    loss_delta: float
    low: float
    high: float
    samples: int
    rows: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.low <= self.loss_delta <= self.high:  # NaN fails too
            raise SearchError(
                "a measured loss must be a number within its interval",
                got=f"{self.loss_delta} in [{self.low}, {self.high}]",
                fix="Check what the loss function or eval_fn returns for this plan.",
            )

    @property
    def spread(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2

    def to_json(self) -> dict[str, Any]:
        """The form kept in the study."""
        kept = {name: getattr(self, name) for name in ("loss_delta", "low", "high", "samples")}
        return kept | {"rows": [float(f"{row:.6g}") for row in self.rows]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Evaluation:
        """Read the form kept in the study."""
        kept = {name: value[name] for name in ("loss_delta", "low", "high")}
        return cls(**kept, samples=int(value["samples"]), rows=tuple(value.get("rows", ())))


class Evaluate(Protocol):
    """What the pipeline provides: a plan's measured loss."""

    def __call__(self, schemes: Mapping[str, str], fidelity: int, /) -> Evaluation:
        """Measure the plan with this scheme per layer on the rows of this fidelity, 0 being the fewest."""


Progress = Callable[[int, int, str], None]
"""Called after each plan with plans done, plans meant to be done, and what was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPoint:
    """A plan the search measured.

    Attributes:
        assignment: option index per unit of the problem.
        label: the uniform plan's name, or which step proposed it.
        source: the step of the search that proposed it.
        predicted_loss: what the model, as fitted before this plan was measured, expected.
        time_us: modelled microseconds per request.
        bytes: bytes of weights.
        evaluation: the loss measured at ``fidelity``.
        fidelity: index of the fidelity reached.
        full: whether that was the last one; only then is the plan compared with the budget.
        comparable: whether it was the last or the one before; only then may the plan be part of the front.
    """

    assignment: Assignment
    label: str
    source: Source
    predicted_loss: float
    time_us: float
    bytes: int
    evaluation: Evaluation
    fidelity: int
    full: bool
    comparable: bool = True

    def value(self, metric: Metric) -> float:
        """Modelled time or bytes, measured loss."""
        if metric == "loss":
            return self.evaluation.loss_delta
        return self.time_us if metric == "time" else self.bytes

    def affordable(self, budget: Budget) -> bool:
        """Whether it is within the limits on time and bytes."""
        hard: tuple[Metric, ...] = ("time", "bytes")
        return all(self.value(metric) <= budget.limits.get(metric, math.inf) * (1 + 1e-9) for metric in hard)

    def excess(self, budget: Budget) -> float:
        """By how much it is over the limits, summed and relative to them; in budget when 0.

        The loss counts with its upper 95 % bound.
        """
        total = 0.0
        for metric, limit in budget.limits.items():
            value = self.evaluation.high if metric == "loss" else self.value(metric)
            if value > limit + 1e-9 * limit:
                total += (value - limit) / (limit or 1.0)
        return total

    def fits(self, budget: Budget) -> bool:
        """Whether it was measured on all samples and is in budget."""
        return self.full and self.excess(budget) == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """How far from optimal the best finalist can be, as far as the fitted model is right.

    Attributes:
        value: the best finalist's objective (modelled time, bytes, or measured loss).
        bound: under the fitted model no plan within the limits has a lower one.
        gap: ``(value − bound) / |value|``; negative when the model thought the plan out of reach.
        loss_error: the model's median absolute error of the loss on measured plans, each left out of the fit.
    """

    value: float
    bound: float
    gap: float
    loss_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What the search measured and learned.

    Attributes:
        points: every measured plan, in the order measured.
        pareto: the plans no other one beats in (time or bytes, loss), fastest first, of those that are ``comparable``.
        finalists: at most three best in budget by objective, then up to three best uniform plans in budget.
        refitted: the problem with losses corrected by all measurements, for ``retarget``.
        log_multipliers: the corrections, by ``family:NAME`` and ``scheme:NAME``.
        certificate: None when no plan is in budget, measured or modelled, or too few were measured to say how far
            the model is off.
        evaluations: calls of ``evaluate`` made by this run, all fidelities.
        study_name: the study's name in the storage.
    """

    points: tuple[PlanPoint, ...]
    pareto: tuple[PlanPoint, ...]
    finalists: tuple[PlanPoint, ...]
    refitted: Problem
    log_multipliers: Mapping[str, float]
    certificate: Certificate | None
    evaluations: int
    study_name: str


def hopeless(point: PlanPoint, points: Sequence[PlanPoint], budget: Budget) -> bool:
    """Whether measuring the point further cannot make it a finalist or part of the front of all points."""
    evaluation = point.evaluation
    if not math.isfinite(evaluation.high):
        return True
    # Few rows tell little of their spread, and a bootstrap of them too little.
    width = _widening(len(evaluation.rows)) * (evaluation.loss_delta - evaluation.low)
    if math.isfinite(width):
        low = evaluation.loss_delta - width
        surely = replace(point, evaluation=replace(evaluation, loss_delta=low, low=low, high=low))
        if surely.excess(budget) > 0:
            return True
    # A uniform plan that the model has a little slower may really be the faster one: it is timed.
    margin = 1.0 - _MODELLED if point.source == "uniform" else 1.0
    return any(
        other.comparable
        and other.affordable(budget)
        and other.value(budget.axis) <= margin * point.value(budget.axis)
        and surely_worse(evaluation, other.evaluation)
        for other in points
    )


def promising(point: PlanPoint, points: Sequence[PlanPoint], budget: Budget) -> bool:
    """Whether the point could be among the three best within the limits; uniform plans always may."""
    if point.source == "uniform":
        return True
    best = sorted(one.value(budget.metric) for one in points if one.fits(budget))[:FINALISTS]
    value = point.evaluation.low if budget.metric == "loss" else point.value(budget.metric)
    return len(best) < FINALISTS or value < best[-1]


def surely_worse(one: Evaluation, other: Evaluation) -> bool:
    """Whether a loss exceeds another beyond chance, on the samples that both were measured on."""
    if not math.isfinite(one.loss_delta) or not math.isfinite(other.loss_delta):
        return one.loss_delta > other.loss_delta
    if not one.rows or not other.rows:
        return other.high < one.low
    rows = min(len(one.rows), len(other.rows))
    change = [a - b for a, b in zip(one.rows[:rows], other.rows[:rows], strict=True)]
    spread = statistics.stdev(change) / math.sqrt(rows) if rows > 1 else 0.0
    return statistics.fmean(change) > 1.96 * _widening(rows) * spread and rows >= _PAIRED_ROWS


def _widening(rows: int) -> float:
    """By how much an interval of few rows has to be wider: close to Student's distribution, a little more.

    Infinite where rows are too few to be sure of anything; 1 where it is not known how many there were.
    """
    if rows == 0:
        return 1.0
    return 1.0 + 2.0 / (rows - 1) if rows >= _PAIRED_ROWS else math.inf


def pareto(points: Sequence[PlanPoint], axis: Metric) -> tuple[PlanPoint, ...]:
    """The points no other one beats, fastest (or smallest) first."""
    front: list[PlanPoint] = []
    for point in sorted(points, key=lambda p: (p.value(axis), p.evaluation.loss_delta, p.assignment)):
        if math.isfinite(point.evaluation.loss_delta) and (
            not front or point.evaluation.loss_delta < front[-1].evaluation.loss_delta
        ):
            front.append(point)
    return tuple(front)
