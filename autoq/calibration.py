"""Whole-model times: of any plans, and of the uniform ones, to which the latency model is fitted once per device."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from autoq._files import write_atomic
from autoq.cache.store import read_calibration
from autoq.errors import CacheError
from autoq.identity import function_hash
from autoq.plan import Plan
from autoq.profiler import EndToEnd, LatencyModel, Timing, fit_latency
from autoq.profiler.end_to_end import UNQUANTIZED
from autoq.scheme import NONE, Scheme
from autoq.shadow import PackedStore
from autoq.workload import Phase, Workload

_log = logging.getLogger(__name__)
Progress = Callable[[str, str, int, int], None]
Assignment = Mapping[str, Scheme]


class Timer:
    """End-to-end times of one model, compiled when the first are asked for.

    Args:
        model: the unquantized model, not compiled.
        store: its layers and their packed weights.
        phases: what is timed.
        compile_arguments: passed to ``torch.compile``.
        progress: called with (stage, text, done, total).
    """

    def __init__(
        self,
        model: nn.Module,
        store: PackedStore,
        phases: Mapping[str, Phase],
        compile_arguments: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        self._model = model
        self._store = store
        self._phases = phases
        self.compile_arguments = compile_arguments
        self._say = progress
        self._end_to_end: EndToEnd | None = None

    def time(
        self,
        plans: Mapping[str, Assignment],
        stage: str,
        *,
        others: Mapping[str, Mapping[str, Callable[[], None]]] | None = None,
    ) -> dict[str, dict[str, Timing]]:
        """Label → phase → time of one pass; the unquantized model's is added, and that of other runs."""
        if self._end_to_end is None:
            self._end_to_end = EndToEnd(
                self._model,
                self._store,
                self._phases,
                compile_arguments=self.compile_arguments,
                progress=lambda text, done, total: self._say("compile", text, done, total),
            )
        self._say(stage, f"{len(plans) + 1} plans end to end", 0, 1)
        found = self._end_to_end.time(plans, others=others)
        self._say(stage, "", 1, 1)
        return found

    def how(self) -> dict[str, str]:
        """Phase → how it was compiled."""
        return dict(self._end_to_end.how) if self._end_to_end is not None else {}


def calibrate(
    timer: Timer,
    workload: Workload,
    isolated: Mapping[tuple[str, Scheme, str], float],
    schemes: Sequence[Scheme],
    *,
    none_is_stock: bool,
    identity: Mapping[str, str],
    folder: Path,
) -> LatencyModel:
    """Fit the latency model to whole-model times of the uniform plans, measured once per model and device.

    Args:
        timer: measures them.
        workload: layers and phases.
        isolated: as ``profiler.isolated_times`` gives.
        schemes: each on every layer that can have it; ``none`` among them.
        none_is_stock: whether the plan with ``none`` everywhere is the unquantized model itself, not timed twice then.
        identity: what times depend on besides plans, phases and compilation: weights and device.
        folder: of the cache.
    """
    plans = {str(scheme): _uniform(scheme, workload, isolated) for scheme in schemes}
    key = {
        **identity,
        "plans": {label: Plan(layers=plan).hash for label, plan in plans.items()},
        "none": "stock" if none_is_stock else "own kernels",
        "phases": sorted((call.phase, call.layer, call.m, call.count) for call in workload.calls),
        "compile": compile_key(timer.compile_arguments),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    place = folder / "calibration" / f"{name}.json"
    times = _known_times(place, key, plans, {phase.name for phase in workload.phases})
    if times is None:
        stock = {str(NONE)} if none_is_stock else set()
        found = timer.time({label: plan for label, plan in plans.items() if label not in stock}, "calibrate")
        found |= dict.fromkeys(stock, found[UNQUANTIZED])
        # In the order of the plans, as they are read back: the fit's last bits depend on it.
        times = {label: {phase: t.median_us for phase, t in found[label].items()} for label in plans}
        text = json.dumps({"key": key, "times_us": times}, indent=1) + "\n"
        write_atomic(place, lambda temporary: temporary.write_text(text), CacheError)
    return fit_latency(workload, isolated, [(plans[label], times[label]) for label in times])


def compile_key(arguments: Mapping[str, Any]) -> list[list[str]]:
    """What ``torch.compile``'s arguments are, the same in every process: a backend counts by its code and settings."""
    found = {name: [function_hash(one) if callable(one) else repr(one)] for name, one in arguments.items()}
    settings = getattr(arguments.get("backend"), "config", {})  # of inductor: what its modes and options are
    return sorted([name, *one] for name, one in found.items()) + sorted([key, repr(v)] for key, v in settings.items())


def _uniform(
    scheme: Scheme, workload: Workload, isolated: Mapping[tuple[str, Scheme, str], float]
) -> dict[str, Scheme]:
    """The scheme on every layer that can have it."""
    phase = workload.phases[0].name
    return {layer.name: scheme if (layer.name, scheme, phase) in isolated else NONE for layer in workload.quantizable}


def _known_times(
    place: Path, key: Mapping[str, Any], plans: Mapping[str, Any], phases: Collection[str]
) -> dict[str, dict[str, float]] | None:
    """Calibration times from the cache; None if they were not measured. A damaged file is measured again, aloud."""
    if not place.exists():
        return None
    try:
        known, times = read_calibration(place)
    except CacheError as problem:
        _log.warning("%s The plans are timed again.", problem)
        return None
    same = known == json.loads(json.dumps(key)) and list(times) == list(plans)
    if not same or any(set(one) != set(phases) for one in times.values()):
        _log.warning("%s holds times of something else; the plans are timed again", place)
        return None
    return times
