"""A plan's figures measured again: all of them, or on another device its times alone."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from autoq.cache import Fingerprint
from autoq.calibration import Progress, Timer
from autoq.errors import PlanError
from autoq.evaluation import Difference
from autoq.fitting import fit
from autoq.language import rows_as_batches, tokens_of
from autoq.losses import as_batches, is_causal_lm
from autoq.modules import compile_arguments, device_of, evaluating, find_linears, unwrap
from autoq.plan import Plan
from autoq.plan_text import finite
from autoq.profiler import Timing
from autoq.profiler.end_to_end import UNQUANTIZED
from autoq.provenance import versions
from autoq.quantizing import Measured, check_layers
from autoq.scheme import NONE
from autoq.shadow import PackedStore
from autoq.tuning_inputs import default_phases
from autoq.workload import Phase

_Times = Mapping[str, Timing]  # by phase
_LOSSES = ("baseline_loss", "loss_delta", "loss_low", "loss_high")


def remeasure(
    model: nn.Module,
    plan: Plan,
    batches: Any = None,
    *,
    phases: Mapping[str, Phase] | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """The same plan with end-to-end times of this device in place of those it has. No loss is measured.

    Args:
        model: unquantized, compiled or not; it is not changed.
        plan: for this model; layers it does not name stay as they are.
        batches: as in ``autoq.tune``; for a causal language model its first token row is the prompt's text.
        phases: as in ``autoq.tune``, with the names of the plan's phases. By default as ``autoq.tune`` makes them.
        strict: refuses, before anything is packed or timed, a plan that does not fit, as in ``autoq.apply``.
        progress: called with (stage, text, done, total).

    Returns:
        The plan with ``measured`` times, ``device`` and ``versions`` of here. The measured losses stay, and
        ``remeasured`` says on which device they were measured; what was predicted for the other device is dropped.

    Raises:
        InputError: if there are no batches and no phases.
        PlanError: if the plan names layers the model lacks, was tuned for other phases, or does not fit where
            ``strict`` is set.
    """
    root = unwrap(model)
    check_layers(plan, [site.name for site in find_linears(root) if site.reason is None])
    fit(root, plan, strict=strict)
    phases = own_phases(root, batches) if phases is None else phases
    check_phases(plan, phases)
    calls = {name: plan.phases.get(name, phase.calls) for name, phase in phases.items()}
    plan = replace(plan, phases=calls)  # refuses names that no plan can have
    store = PackedStore(root, plan.layers)
    timer = Timer(root, store, phases, compile_arguments(model), progress or (lambda *_: None))
    plans = {"plan": plan.layers} if plan.layers else {}
    if plan.layers and not store.none_is_stock:
        plans["none"] = dict.fromkeys(plan.layers, NONE)
    with evaluating(root):
        times = timer.time(plans, "measure")
    now = times["plan" if plan.layers else UNQUANTIZED]
    fresh = _times(calls, now, times[UNQUANTIZED], times.get("none", {}), timer.how())
    before = plan.provenance.get("measured") or {}
    kept = {name: one for name, one in before.items() if name in (*_LOSSES, "samples") or name.endswith("_bytes")}
    by_phase = before.get("phases") or {}
    for name, phase in fresh["phases"].items():
        phase |= {key: one for key, one in by_phase.get(name, {}).items() if key in _LOSSES}
    then = plan.provenance.get("remeasured", {}).get("loss_device") or plan.provenance.get("device")
    return _measured_here(plan, calls, {**kept, **fresh}, device_of(root), then if "loss_delta" in kept else None)


def measured_plan(plan: Plan, measured: Measured, device: str) -> Plan:
    """The plan with all its figures measured anew.

    Args:
        plan: as it was saved.
        measured: from ``autoq.measure``, on this machine.
        device: the model's, such as ``"cpu"``.
    """
    calls = {name: plan.phases.get(name, measured.calls.get(name, 1.0)) for name in measured.phases}
    times = _times(calls, measured.phases, measured.baseline_phases, measured.none_phases, measured.compiled)
    for name, change in measured.phase_differences.items():
        times["phases"][name] |= loss_figures(change)
    figures = {
        **loss_figures(measured.difference),
        "samples": measured.difference.samples,
        "baseline_loss": measured.baseline_loss,
        "weight_bytes": measured.weight_bytes,
        "baseline_weight_bytes": measured.baseline_weight_bytes,
        **times,
    }
    found = _measured_here(plan, calls, figures, device, None)
    budget = dict(found.provenance.get("budget") or {}) | {"metric": measured.metric}
    return replace(found, provenance={**found.provenance, "budget": budget})


def own_phases(model: nn.Module, batches: Any) -> dict[str, Phase]:
    """The phases of a model for which none are named, as ``autoq.tune`` makes them.

    Args:
        model: compiled or not.
        batches: as in ``autoq.tune``.

    Raises:
        InputError: if there are no batches.
    """
    root, given = unwrap(model), as_batches(batches)
    return default_phases(root, rows_as_batches(tokens_of(given)) if is_causal_lm(root) else given)


def check_phases(plan: Plan, names: Mapping[str, Any]) -> None:
    """Refuse to measure a plan on other phases than it was tuned for.

    Raises:
        PlanError: naming both.
    """
    if plan.phases and set(plan.phases) != set(names):
        raise PlanError(
            f"the plan is measured on its phases: {', '.join(plan.phases)}",
            got=", ".join(names),
            fix="Pass phases= with the inputs that it was tuned for.",
        )


def loss_figures(change: Difference) -> dict[str, float]:
    """A measured difference as a plan's figures."""
    return {"loss_delta": change.mean, "loss_low": change.low, "loss_high": change.high}


def _times(
    calls: Mapping[str, float], now: _Times, base: _Times, none: _Times, compiled: Mapping[str, str]
) -> dict[str, Any]:
    """The figures of time, of a request and of each phase."""

    def request_us(times: _Times) -> float:
        return sum(count * times[name].median_us for name, count in calls.items())

    return {
        "latency_us": request_us(now),
        "baseline_latency_us": request_us(base),
        **({"none_latency_us": request_us(none)} if none else {}),
        "phases": {
            name: {
                "time_us": now[name].median_us,
                "low_us": now[name].low_us,
                "high_us": now[name].high_us,
                "baseline_us": base[name].median_us,
                "baseline_low_us": base[name].low_us,
                "baseline_high_us": base[name].high_us,
                **({"none_us": none[name].median_us} if none else {}),
                "calls": count,
                "compiled": compiled.get(name, ""),
            }
            for name, count in calls.items()
        },
    }


def _measured_here(
    plan: Plan,
    calls: Mapping[str, float],
    figures: Mapping[str, Any],
    device: str,
    loss_device: Mapping[str, Any] | None,
) -> Plan:
    """The plan with these figures, of this device and its software."""
    provenance = {name: one for name, one in plan.provenance.items() if name != "certificate"}
    if "predicted" in provenance:
        lasting = ("loss_delta", "weight_bytes")
        provenance["predicted"] = {name: one for name, one in provenance["predicted"].items() if name in lasting}
    here = Fingerprint.current(device).to_json()
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    elsewhere = loss_device is not None and dict(loss_device) != here
    provenance |= {
        "measured": finite(figures),
        "device": here,
        "versions": dict(provenance.get("versions") or {}) | versions(),
        "remeasured": {"created": created, **({"loss_device": loss_device} if elsewhere else {})},
    }
    return replace(plan, phases=dict(calls), provenance=provenance)
