"""The search's Optuna study: where it is kept, and what it remembers of plans measured."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from autoq import leases
from autoq.errors import SearchError
from autoq.journal import open_journal
from autoq.knapsack import Metric
from autoq.search_values import Evaluation

if TYPE_CHECKING:
    import optuna

# Optuna's modules that report each trial, and each study made.
_TALKERS = (
    "optuna.study.study",
    "optuna.study._optimize",
    "optuna.storages._in_memory",
    "optuna.storages._rdb.storage",
    "optuna.storages.journal._storage",
)

# Of workers that start together in an empty database one makes the tables, over which the others may trip.
_OPENINGS = 3


def digest(value: object) -> str:
    """Hash of a JSON value, as hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# -- storage -----------------------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's reports on this thread's trials out of the log."""
    thread = threading.get_ident()

    def foreign(record: logging.LogRecord) -> bool:
        return record.thread != thread

    for name in _TALKERS:
        logging.getLogger(name).addFilter(foreign)
    try:
        yield
    finally:
        for name in _TALKERS:
            logging.getLogger(name).removeFilter(foreign)


def open_storage(storage: str | Path, patience: int = leases.PATIENCE) -> optuna.storages.BaseStorage:
    """An Optuna storage from a URL, or a journal file from a path.

    Args:
        storage: URL, path, or ``journal:PATH``.
        patience: seconds without a heartbeat after which a database's trial counts as a dead worker's; at least 2.

    Raises:
        SearchError: if the storage cannot be opened.
    """
    if isinstance(storage, str) and "://" in storage:
        return _open_database(storage, patience)
    return open_journal(Path(str(storage).removeprefix("journal:")))


def _open_database(url: str, patience: int) -> optuna.storages.BaseStorage:
    import optuna
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

    arguments: dict[str, Any] = {"pool_pre_ping": True}  # connections may drop while a plan is measured
    if url.startswith("postgresql+psycopg") and "connect_timeout" not in url:
        arguments["connect_args"] = {"connect_timeout": 10}
    failures = (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, ValueError, LookupError, RuntimeError)
    for attempt in range(_OPENINGS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of heartbeats
                database = optuna.storages.RDBStorage(
                    url,
                    engine_kwargs=arguments,
                    heartbeat_interval=max(1, patience // 2),
                    grace_period=max(2, patience),
                    heartbeat_stale_trial_callback=leases.retry,
                )
                return optuna.storages.get_storage(database)
        except failures as problem:
            tripped = isinstance(problem, IntegrityError | ProgrammingError) or "already exists" in str(problem)
            if not tripped or attempt == _OPENINGS - 1:
                reachable = not isinstance(problem, OperationalError)
                raise SearchError(
                    "the storage must be a database URL" if reachable else "the study's database must be reachable",
                    where=without_password(url),
                    got=f"{type(problem).__name__}: {_first_line(problem)}",
                    fix="A file is journal:PATH, a database postgresql+psycopg://USER:PASSWORD@HOST/DATABASE; its "
                    "driver comes with pip install 'autoq[postgres]'.",
                ) from problem
            time.sleep(0.2 + attempt)
    raise AssertionError("the last attempt returned or raised")


def _first_line(problem: BaseException) -> str:
    return next(iter(str(problem).strip().splitlines()), "")


def without_password(storage: str | Path) -> str:
    """A storage's URL as it may be shown."""
    return re.sub(r"([?&]password=)[^&]*", r"\1***", re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", str(storage)))


class told:  # noqa: N801 - used as a function
    """Turn what a database says when it fails amid a search into an error that names it.

    Args:
        storage: as it was given.

    Raises:
        SearchError: in place of Optuna's own.
    """

    def __init__(self, storage: str | Path) -> None:
        self._storage = storage

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = _storage_failure(problem) if isinstance(problem, Exception) else None
        if failed is not None:
            raise SearchError(
                "the study's database must answer",
                where=without_password(self._storage),
                got=_first_line(failed.__cause__ or failed),
                fix="What was measured is kept; start again when the database is back.",
            ) from problem


def _storage_failure(problem: BaseException | None) -> BaseException | None:
    """The database's failure behind an exception; Optuna trips over itself when it cannot tell a trial's end."""
    from optuna.exceptions import StorageInternalError

    while problem is not None and not isinstance(problem, StorageInternalError):
        problem = problem.__cause__ or problem.__context__
    return problem


# -- trials ------------------------------------------------------------------------------------------------------------


def say_state(study: optuna.Study, state: str) -> None:
    """Note in the study whether it is ``measuring`` or ``done``."""
    if study.user_attrs.get("state") != state:
        study.set_user_attr("state", state)


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that measured a plan, in the order they were started."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [trial for trial in trials if "plan" in trial.user_attrs]  # others were added by hand


def pending(study: optuna.Study) -> dict[int, dict[str, Any]]:
    """The plans that are being measured or wait for it, by the trial's number."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING))
    return {trial.number: trial.user_attrs["plan"] for trial in trials if "plan" in trial.user_attrs}


def deadliest(study: optuna.Study, since: int) -> tuple[str, int]:
    """The plan that most processes died with, or handed back, among trials from a number on: (its label, how many)."""
    from optuna.trial import TrialState

    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    # Without a lease the trial was a second claim of a plan: nobody began to measure it.
    lost = [
        one.user_attrs["plan"] for one in failed if one.number >= since and {"plan", "lease"} <= one.user_attrs.keys()
    ]
    counts = Counter(plan["hash"] for plan in lost)
    worst, deaths = max(counts.items(), key=lambda item: item[1], default=("", 0))
    return next((plan["label"] for plan in lost if plan["hash"] == worst), ""), deaths


def is_queue_empty(study: optuna.Study) -> bool:
    """Whether no trial waits for a worker."""
    from optuna.trial import TrialState

    return not study.get_trials(deepcopy=False, states=(TrialState.WAITING,))


def distributions(ranges: Mapping[str, tuple[float, float]]) -> dict[str, optuna.distributions.BaseDistribution]:
    """Optuna's form of the parameters' ranges."""
    from optuna.distributions import FloatDistribution

    return {name: FloatDistribution(low, high) for name, (low, high) in ranges.items()}


def draw(
    trials: Sequence[optuna.trial.FrozenTrial], ranges: Mapping[str, tuple[float, float]], seed: object, axis: Metric
) -> dict[str, float]:
    """The parameters that TPE tries after these trials: a function of them and the seed, whoever else is running."""
    import optuna

    sampler = optuna.samplers.TPESampler(seed=int(digest(seed)[:8], 16), constant_liar=False)
    with quiet():
        scratch = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        scratch.add_trials([_completed(trial, axis) for trial in trials])
        trial = scratch.ask()
        return {name: trial.suggest_float(name, low, high) for name, (low, high) in ranges.items()}


def _completed(trial: optuna.trial.FrozenTrial, axis: Metric) -> optuna.trial.FrozenTrial:
    """A trial that stopped early, with the values measured until then, as one to learn from."""
    import optuna

    values = [trial.user_attrs.get(f"value:{metric}", math.inf) for metric in (axis, "loss")]
    if trial.state != optuna.trial.TrialState.PRUNED or not all(map(math.isfinite, values)):
        return trial
    params, known = trial.params, trial.distributions
    return optuna.trial.create_trial(values=values, params=params, distributions=known)


class Evaluations:
    """What was measured in any study of a storage with one fingerprint, unfinished trials included.

    Args:
        storage: the storage.
        fingerprint: identifies weights, tokens and loss.
    """

    def __init__(self, storage: optuna.storages.BaseStorage, fingerprint: str) -> None:
        self._storage = storage
        self._fingerprint = fingerprint
        self._studies: dict[str, optuna.Study | None] = {}
        self._known: dict[tuple[str, int], Evaluation] = {}

    def find(self, plan: str, fidelity: int) -> Evaluation | None:
        """A plan's evaluation, by its hash, as the storage has it now."""
        if (plan, fidelity) not in self._known:
            self._read()
        return self._known.get((plan, fidelity))

    def plans(self, fidelity: int) -> list[dict[str, Any]]:
        """What the trials noted of the plans that were measured at a fidelity, the oldest first, each once."""
        self._read()
        found: dict[str, dict[str, Any]] = {}
        for study in filter(None, self._studies.values()):
            for trial in study.get_trials(deepcopy=False):
                if f"evaluation:{fidelity}" in trial.user_attrs:
                    found.setdefault(trial.user_attrs["plan"]["hash"], trial.user_attrs["plan"])
        return list(found.values())

    def keep(self, plan: str, fidelity: int, evaluation: Evaluation) -> None:
        """Remember one made here."""
        self._known[plan, fidelity] = evaluation

    def _read(self) -> None:
        import optuna

        for name in optuna.get_all_study_names(self._storage):
            if name not in self._studies:
                study = optuna.load_study(study_name=name, storage=self._storage)
                fingerprint = study.user_attrs.get("fingerprint")
                if fingerprint is None:
                    continue  # just being made
                self._studies[name] = study if fingerprint == self._fingerprint else None
        for study in filter(None, self._studies.values()):
            for trial in study.get_trials(deepcopy=False):
                self._take(trial.user_attrs)

    def _take(self, said: Mapping[str, Any]) -> None:
        for key, value in said.items():
            if key.startswith("evaluation:"):
                place = (said["plan"]["hash"], int(key.removeprefix("evaluation:")))
                if place not in self._known:
                    self._known[place] = Evaluation.from_json(value)
