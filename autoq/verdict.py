"""From the finalists' measured times to the verdict: which plan wins, and the record of why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autoq.additive import Additive
from autoq.evaluation import LossBudget
from autoq.plan import Plan
from autoq.plan_text import finite
from autoq.profiler import LatencyModel, Timing
from autoq.profiler.end_to_end import UNQUANTIZED
from autoq.scheme import NONE, Scheme
from autoq.search import Assignment, Budget, Evaluation, PlanPoint, Problem, SearchResult
from autoq.tables import UNQUANTIZED_LABEL
from autoq.ties import tied
from autoq.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the verdict rests on.

    Attributes:
        search: everything the search measured.
        finalists: label → plan that was timed end to end, the unquantized model aside.
        phase_losses: assignment → phase → loss, of the finalists whose phases differ in their arithmetic; the largest
            is the finalist's.
        times: label → phase → timing of one pass; the unquantized model's under ``UNQUANTIZED``.
        limits: what the search was held to.
        budget: the loss limit as the user was told it.
        latency: predicts times.
        workload: layers and phases.
        scale: brings the search's losses back to the metric's.
        how: phase → how it was compiled.
        none_label: the plan with ``none`` on every layer among ``times``: a finalist where such layers run in autoq's
            kernels, and ``UNQUANTIZED`` where the plan is the unquantized model.
        unquantized_bytes: bytes of the unquantized model's weights.
    """

    search: SearchResult
    finalists: Mapping[str, PlanPoint]
    phase_losses: Mapping[Assignment, Mapping[str, Evaluation]]
    times: Mapping[str, Mapping[str, Timing]]
    limits: Budget
    budget: LossBudget
    latency: LatencyModel
    workload: Workload
    scale: Additive
    how: Mapping[str, str]
    none_label: str
    unquantized_bytes: int

    @property
    def layers(self) -> list[str]:
        """The layers that were decided."""
        return [layer.name for layer in self.workload.quantizable]

    @property
    def none(self) -> PlanPoint:
        """The plan with ``none`` on every layer as the search measured it."""
        wanted = self.search.refitted.uniform(str(NONE))
        return next(point for point in self.search.points if point.assignment == wanted)

    @property
    def unquantized(self) -> PlanPoint:
        """The unquantized model: that plan's loss, by definition, and its own bytes."""
        return replace(self.none, bytes=self.unquantized_bytes)

    @property
    def none_is_stock(self) -> bool:
        """Whether ``none`` leaves every layer as it is."""
        return self.none_label == UNQUANTIZED

    def request_us(self, label: str, field: str = "median_us") -> float:
        """Measured time of one request: the sum over phases of calls × pass."""
        phases = self.workload.phases
        return float(sum(phase.calls * getattr(self.times[label][phase.name], field) for phase in phases))

    def within(self, label: str) -> bool:
        """Whether a finalist meets the limits; its latency counts as measured, not as modelled."""
        point, limits = self.finalists[label], self.limits
        if limits.max_loss is not None and point.evaluation.high > limits.max_loss:
            return False
        if limits.max_bytes is not None and point.bytes > limits.max_bytes:
            return False
        return limits.max_time_us is None or self.request_us(label) <= limits.max_time_us


def layers_of(problem: Problem, point: PlanPoint) -> dict[str, Scheme]:
    """Layer → scheme of a measured plan."""
    return {name: Scheme.parse(text) for name, text in problem.schemes(point.assignment).items()}


def choose(evidence: Evidence) -> str | None:
    """The label of the best finalist within the limits, as measured; None when the unquantized model is no worse."""
    metric, latency = evidence.limits.metric, evidence.limits.objective == "latency"

    def value(label: str) -> float:
        return evidence.request_us(label) if latency else evidence.finalists[label].value(metric)

    good = [label for label in evidence.finalists if evidence.within(label)]
    best = min(good, key=value, default=None)
    unquantized = evidence.request_us(UNQUANTIZED) if latency else evidence.unquantized.value(metric)
    if best is None or (value(best) >= unquantized and none_within(evidence)):
        return None
    return best


def none_within(evidence: Evidence) -> bool:
    """Whether the unquantized model meets the limits on latency and bytes."""
    limits = evidence.limits
    late = limits.max_time_us is not None and evidence.request_us(UNQUANTIZED) > limits.max_time_us
    return not late and (limits.max_bytes is None or evidence.unquantized.bytes <= limits.max_bytes)


def finished_plan(
    evidence: Evidence,
    choice: str | None,
    provenance: Mapping[str, Any],
    kernels: Mapping[str, Mapping[str, str]],
) -> Plan:
    """The plan with its measured and predicted figures.

    The unquantized model's names no layer where layers that are named ``none`` run in autoq's kernels.
    """
    point = evidence.unquantized if choice is None else evidence.finalists[choice]
    stock = choice is None and not evidence.none_is_stock
    layers = {} if stock else layers_of(evidence.search.refitted, point)
    figures = {
        "study": evidence.search.study_name,
        "measured": _measured(evidence, choice, point),
        "predicted": {
            "loss_delta": evidence.scale.back(point.predicted_loss),
            **({} if stock else _predicted_times(evidence, layers)),
            "latency_error": _prediction_errors(evidence),
        },
        "certificate": _certificate(evidence.search),
    }
    phases = {phase.name: phase.calls for phase in evidence.workload.phases}
    units = {} if stock else tied(evidence.search.refitted)
    return Plan(
        layers=layers, units=units, phases=phases, kernels=kernels, provenance=finite({**provenance, **figures})
    )


def _predicted_times(evidence: Evidence, layers: Mapping[str, Scheme]) -> dict[str, Any]:
    latency = evidence.latency
    return {
        "latency_us": latency.request_us(layers, evidence.layers),
        "phases": {name: latency.pass_us(layers, evidence.layers, name) for name in latency.calls},
    }


def _measured(evidence: Evidence, choice: str | None, point: PlanPoint) -> dict[str, Any]:
    label = choice or UNQUANTIZED
    now, before, none = (evidence.times[one] for one in (label, UNQUANTIZED, evidence.none_label))
    own = not evidence.none_is_stock
    by_phase = evidence.phase_losses.get(point.assignment, {})
    return {
        **_losses(evidence, point.evaluation),
        "samples": point.evaluation.samples,
        "baseline_loss": evidence.budget.baseline,
        "latency_us": evidence.request_us(label),
        "baseline_latency_us": evidence.request_us(UNQUANTIZED),
        **({"none_latency_us": evidence.request_us(evidence.none_label)} if own else {}),
        "phases": {
            phase.name: {
                "time_us": now[phase.name].median_us,
                "low_us": now[phase.name].low_us,
                "high_us": now[phase.name].high_us,
                "baseline_us": before[phase.name].median_us,
                "baseline_low_us": before[phase.name].low_us,
                "baseline_high_us": before[phase.name].high_us,
                **({"none_us": none[phase.name].median_us} if own else {}),
                "calls": phase.calls,
                "compiled": evidence.how.get(phase.name, ""),
                **(_losses(evidence, by_phase[phase.name]) if by_phase else {}),
            }
            for phase in evidence.workload.phases
        },
        "weight_bytes": point.bytes,
        "baseline_weight_bytes": evidence.unquantized.bytes,
    }


def _losses(evidence: Evidence, found: Evaluation) -> dict[str, float]:
    """A measured loss with its interval, in the metric's unit."""
    back = evidence.scale.back
    return {"loss_delta": back(found.loss_delta), "loss_low": back(found.low), "loss_high": back(found.high)}


def _prediction_errors(evidence: Evidence) -> dict[str, float]:
    """Largest relative error of predicted over measured time, both as ratios to ``none`` on every layer, per phase."""
    latency, layers = evidence.latency, evidence.layers
    errors = dict.fromkeys(latency.calls, 0.0)
    for label, point in evidence.finalists.items():
        plan = layers_of(evidence.search.refitted, point)
        for phase in errors:
            predicted = latency.pass_us(plan, layers, phase) / latency.pass_us({}, layers, phase)
            measured = evidence.times[label][phase].median_us / evidence.times[evidence.none_label][phase].median_us
            errors[phase] = max(errors[phase], abs(predicted / measured - 1))
    return errors


def _certificate(result: SearchResult) -> dict[str, float] | None:
    found = result.certificate
    if found is None:
        return None
    return {"value": found.value, "bound": found.bound, "gap": found.gap, "loss_error": found.loss_error}


def front_rows(evidence: Evidence, choice: str | None) -> list[dict[str, Any]]:
    """One row of the front's table per plan that was measured, and one of the unquantized model if that is none."""
    problem = evidence.search.refitted
    none = evidence.none
    timed = {point.assignment: label for label, point in evidence.finalists.items()}
    timed |= {none.assignment: evidence.none_label}
    winner = evidence.none_label if choice is None and evidence.none_is_stock else choice
    rows = []
    for point in evidence.search.points:
        label = timed.get(point.assignment)
        rows.append(
            {
                "plan": Plan(layers=layers_of(problem, point)).hash,
                "source": point.source,
                "label": point.label if point.source == "uniform" else "",
                "loss_predicted": evidence.scale.back(point.predicted_loss),
                **_losses(evidence, point.evaluation),
                "samples": point.evaluation.samples,
                "latency_predicted_us": point.time_us,
                **_latencies(evidence, label),
                "weight_bytes": point.bytes,
                "in_budget": point.full and point.excess(evidence.limits) == 0,
                "pareto": point in evidence.search.pareto,
                "chosen": label is not None and label == winner and point.full,
                "assignment": json.dumps(problem.schemes(point.assignment)),
            }
        )
    if not evidence.none_is_stock:
        rows.append(_unquantized_row(evidence, next(row for row in rows if row["label"] == str(NONE)), choice))
    return rows


def _latencies(evidence: Evidence, label: str | None) -> dict[str, float | None]:
    columns = {"latency_measured_us": "median_us", "latency_low_us": "low_us", "latency_high_us": "high_us"}
    return {name: None if label is None else evidence.request_us(label, field) for name, field in columns.items()}


def _unquantized_row(evidence: Evidence, none: Mapping[str, Any], choice: str | None) -> dict[str, Any]:
    """The unquantized model's row from that of ``none`` on every layer; its predicted time is on the same scale."""
    slower = evidence.request_us(UNQUANTIZED) / evidence.request_us(evidence.none_label)
    return {
        **none,
        **_latencies(evidence, UNQUANTIZED),
        "plan": Plan(layers={}).hash,
        "label": UNQUANTIZED_LABEL,
        "latency_predicted_us": none["latency_predicted_us"] * slower,
        "weight_bytes": evidence.unquantized.bytes,
        "in_budget": none_within(evidence),
        "pareto": False,
        "chosen": choice is None,
        "assignment": "{}",
    }
