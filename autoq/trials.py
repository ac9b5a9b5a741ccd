"""The trials of a study, as one of its workers runs them.

A worker queues a trial with the plan that should come next, and lets Optuna run whichever trial waits longest. So a
plan is claimed the moment its trial is there, and of two workers that claim the same the second gives way. Trials of
workers that died are failed and their plans queued again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autoq import leases, studies
from autoq.definition import Definition
from autoq.errors import SearchError
from autoq.knapsack import Assignment, Problem
from autoq.proposals import Proposal, Proposer
from autoq.search_values import Budget, Evaluate, Evaluation, PlanPoint, Progress, hopeless, promising

if TYPE_CHECKING:
    import optuna

# Parameters drawn in a row whose plans other workers are measuring.
_DRAWS = 8
# Processes that die with one plan before the others stop giving it to the next.
_DEATHS = 5


class _NotMine(Exception):  # noqa: N818 - no error: another worker measures the plan
    """The trial that Optuna started is none to be measured."""


@dataclass(slots=True, kw_only=True)
class Run:
    """One worker of a study. Besides the study it has only what it measured itself.

    Attributes:
        study: the study.
        storage: where it is kept.
        definition: what it searches.
        evaluate: measures the loss of a plan.
        proposer: says which plan comes next.
        patience: seconds without a sign of life after which another worker counts as dead.
        evaluations: calls of ``evaluate`` made.
    """

    study: optuna.Study
    storage: optuna.storages.BaseStorage
    definition: Definition
    evaluate: Evaluate
    proposer: Proposer
    patience: int
    evaluations: int = 0
    _known: studies.Evaluations = field(init=False)
    _watch: leases.Watch = field(init=False)
    _before: int = field(init=False)  # trials that were there already
    _measured: PlanPoint | None = field(default=None, init=False)
    _failure: BaseException | None = field(default=None, init=False)
    _handed_back: tuple[Mapping[str, Any], Mapping[str, float], Mapping[str, Any]] | None = field(
        default=None, init=False
    )

    def __post_init__(self) -> None:
        self._known = studies.Evaluations(self.storage, self.definition.fingerprint)
        self._watch = leases.Watch(self.study, self.patience)
        self._before = len(self.study.get_trials(deepcopy=False))

    @property
    def problem(self) -> Problem:
        """The study's."""
        return self.definition.problem

    @property
    def budget(self) -> Budget:
        """The study's."""
        return self.definition.budget

    def work(self, n_trials: Callable[[], int], progress: Progress | None) -> None:
        """Measure plans until there are none left to propose and nobody measures one."""
        while True:
            self._watch.reap()
            self._check_deaths()
            if studies.is_queue_empty(self.study):
                others = list(studies.pending(self.study).values())
                if not self._claim(n_trials(), others):
                    if not others:
                        break
                    time.sleep(min(5.0, self.patience / 20))
                    continue
            point = self._measure()
            if point is not None and progress is not None:
                points = self.points()
                progress(len(points), max(n_trials(), len(points)), self._told(point, points))
        studies.say_state(self.study, "done")

    def _told(self, point: PlanPoint, points: Sequence[PlanPoint]) -> str:
        """What was measured last, and the best so far, for people."""
        stopped = "" if point.full else ", stopped early"
        fitting = [one for one in points if one.fits(self.budget)]
        best = min(fitting, key=lambda one: one.value(self.budget.metric), default=None)
        if best is None:
            return f"{_figures(point)}{stopped}; none within the budget so far"
        none = self.definition.uniform.get("none")
        gain = "" if none is None else f", {self.problem.time_us(none) / best.time_us:.2f} × as fast as none"
        return f"{_figures(point)}{stopped}; best so far {_figures(best)}{gain}"

    def _check_deaths(self) -> None:
        """Stop where a plan kills whoever measures it, rather than let it kill every worker that there is."""
        label, deaths = studies.deadliest(self.study, self._before)
        if deaths >= _DEATHS:
            raise SearchError(
                "a process that measures a plan lives to its end",
                where=label,
                got=f"{deaths} that died with this plan while this process was searching",
                fix="Look whether they ran out of memory, and start again: what was measured is kept.",
            )

    def points(self) -> list[PlanPoint]:
        """Every plan measured by a finished trial, once, as it was measured best; in the order they were started."""
        found: dict[Assignment, PlanPoint] = {}
        for trial in studies.finished(self.study):
            plan = trial.user_attrs["plan"]
            fidelity = max(f for f in range(self.definition.fidelities) if f"evaluation:{f}" in trial.user_attrs)
            evaluation = Evaluation.from_json(trial.user_attrs[f"evaluation:{fidelity}"])
            point = self._point(plan, fidelity, evaluation)
            if point.assignment not in found or found[point.assignment].fidelity < fidelity:
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
            full=fidelity == self.definition.fidelities - 1,
            comparable=fidelity >= self.definition.fidelities - 2,
        )

    def _claim(self, n_trials: int, pending: Sequence[Mapping[str, Any]]) -> bool:
        """Queue the next plan; False when done, or when what others are measuring has to be known first."""
        trials = studies.finished(self.study)
        points = self.points()
        proposal = self.proposer.propose(points, [trial.user_attrs["plan"] for trial in trials], n_trials, pending)
        if proposal is None:
            return False
        studies.say_state(self.study, "measuring")
        fitted = self.proposer.model.fit(points)
        ranges = self.proposer.ranges
        taken = {tuple(plan["assignment"]) for plan in pending}
        for attempt in range(_DRAWS):
            assignment, params = proposal.assignment, proposal.params
            if params is None and assignment is None:
                seed = [self.definition.seed, len(trials), *([len(pending), attempt] if pending else [])]
                params = studies.draw(trials, ranges, seed, self.budget.axis)
            if assignment is None:
                assignment = self.proposer.decode(params or {}, fitted, points)
            if assignment not in taken:
                plan = self._plan(proposal, assignment, fitted, points)
                leases.queue(self.study, plan, params or {}, studies.distributions(ranges) if params else {})
                return True
        return False

    def _plan(
        self, proposal: Proposal, assignment: Assignment, fitted: Mapping[str, float], points: Sequence[PlanPoint]
    ) -> dict[str, Any]:
        """What a trial notes of its plan."""
        return {
            "hash": studies.digest(self.problem.schemes(assignment)),
            "assignment": list(assignment),
            "source": proposal.source,
            "label": proposal.label,
            "predicted_loss": self.proposer.model.predict(fitted, assignment),
            "repeated": any(point.assignment == assignment for point in points),
        }

    def _measure(self) -> PlanPoint | None:
        """Measure the next queued plan; None if another worker has it, or took it away."""
        from optuna.exceptions import UpdateFinishedTrialError

        self._measured = self._failure = None
        try:
            with studies.quiet():
                self.study.optimize(self._objective, n_trials=1, catch=(_NotMine,))
        except (ValueError, UpdateFinishedTrialError):
            if self._failure is not None:
                raise
            return None  # this process slept for longer than others wait, and its trial was failed meanwhile
        except KeyboardInterrupt:
            if self._handed_back is not None:
                leases.queue(self.study, *self._handed_back)
            raise
        return self._measured

    def _objective(self, trial: optuna.Trial) -> tuple[float, float]:
        from optuna.exceptions import TrialPruned, UpdateFinishedTrialError

        plan = trial.user_attrs.get("plan")
        others = studies.pending(self.study)
        if plan is None or any(n < trial.number and one["hash"] == plan["hash"] for n, one in others.items()):
            raise _NotMine
        try:
            point = self._evaluate(trial, plan)
        except UpdateFinishedTrialError:
            raise  # it was taken away
        except KeyboardInterrupt:
            self._handed_back = (plan, trial.params, trial.distributions)
            raise
        except BaseException as problem:
            self._failure = problem
            raise
        self._measured = point
        if point.full and math.isfinite(point.evaluation.high):
            trial.set_constraint("budget", point.excess(self.budget))
            return point.value(self.budget.axis), point.evaluation.loss_delta
        for metric in ("time", "bytes", "loss"):
            trial.set_user_attr(f"value:{metric}", point.value(metric))
        raise TrialPruned

    def _evaluate(self, trial: optuna.Trial, plan: Mapping[str, Any]) -> PlanPoint:
        """Evaluate at rising fidelity while the plan has a chance; each result is stored before the next."""
        schemes = self.problem.schemes(tuple(plan["assignment"]))
        with leases.Lease(trial, self.storage, self.patience):
            for fidelity in range(self.definition.fidelities):
                evaluation = self._known.find(plan["hash"], fidelity)
                if evaluation is None and plan["source"] == "known" and fidelity:
                    break  # it costs nothing; what it promises is seen from the rest
                if evaluation is None:
                    evaluation = self.evaluate(schemes, fidelity)
                    self.evaluations += 1
                    self._known.keep(plan["hash"], fidelity, evaluation)
                trial.set_user_attr(f"evaluation:{fidelity}", evaluation.to_json())
                point = self._point(plan, fidelity, evaluation)
                points = self.points()
                if hopeless(point, points, self.budget):
                    break
                if point.comparable and not promising(point, points, self.budget):
                    break
        return point


def _figures(point: PlanPoint) -> str:
    size = f"{point.time_us / 1e3:.4g} ms, {point.bytes / 1e6:.1f} MB"
    return f"{point.label}: {size}, loss {point.evaluation.loss_delta:+.4g}"
