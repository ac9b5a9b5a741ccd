"""Find the plan: uniform plans, the knapsack's frontier, then Optuna over what the additive model gets wrong.

The additive model (``autoq.knapsack``, corrected by ``autoq.loss_model``) proposes, measurements decide. Every
trial is a full assignment whose loss is really measured by ``evaluate``; its time and bytes are sums of the
profile. What Optuna searches are not hundreds of layer choices but the log-multipliers per layer family and per
scheme by which one-layer-at-a-time losses are off, and how much of the budget to spend; the knapsack decodes each
into a near-optimal plan. After every trial the multipliers are fitted again to all measurements, and the plan they
imply is tried.

Everything is kept in the Optuna study, including each single evaluation, and what comes next depends only on the
finished trials: an interrupted search continues as if nothing had happened and repeats no evaluation.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq import studies
from autoq.errors import SearchError
from autoq.knapsack import Assignment, Option, Point, Problem, Solution, Unit, frontier, solve
from autoq.loss_model import LossModel
from autoq.proposals import Proposal, Proposer
from autoq.search_values import (
    Budget,
    Certificate,
    Evaluate,
    Evaluation,
    Objective,
    PlanPoint,
    Progress,
    SearchResult,
    Source,
    hopeless,
    pareto,
)

if TYPE_CHECKING:
    import optuna

__all__ = [
    "Assignment",
    "Budget",
    "Certificate",
    "Evaluate",
    "Evaluation",
    "Objective",
    "Option",
    "PlanPoint",
    "Point",
    "Problem",
    "Progress",
    "SearchResult",
    "Solution",
    "Source",
    "Unit",
    "frontier",
    "retarget",
    "search",
    "solve",
]


def retarget(problem: Problem, budget: Budget) -> Solution:
    """The predicted best plan for another budget, from measurements already made; under a second.

    Args:
        problem: ``SearchResult.refitted``.
        budget: the new budget; its loss limit is compared with the predicted loss, which has no interval.

    Raises:
        SearchError: if the model knows no plan within the limits.
    """
    return budget.solve(problem)


def search(
    problem: Problem,
    *,
    evaluate: Evaluate,
    budget: Budget,
    families: Mapping[str, str],
    uniform: Mapping[str, Assignment],
    storage: str | Path,
    fingerprint: str,
    n_trials: int = 40,
    fidelities: int = 2,
    seed: int = 0,
    study_name: str = "autoq",
    progress: Progress | None = None,
) -> SearchResult:
    """Measure up to ``n_trials`` plans and return the best, with everything learned on the way.

    A plan is measured at fidelity 0, and at the next only while its interval leaves it a chance: not surely over
    the limits, and no fully measured plan is both faster and surely better.

    Args:
        problem: units and options with their modelled time, predicted loss and bytes.
        evaluate: measures the loss of a plan; the same arguments should give the same result.
        budget: objective and limits.
        families: each unit's family (attention, mlp, lm_head, first blocks, …): losses are corrected per family.
        uniform: the uniform plans by name, ``none`` included; all are measured, whatever ``n_trials``.
        storage: where the study is kept: a file's path (or ``journal:PATH``) or any Optuna storage URL.
        fingerprint: identifies weights, tokens and loss. Evaluations of other studies in the storage with the same
            fingerprint are reused; a study for another problem, budget or seed is another study.
        n_trials: different plans to measure in all, the uniform ones and those of an interrupted run included.
        fidelities: how many fidelities ``evaluate`` knows.
        seed: the same seed and the same measurements give the same result.
        study_name: prefix of the study's name; a hash of what the study depends on is appended.
        progress: called after each plan.

    Raises:
        SearchError: if arguments do not fit the problem or the storage cannot be used.
    """
    model = LossModel(problem, families, None if budget.metric == "loss" else budget.max_loss)
    if n_trials < 1 or fidelities < 1:
        raise SearchError(
            "n_trials and fidelities must be at least 1", got=f"n_trials={n_trials}, fidelities={fidelities}"
        )
    for assignment in uniform.values():
        problem.options(assignment)
    opened = studies.open_storage(storage)
    depends_on = {
        "fingerprint": fingerprint,
        "problem": repr(problem),
        "families": sorted(families.items()),
        "uniform": list(uniform.items()),
        "budget": repr(budget),
        "fidelities": fidelities,
        "seed": seed,
    }
    run = _Run(
        study=studies.open_study(opened, study_name, depends_on),
        problem=problem,
        evaluate=evaluate,
        budget=budget,
        model=model,
        proposer=Proposer(budget=budget, model=model, uniform=uniform),
        fidelities=fidelities,
        seed=seed,
        cache=studies.evaluations(opened, fingerprint, fidelities),
    )
    studies.drop_unstarted(run.study)
    while (proposal := run.propose(n_trials)) is not None:
        point = run.measure(proposal)
        if progress is not None:
            seen = len(run.points())
            progress(seen, max(n_trials, seen), _describe(point))
    return run.result()


@dataclass(slots=True, kw_only=True)
class _Run:
    """One worker of a study. Besides the study it has only the cache of evaluations."""

    study: optuna.Study
    problem: Problem
    evaluate: Evaluate
    budget: Budget
    model: LossModel
    proposer: Proposer
    fidelities: int
    seed: int
    cache: dict[tuple[str, int], Evaluation]
    evaluations: int = 0

    def points(self) -> list[PlanPoint]:
        """Every plan measured by a finished trial, once."""
        found: dict[Assignment, PlanPoint] = {}
        for trial in studies.finished(self.study):
            plan = trial.user_attrs["plan"]
            if tuple(plan["assignment"]) not in found:
                fidelity = max(f for f in range(self.fidelities) if f"evaluation:{f}" in trial.user_attrs)
                evaluation = Evaluation.from_json(trial.user_attrs[f"evaluation:{fidelity}"])
                point = self._point(plan, fidelity, evaluation)
                found[point.assignment] = point
        return list(found.values())

    def _point(self, plan: Mapping[str, Any], fidelity: int, evaluation: Evaluation) -> PlanPoint:
        assignment = tuple(plan["assignment"])
        return PlanPoint(
            assignment=assignment,
            label=plan["label"],
            source=plan["source"],
            predicted_loss=plan["predicted_loss"],
            time_us=self.problem.time_us(assignment),
            bytes=self.problem.bytes(assignment),
            evaluation=evaluation,
            fidelity=fidelity,
            full=fidelity == self.fidelities - 1,
        )

    def propose(self, n_trials: int) -> Proposal | None:
        """The next trial; None when done."""
        plans = [trial.user_attrs["plan"] for trial in studies.finished(self.study)]
        return self.proposer.propose(self.points(), plans, n_trials)

    def measure(self, proposal: Proposal) -> PlanPoint:
        """Run one trial: decode it if Optuna chose, evaluate it as far as it deserves, tell the study."""
        from optuna.trial import TrialState

        points = self.points()
        fitted = self.model.fit(points)
        self.study.sampler = studies.sampler(self.seed, len(studies.finished(self.study)))
        if proposal.params is not None:
            self.study.enqueue_trial(dict(proposal.params))
        trial = self.study.ask()
        with contextlib.ExitStack() as stack:
            # Interrupted: the trial fails, its finished evaluations stay in its attributes.
            stack.callback(self.study.tell, trial, state=TrialState.FAIL)
            assignment = proposal.assignment
            if proposal.params is not None or assignment is None:
                ranges = self.proposer.ranges
                params = {name: trial.suggest_float(name, low, high) for name, (low, high) in ranges.items()}
                assignment = assignment or self.proposer.decode(params, fitted, points)
            repeated = any(point.assignment == assignment for point in points)
            # One attribute is one write, and one flush of a journal file.
            plan = {
                "hash": studies.digest(self.problem.schemes(assignment)),
                "assignment": list(assignment),
                "source": proposal.source,
                "label": proposal.label,
                "predicted_loss": self.model.predict(fitted, assignment),
                "repeated": repeated,
            }
            trial.set_user_attr("plan", plan)
            point = self._evaluate(trial, plan, points)
            stack.pop_all()
        if point.full and math.isfinite(point.evaluation.high):
            values = (point.value(self.budget.axis), point.evaluation.loss_delta)
            trial.set_constraint("budget", point.excess(self.budget))
            self.study.tell(trial, values)
        else:
            self.study.tell(trial, state=TrialState.PRUNED)
        return point

    def _evaluate(self, trial: optuna.Trial, plan: Mapping[str, Any], points: Sequence[PlanPoint]) -> PlanPoint:
        """Evaluate at rising fidelity while the plan has a chance; each result is stored before the next."""
        schemes = self.problem.schemes(tuple(plan["assignment"]))
        for fidelity in range(self.fidelities):
            key = (plan["hash"], fidelity)
            if key not in self.cache:
                self.cache[key] = self.evaluate(schemes, fidelity)
                self.evaluations += 1
            trial.set_user_attr(f"evaluation:{fidelity}", self.cache[key].to_json())
            point = self._point(plan, fidelity, self.cache[key])
            if hopeless(point, points, self.budget):
                break
        return point

    def result(self) -> SearchResult:
        points = self.points()
        fitted = self.model.fit(points)
        refitted = self.model.corrected(fitted)
        full = [point for point in points if point.full]
        fitting = sorted(
            (point for point in full if point.excess(self.budget) == 0),
            key=lambda point: (point.value(self.budget.metric), point.evaluation.loss_delta, point.assignment),
        )
        best = fitting[:3]
        finalists = best + [point for point in fitting if point.source == "uniform" and point not in best][:3]
        return SearchResult(
            points=tuple(points),
            pareto=pareto(full, self.budget.axis),
            finalists=tuple(finalists),
            refitted=refitted,
            log_multipliers=fitted,
            certificate=self._certificate(best[0], refitted, full) if best else None,
            evaluations=self.evaluations,
            study_name=self.study.study_name,
        )

    def _certificate(self, best: PlanPoint, refitted: Problem, measured: Sequence[PlanPoint]) -> Certificate | None:
        loss_error = self.model.error(measured)
        if loss_error is None:
            return None
        try:
            bound = self.budget.solve(refitted).bound
        except SearchError:  # the model thinks what was measured impossible: it has no bound to offer
            return None
        value = best.value(self.budget.metric)
        gap = (value - bound) / abs(value) if value else 0.0
        return Certificate(value=value, bound=bound, gap=gap, loss_error=loss_error)


def _describe(point: PlanPoint) -> str:
    stopped = "" if point.full else ", stopped early"
    return f"{point.label}: {point.time_us:.0f} us, loss {point.evaluation.loss_delta:+.4g}{stopped}"
