"""Who is measuring which trial, whether they still live, and how a dead worker's plan gets measured after all.

Optuna's heartbeats do this for databases. For the rest a trial carries a lease: its owner says every few seconds that
it lives. Whoever watches counts, on its own clock, how long a lease has not changed, so clocks of machines need not
agree; an owner of the same machine is looked up among its processes instead.
"""

from __future__ import annotations

import os
import platform
import threading
import time
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from autoq.errors import SearchError

if TYPE_CHECKING:
    import optuna

PATIENCE = 120  # seconds without a sign of life after which a worker counts as dead
_BEATS = 4  # signs of life within that time


def queue(
    study: optuna.Study,
    plan: Mapping[str, Any],
    params: Mapping[str, float],
    distributions: Mapping[str, optuna.distributions.BaseDistribution],
) -> None:
    """Add a trial that waits for a worker.

    It has its plan from the moment it is seen, so trial numbers tell which of two workers claimed a plan first.
    """
    import optuna

    study.add_trial(
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.WAITING,
            params=dict(params),
            distributions=dict(distributions),
            user_attrs={"plan": dict(plan)},
        )
    )


def retry(study: optuna.Study, failed: optuna.trial.FrozenTrial) -> None:
    """Queue a failed trial's plan again, with the parameters it was drawn with."""
    plan = failed.user_attrs.get("plan")
    if plan is not None:
        queue(study, plan, failed.params, failed.distributions)


def owner() -> dict[str, Any]:
    """This process, so that others on the same machine can tell whether it lives."""
    return {"place": _place(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_gone(one: Mapping[str, Any]) -> bool:
    """Whether an owner surely lives no more: it was a process of this machine, and is none now."""
    if one["place"] != _place() or one["started"] is None:
        return False
    return bool(_started(one["pid"]) != one["started"])


@cache
def _place() -> str:
    """The machine since it was booted, and the namespace that its process numbers are of."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return platform.node()


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None if it is no more, or nobody can tell."""
    try:
        # The command's name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class Lease:
    """Says that a trial is being measured, from entering to leaving the context.

    Args:
        trial: the running trial.
        storage: where it is kept; a database has Optuna's heartbeats.
        patience: seconds within which some sign of life is due.
    """

    def __init__(self, trial: optuna.Trial, storage: optuna.storages.BaseStorage, patience: float) -> None:
        self._trial = trial
        self._heartbeat = getattr(storage, "record_heartbeat", None)
        self._interval = patience / _BEATS
        self._owner = owner()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        if self._heartbeat is not None:
            # Optuna's own thread may not have come to its first: a worker killed now would never be missed.
            self._heartbeat(self._trial._trial_id)
            self._beat(None)
            return self
        self._beat(0)
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _beat(self, number: int | None) -> None:
        self._trial.set_user_attr("lease", {"owner": self._owner, "beat": number})

    def _live(self) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        number = 0
        while not self._stop.wait(self._interval):
            number += 1
            try:
                self._beat(number)
            except UpdateFinishedTrialError:
                return  # taken away; the measuring thread finds out when it stores its result
            except (OSError, SearchError):
                continue  # a file system may be away for a while


class Watch:
    """Finds the running trials of a study whose workers died.

    Args:
        study: the study.
        patience: seconds that a lease may stay unchanged.
    """

    def __init__(self, study: optuna.Study, patience: float) -> None:
        self._study = study
        self._patience = patience
        self._seen: dict[int, tuple[Any, float]] = {}

    def reap(self) -> None:
        """Fail the trials of dead workers, each once whoever else does the same, and queue their plans again."""
        import optuna
        from optuna.trial import TrialState

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self._study)
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not self._is_lost(trial.number, trial.user_attrs.get("lease")):
                continue
            try:
                self._study.tell(trial.number, state=TrialState.FAIL)
            except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
                continue  # it finished, or another worker was faster
            retry(self._study, trial)

    def _is_lost(self, number: int, lease: Mapping[str, Any] | None) -> bool:
        now = time.monotonic()
        if self._seen.setdefault(number, (lease, now))[0] != lease:
            self._seen[number] = (lease, now)
        if lease is not None and is_gone(lease["owner"]):
            return True
        # Without a beat Optuna watches; without a lease the worker died before it could take one.
        watched = lease is None or lease["beat"] is not None
        return watched and now - self._seen[number][1] > self._patience
