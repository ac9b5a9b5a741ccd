"""What others do: Optuna's samplers on raw assignments, one categorical choice per layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna

from autoq import studies
from autoq.errors import InputError
from autoq.search import Assignment
from search_bench.fronts import Plan
from search_bench.frozen import Frozen

SAMPLERS = ("nsga2", "tpe")
_POPULATION = 20  # Optuna's 50 would leave 100 trials two generations

Measure = Callable[[Assignment], float]


def open_study(folder: Path, sampler: str, seed: int) -> optuna.Study:
    """The study of one sampler and seed in the folder, made if it is not there."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=studies.open_storage(folder / f"{sampler}-{seed}.journal"),
        study_name=f"{sampler}-{seed}",
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )


def make_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """A fresh sampler.

    Raises:
        InputError: if it is none of ``SAMPLERS``.
    """
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=_POPULATION)
    raise InputError("a baseline is nsga2 or tpe", got=repr(name))


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that have values, in order."""
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))


def step(study: optuna.Study, sampler: str, seed: int, frozen: Frozen, measure: Measure) -> optuna.trial.FrozenTrial:
    """One more trial: a uniform plan while there is one left, else the sampler's; a repeated plan costs one too."""
    done = finished(study)
    _drop_unstarted(study)
    # Reseeded by the number of trials: a resumed study does not draw again what it drew first.
    study.sampler = make_sampler(sampler, 1000 * seed + len(done))
    uniform = list(frozen.uniform.values())
    if len(done) < len(uniform):
        study.enqueue_trial(dict(zip(_names(frozen), _labels(frozen, uniform[len(done)]), strict=True)))
    trial = study.ask()
    assignment = tuple(
        _index(frozen, position, trial.suggest_categorical(name, _choices(frozen, position)))
        for position, name in enumerate(_names(frozen))
    )
    loss = measure(assignment)
    study.tell(trial, (frozen.ratio(assignment), loss))
    return finished(study)[-1]


def plans(study: optuna.Study, frozen: Frozen) -> list[Plan]:
    """What the trials measured, in order, at the problem's times."""
    found = []
    for trial in finished(study):
        assignment = frozen.problem.assignment(trial.params)
        found.append(Plan(ratio=frozen.ratio(assignment), loss=trial.values[1]))
    return found


def _names(frozen: Frozen) -> list[str]:
    return [unit.name for unit in frozen.problem.units]


def _choices(frozen: Frozen, position: int) -> list[str]:
    return [option.scheme for option in frozen.problem.units[position].options]


def _index(frozen: Frozen, position: int, scheme: str) -> int:
    return _choices(frozen, position).index(scheme)


def _labels(frozen: Frozen, assignment: Assignment) -> list[str]:
    return [option.scheme for option in frozen.problem.options(assignment)]


def _drop_unstarted(study: optuna.Study) -> None:
    """Fail the trials that a stopped run left waiting."""
    while study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)):
        study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
