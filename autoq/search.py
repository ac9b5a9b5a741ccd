"""Find the plan: uniform plans, the knapsack's frontier, then Optuna over what the additive model gets wrong.

The additive model (``autoq.knapsack``, corrected by ``autoq.loss_model``) proposes, measurements decide. Every
trial is a full assignment whose loss is really measured by ``evaluate``; its time and bytes are sums of the
profile. What Optuna searches are not hundreds of layer choices but the log-multipliers per layer family and per
scheme by which one-layer-at-a-time losses are off, and how much of the budget to spend; the knapsack decodes each
into a near-optimal plan. After every trial the multipliers are fitted again to all measurements, and the plan they
imply is tried.

Everything is kept in the Optuna study, including each single evaluation, and what comes next depends only on the
finished trials and those being measured: an interrupted search continues as if nothing had happened, any number of
processes share one, and no finished evaluation is repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq import studies
from autoq.definition import Definition, load, publish
from autoq.errors import SearchError
from autoq.knapsack import Assignment, Option, Point, Problem, Solution, Unit, frontier, solve
from autoq.leases import PATIENCE
from autoq.loss_model import LossModel
from autoq.proposals import Proposer
from autoq.search_values import (
    FINALISTS,
    Budget,
    Certificate,
    Evaluate,
    Evaluation,
    Objective,
    PlanPoint,
    Progress,
    SearchResult,
    Source,
    pareto,
)
from autoq.trials import Run

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
    "join",
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
    identity: Mapping[str, str] | None = None,
    recipe: Mapping[str, Any] | None = None,
    patience: int = PATIENCE,
    progress: Progress | None = None,
) -> SearchResult:
    """Measure up to ``n_trials`` plans and return the best, with everything learned on the way.

    A plan is measured at fidelity 0, and at the next only while its interval leaves it a chance: not surely over
    the limits, and no plan is both faster and surely better. The last fidelity is for those that could be among the
    three best within the limits, and for uniform plans.

    Any number of processes may search the same at once, or ``join`` the study: they share the plans among them.

    Args:
        problem: units and options with their modelled time, predicted loss and bytes.
        evaluate: measures the loss of a plan; the same arguments should give the same result.
        budget: objective and limits.
        families: each unit's family (attention, mlp, lm_head, first blocks, …): losses are corrected per family.
        uniform: the uniform plans by name, ``none`` included; all are measured, whatever ``n_trials``.
        storage: where the study is kept: a file's path (or ``journal:PATH``) or any Optuna storage URL.
        fingerprint: identifies weights, tokens and loss. Evaluations of other studies in the storage with the same
            fingerprint are reused; a study for another problem, budget or seed is another study.
        n_trials: different plans to measure in all, the uniform ones and those of an interrupted run included; plans
            that other studies have measured already are not counted.
        fidelities: how many fidelities ``evaluate`` knows.
        seed: the same seed and the same measurements give the same result.
        study_name: prefix of the study's name; a hash of what the study depends on is appended.
        identity: what the fingerprint is made of, in clear, for workers to tell what differs.
        recipe: JSON values with which a worker makes the same ``evaluate``.
        patience: seconds without a sign of life after which another process counts as dead and its plan is retried.
        progress: called after each plan.

    Raises:
        SearchError: if arguments do not fit the problem or the storage cannot be used.
    """
    definition = Definition(
        problem=problem,
        families=families,
        uniform=uniform,
        budget=budget,
        fidelities=fidelities,
        seed=seed,
        fingerprint=fingerprint,
        identity=identity or {},
        recipe=recipe or {},
    )
    _proposer(definition)  # checks the families
    if n_trials < 1 or fidelities < 1:
        raise SearchError(
            "n_trials and fidelities must be at least 1", got=f"n_trials={n_trials}, fidelities={fidelities}"
        )
    for assignment in uniform.values():
        problem.options(assignment)
    with studies.told(storage):
        opened = studies.open_storage(storage, patience)
        definition = replace(definition, known=_known(opened, definition))
        study = publish(opened, study_name, definition, n_trials)
        # What the study was made with counts: more plans may be known by now.
        run = _run(opened, study.study_name, evaluate, patience)
        run.work(lambda: n_trials, progress)
        return _result(run)


def join(
    opened: optuna.storages.BaseStorage,
    study_name: str,
    *,
    evaluate: Evaluate,
    patience: int = PATIENCE,
    progress: Progress | None = None,
) -> SearchResult:
    """Help to search what a study says, until that is done.

    Args:
        opened: the storage, as ``autoq.studies.open_storage`` opens it.
        study_name: the whole name of a study that ``search`` made.
        evaluate: as the study's; see ``autoq.workers``.
        patience: as in ``search``.
        progress: called after each plan measured here.

    Raises:
        SearchError: if the study was made by another version of autoq.
    """
    run = _run(opened, study_name, evaluate, patience)
    run.work(lambda: int(run.study.user_attrs["n_trials"]), progress)
    return _result(run)


def _run(opened: optuna.storages.BaseStorage, study_name: str, evaluate: Evaluate, patience: int) -> Run:
    """One worker of a published study."""
    study, definition = load(opened, study_name)
    return Run(
        study=study,
        storage=opened,
        definition=definition,
        evaluate=evaluate,
        proposer=_proposer(definition),
        patience=patience,
    )


def _proposer(definition: Definition) -> Proposer:
    budget = definition.budget
    limit = None if budget.metric == "loss" else budget.max_loss
    model = LossModel(definition.problem, definition.families, limit)
    return Proposer(budget=budget, model=model, uniform=definition.uniform, known=definition.known)


def _known(opened: optuna.storages.BaseStorage, definition: Definition) -> tuple[Assignment, ...]:
    """Plans of this problem that other studies measured well enough to compare them."""
    problem, found = definition.problem, []
    uniform = set(definition.uniform.values())
    for plan in studies.Evaluations(opened, definition.fingerprint).plans(max(definition.fidelities - 2, 0)):
        assignment = tuple(plan["assignment"])
        same = len(assignment) == len(problem.units) and all(
            index < len(unit.options) for index, unit in zip(assignment, problem.units, strict=True)
        )
        # Another problem's numbers may stand for other schemes.
        if same and assignment not in uniform and studies.digest(problem.schemes(assignment)) == plan["hash"]:
            found.append(assignment)
    return tuple(found)


def _result(run: Run) -> SearchResult:
    points = run.points()
    fitted = run.proposer.model.fit(points)
    refitted = run.proposer.model.corrected(fitted)
    comparable = [point for point in points if point.comparable]
    fitting = sorted(
        (point for point in points if point.fits(run.budget)),
        key=lambda point: (point.value(run.budget.metric), point.evaluation.loss_delta, point.assignment),
    )
    best = fitting[:FINALISTS]
    finalists = best + [point for point in fitting if point.source == "uniform" and point not in best][:FINALISTS]
    return SearchResult(
        points=tuple(points),
        pareto=pareto(comparable, run.budget.axis),
        finalists=tuple(finalists),
        refitted=refitted,
        log_multipliers=fitted,
        certificate=_certificate(run, best[0], refitted, comparable) if best else None,
        evaluations=run.evaluations,
        study_name=run.study.study_name,
    )


def _certificate(run: Run, best: PlanPoint, refitted: Problem, measured: Sequence[PlanPoint]) -> Certificate | None:
    loss_error = run.proposer.model.error(measured)
    if loss_error is None:
        return None
    try:
        bound = run.budget.solve(refitted).bound
    except SearchError:  # the model thinks what was measured impossible: it has no bound to offer
        return None
    value = best.value(run.budget.metric)
    gap = (value - bound) / abs(value) if value else 0.0
    return Certificate(value=value, bound=bound, gap=gap, loss_error=loss_error)
