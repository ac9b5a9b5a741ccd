"""The search's Optuna study: where it is kept, and what it remembers of plans measured before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq.errors import SearchError
from autoq.search_values import Evaluation

if TYPE_CHECKING:
    import optuna


def digest(value: object) -> str:
    """Hash of a JSON value, as hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sampler(seed: int, finished: int) -> optuna.samplers.BaseSampler:
    """TPE seeded by the number of finished trials, so that a resumed study draws what it would have drawn."""
    import optuna

    # A worker that died leaves its trial running; the liar would count it.
    return optuna.samplers.TPESampler(seed=int(digest([seed, finished])[:8], 16), constant_liar=False)


def open_storage(storage: str | Path) -> optuna.storages.BaseStorage:
    """An Optuna storage from a URL, or a journal file from a path.

    Raises:
        SearchError: if the file cannot be written or is no journal.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if isinstance(storage, str) and "://" in storage:
        return optuna.storages.get_storage(storage)
    path = Path(str(storage).removeprefix("journal:"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        backend = JournalFileBackend(str(path))
        _mend(path)
        return JournalStorage(backend)
    except (OSError, ValueError) as problem:
        raise SearchError(
            "the study's file must be a writable Optuna journal",
            where=str(path),
            got=f"{type(problem).__name__}: {problem}",
            fix="Choose another path, or remove the file to start over.",
        ) from problem


def _mend(path: Path) -> None:
    """Drop the journal's last line if a killed process left it unfinished: Optuna would refuse the whole file."""
    from optuna.storages.journal import JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        with path.open("r+b") as stream:
            content = stream.read()
            if content and not content.endswith(b"\n"):
                stream.truncate(content.rfind(b"\n") + 1)
    finally:
        lock.release()


def open_study(storage: optuna.storages.BaseStorage, prefix: str, depends_on: Mapping[str, Any]) -> optuna.Study:
    """Open or create the study whose name ends in a hash of what it depends on, its fingerprint among it."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(level, optuna.logging.WARNING))  # creating a study logs a line
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=f"{prefix}-{digest(depends_on)[:12]}",
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )
    finally:
        optuna.logging.set_verbosity(level)
    if study.user_attrs.get("fingerprint") != depends_on["fingerprint"]:
        study.set_user_attr("fingerprint", depends_on["fingerprint"])
    return study


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that measured a plan, in the order they were started."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [trial for trial in trials if "plan" in trial.user_attrs]  # others were added by hand


def drop_unstarted(study: optuna.Study) -> None:
    """Fail trials that a killed run queued and never started; their parameters would leak into the next."""
    from optuna.trial import TrialState

    while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.tell(study.ask(), state=TrialState.FAIL)


def evaluations(
    storage: optuna.storages.BaseStorage, fingerprint: str, fidelities: int
) -> dict[tuple[str, int], Evaluation]:
    """The evaluations of every study with this fingerprint, those of unfinished trials included."""
    import optuna

    found: dict[tuple[str, int], Evaluation] = {}
    for name in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=name, storage=storage)
        if study.user_attrs.get("fingerprint") != fingerprint:
            continue
        for trial in study.get_trials(deepcopy=False):
            for fidelity in range(fidelities):
                stored = trial.user_attrs.get(f"evaluation:{fidelity}")
                if stored is not None:
                    found[trial.user_attrs["plan"]["hash"], fidelity] = Evaluation.from_json(stored)
    return found
