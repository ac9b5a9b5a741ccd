"""Helping to search: a process measures plans of a study that ``autoq.tune`` published in a shared storage."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from autoq import candidates, definition, search, studies
from autoq.calibration import Progress
from autoq.errors import InputError
from autoq.evaluation import EvalFn
from autoq.leases import PATIENCE
from autoq.losses import LossFn
from autoq.results import Settings
from autoq.tuning import Tuning

if TYPE_CHECKING:
    import optuna

_POLL_S = 1.0
_NAMES = {
    "weights": "weights",
    "model": "model (its code or settings)",
    "batches": "tokens",
    "loss_fn": "loss_fn",
    "eval_fn": "eval_fn",
    "metric": "metric",
    "autoq": "version of autoq",
    "plugins": "plugins",
    "seed": "seed",
}


def work(
    model: nn.Module,
    batches: Any,
    *,
    storage: str,
    study: str | None = None,
    loss_fn: LossFn | None = None,
    eval_fn: EvalFn | None = None,
    wait_s: float = 0.0,
    patience: int = PATIENCE,
    progress: Progress | None = None,
) -> search.SearchResult:
    """Measure plans of a study until its search is done. Nothing is profiled, and the model is not changed.

    Args:
        model: with the weights that are being tuned.
        batches: what was given to ``tune``.
        storage: what was given to ``tune``.
        study: the study's name; by default the newest unfinished one for these weights and batches, else the newest.
        loss_fn: what was given to ``tune``.
        eval_fn: what was given to ``tune``.
        wait_s: seconds to wait for such a study.
        patience: seconds without a sign of life after which another process counts as dead and its plan is retried.
        progress: called with (``search``, text, done, total) after each plan measured here.

    Returns:
        What all of the study's workers found; its ``evaluations`` are those made here.

    Raises:
        InputError: if there is no study for these weights and batches, naming what differs.
        SearchError: if the storage cannot be used.
    """
    with studies.told(storage):
        opened = studies.open_storage(storage, patience)
        seen = _Inputs(model, batches, Settings(loss_fn=loss_fn, eval_fn=eval_fn))
        name = _wait(opened, study, seen, wait_s)
        _, wanted = definition.load(opened, name)
        judge = seen.tuning(wanted).rejoined(wanted.recipe)
        _check(name, wanted.identity, judge.identity)
        if (judge.fingerprint, len(judge.meter.levels)) != (wanted.fingerprint, wanted.fidelities):
            raise InputError(
                "a worker measures losses as the study does",
                where=name,
                got=f"fingerprint {judge.fingerprint} instead of {wanted.fingerprint}",
                fix="Install the same versions of autoq on all machines.",
            )
        return search.join(
            opened,
            name,
            evaluate=judge.evaluate,
            patience=patience,
            progress=None if progress is None else partial(_report, progress),
        )


def _report(progress: Progress, done: int, total: int, text: str) -> None:
    progress("search", text, done, total)


class _Inputs:
    """The worker's model and batches, as a study's seed makes them."""

    def __init__(self, model: nn.Module, batches: Any, settings: Settings) -> None:
        self._model = model
        self._batches = batches
        self._settings = settings
        self._identities: dict[str, dict[str, str]] = {}

    def tuning(self, wanted: definition.Definition) -> Tuning:
        """A tuning of this model with the study's schemes and seed."""
        offered = tuple(candidates.parse(scheme) for scheme in wanted.recipe["candidates"])
        return self._tuning(candidates=offered, seed=wanted.seed)

    def identity(self, seed: str) -> dict[str, str]:
        """What losses depend on here, the metric left out."""
        if seed not in self._identities:
            self._identities[seed] = self._tuning(seed=int(seed)).identity()
        return self._identities[seed]

    def _tuning(self, **changes: Any) -> Tuning:
        return Tuning(self._model, self._batches, {}, replace(self._settings, **changes), None)


def _wait(opened: optuna.storages.BaseStorage, study: str | None, seen: _Inputs, wait_s: float) -> str:
    """The name of the study to work for, as soon as there is one."""
    until = time.monotonic() + wait_s
    while True:
        there = {name: said for name, said in definition.published(opened).items() if said["identity"]}
        late = time.monotonic() >= until
        found = _choose(there, study, seen, done=late)
        if found is not None:
            return found
        if late:
            break
        time.sleep(min(_POLL_S, wait_s))
    if study is None and there:
        newest = list(there)[-1]
        _check(newest, there[newest]["identity"], seen.identity(there[newest]["identity"]["seed"]))
    raise InputError(
        "a worker joins a study that autoq tune has published",
        where=study or "",
        got=f"the studies {', '.join(there)}" if there else "none in the storage",
        fix="Start autoq tune with the same --storage, or give --wait time for it.",
    )


def _choose(there: Mapping[str, Mapping[str, Any]], study: str | None, seen: _Inputs, *, done: bool) -> str | None:
    """The named study, checked; or the newest with these weights and batches, rather one that is not done.

    Args:
        there: the studies.
        study: a study's name.
        seen: the worker's model and batches.
        done: whether one that is done will do.
    """
    if study is not None:
        if study in there:
            _check(study, there[study]["identity"], seen.identity(there[study]["identity"]["seed"]))
            return study
        return None
    mine = [
        (said.get("state") != "done", number, name)
        for number, (name, said) in enumerate(there.items())
        if (done or said.get("state") != "done")
        and not _differences(said["identity"], seen.identity(said["identity"]["seed"]))
    ]
    return max(mine)[2] if mine else None


def _differences(wanted: Mapping[str, str], got: Mapping[str, str]) -> list[str]:
    return [name for name in got if wanted.get(name) != got[name]]


def _check(study: str, wanted: Mapping[str, str], got: Mapping[str, str]) -> None:
    differing = _differences(wanted, got)
    if differing:
        raise InputError(
            "a worker has the study's " + " and ".join(_NAMES[name] for name in differing),
            where=study,
            got="; ".join(f"{_NAMES[name]} {got[name]}, the study's {wanted.get(name)}" for name in differing),
            fix="Give the worker the model, the --text, the --rows and the packages that autoq tune had.",
        )
