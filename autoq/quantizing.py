"""The one-call entry: tune and apply now, at the next call, or after recording by hand; and measuring any plan."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from autoq.applying import apply
from autoq.calibration import Progress
from autoq.candidates import Candidate
from autoq.errors import PlanError
from autoq.evaluation import Difference, EvalFn, LossMeter, largest
from autoq.language import rows_as_batches, tokens_of
from autoq.losses import LossFn, as_batches, default_metric, is_causal_lm
from autoq.modules import FilterFn, evaluating, find_linears, unwrap
from autoq.pipeline import tune
from autoq.plan import Plan
from autoq.profiler.end_to_end import UNQUANTIZED
from autoq.profiler.timing import Timing
from autoq.results import Settings
from autoq.scheme import NONE, Scheme
from autoq.search import Objective
from autoq.shadow import PackedStore, Shadow
from autoq.ties import Ties, checked
from autoq.tuning import Tuning
from autoq.waiting import Waiting
from autoq.workload import Phase

_log = logging.getLogger(__name__)


def autoquant(
    model: nn.Module,
    batches: Any = None,
    *,
    phases: Mapping[str, Phase] | None = None,
    loss_fn: LossFn | None = None,
    eval_fn: EvalFn | None = None,
    candidates: Sequence[Candidate | Scheme | str] | None = None,
    max_degradation: float = 0.01,
    max_increase: float | None = None,
    objective: Objective = "latency",
    max_latency_us: float | None = None,
    max_weight_bytes: int | None = None,
    plan: str | Path | Plan | None = None,
    accept_plan: bool = False,
    cache_dir: str | Path | None = None,
    profile_from: str | None = None,
    filter_fn: FilterFn | None = None,
    manual: bool = False,
    keep_float: bool = False,
    n_trials: int | None = None,
    storage: str | None = None,
    ties: Ties | None = None,
    kv_cache: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """Quantize a model as measurements on this device advise. Returns the same model, changed in place.

    With ``batches`` (or ``phases``) the model is tuned at once. Without, the next call of the model, or of its
    ``generate``, is recorded, tuned on and answered by the tuned model. With ``manual=True`` every call is recorded
    until ``model.finalize_autoquant()``. After an error or Ctrl-C the model still waits: the next call goes on where
    tuning stopped. A waiting model can be neither copied nor pickled.

    Args:
        model: a module, or ``torch.compile(module)``, which stays compiled with its arguments.
        batches: as in ``autoq.tune``, like the other arguments that are not named here.
        phases: as in ``autoq.tune``.
        loss_fn: as in ``autoq.tune``.
        eval_fn: as in ``autoq.tune``.
        candidates: as in ``autoq.tune``.
        max_degradation: as in ``autoq.tune``.
        max_increase: as in ``autoq.tune``.
        objective: as in ``autoq.tune``.
        max_latency_us: as in ``autoq.tune``.
        max_weight_bytes: as in ``autoq.tune``.
        plan: a plan, or a plan file: replayed without measuring anything if it is there, else tuned and written.
        accept_plan: replay a plan file although it was tuned for other limits, objective or phases.
        cache_dir: as in ``autoq.tune``.
        profile_from: as in ``autoq.tune``.
        filter_fn: as in ``autoq.tune``.
        manual: record until ``model.finalize_autoquant()`` is called; it is removed then.
        keep_float: keep the float layers in memory, so that ``autoq.restore`` can bring them back.
        n_trials: as in ``autoq.tune``.
        storage: as in ``autoq.tune``.
        ties: as in ``autoq.tune``.
        kv_cache: as in ``autoq.tune``.
        seed: as in ``autoq.tune``.
        progress: as in ``autoq.tune``.

    Raises:
        PlanError: the plan file is damaged, or for another model, or for other limits than the arguments'.
        InputError: as ``autoq.tune``.
        ModelError: as ``autoq.tune``.
        CacheError: as ``autoq.tune``.
    """
    request = {
        "max_degradation": max_degradation,
        "max_increase": max_increase,
        "objective": objective,
        "max_latency_us": max_latency_us,
        "max_weight_bytes": max_weight_bytes,
        "ties": list(checked(ties)) or None,
    }
    path = Path(plan) if isinstance(plan, str | Path) else None
    found = plan if isinstance(plan, Plan) else Plan.load(path) if path is not None and path.exists() else None
    if found is not None:
        if not accept_plan:
            _check_request(found, request, phases, str(path or "plan"))
        _apply(model, found, keep_float=keep_float)
        return model
    arguments: dict[str, Any] = {
        **request,
        "phases": phases,
        "loss_fn": loss_fn,
        "eval_fn": eval_fn,
        "candidates": candidates,
        "cache_dir": cache_dir,
        "profile_from": profile_from,
        "filter_fn": filter_fn,
        "n_trials": n_trials,
        "storage": storage,
        "kv_cache": kv_cache,
        "seed": seed,
        "progress": progress,
    }

    def run(given: Any) -> None:
        result = tune(model, given, **arguments)
        if path is not None:
            result.plan.save(path)
        _apply(model, result.plan, keep_float=keep_float, packed=result.packed)

    if batches is not None or (phases is not None and not manual):
        run(batches)
    else:
        Waiting(model, run, manual=manual).start()
    return model


def _apply(model: nn.Module, plan: Plan, *, keep_float: bool, packed: Mapping[str, Any] | None = None) -> None:
    report = apply(model, plan, keep_float=keep_float, packed=packed)
    if report.differs:
        _log.warning("not all of the plan holds here: %s", report)


def _check_request(plan: Plan, asked: Mapping[str, Any], phases: Mapping[str, Phase] | None, where: str) -> None:
    """Refuse a plan that was tuned for something else than the caller asks for. Defaults ask for nothing."""
    request = plan.provenance.get("request")
    if not isinstance(request, Mapping):
        return
    defaults = autoquant.__kwdefaults__ or {}
    different = [
        f"{name} is {request.get(name)!r} in the file and {value!r} in the call"
        for name, value in asked.items()
        if value not in (defaults[name], request.get(name))
    ]
    if phases is not None:
        calls = {name: float(phase.calls) for name, phase in phases.items()}
        if calls != dict(plan.phases):
            different.append(f"phases are {dict(plan.phases)} in the file and {calls} in the call")
    if different:
        raise PlanError(
            "a plan file is replayed for what it was tuned for",
            where=where,
            got="; ".join(different),
            fix="Delete the file to tune again, or pass accept_plan=True.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A plan's loss and end-to-end times, measured.

    Attributes:
        metric: ``nll`` (nats per token), ``kl``, ``relative_rms``, ``loss_fn`` or ``eval_fn``.
        baseline_loss: mean loss of the unquantized model.
        difference: the plan's paired difference to it, the largest of the phases'.
        phases: phase → timing of one pass, compiled.
        baseline_phases: the same of the unquantized model, interleaved with it.
        none_phases: the same with ``none`` on all of the plan's layers, where those run in autoq's kernels; else empty.
        calls: phase → passes per request.
        compiled: phase → how it was compiled.
        weight_bytes: bytes of all the model's weights under the plan.
        baseline_weight_bytes: the same of the unquantized model.
        phase_differences: phase → that phase's, where the plan has mixes that switch between phases; else empty.
    """

    metric: str
    baseline_loss: float
    difference: Difference
    phases: Mapping[str, Timing]
    baseline_phases: Mapping[str, Timing]
    weight_bytes: int
    baseline_weight_bytes: int
    phase_differences: Mapping[str, Difference] = field(default_factory=dict)
    none_phases: Mapping[str, Timing] = field(default_factory=dict)
    calls: Mapping[str, float] = field(default_factory=dict)
    compiled: Mapping[str, str] = field(default_factory=dict)


def measure(
    model: nn.Module,
    plan: Plan,
    batches: Any = None,
    *,
    phases: Mapping[str, Phase] | None = None,
    loss_fn: LossFn | None = None,
    eval_fn: EvalFn | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Measured:
    """Measure any plan on an unquantized model: its loss, and its end-to-end time per phase. Nothing is cached.

    Args:
        model: unquantized, compiled or not; it is not changed.
        plan: layers it does not name stay as they are.
        batches: as in ``autoq.tune``.
        phases: as in ``autoq.tune``.
        loss_fn: as in ``autoq.tune``.
        eval_fn: as in ``autoq.tune``.
        seed: of sampled text and of the bootstrap.
        progress: called with (stage, text, done, total).

    Raises:
        InputError: as ``autoq.tune``.
        PlanError: if the plan names layers the model lacks.
    """
    check_layers(plan, [site.name for site in find_linears(model) if site.reason is None])
    only = (lambda name, _: name in plan.layers) if plan.layers else None
    settings = Settings(loss_fn=loss_fn, eval_fn=eval_fn, seed=seed, filter_fn=only)
    with evaluating(unwrap(model)):
        tuning = Tuning(model, batches, phases, settings, progress)
        tuning.prepare()
        return _measured(tuning, plan)


def _measured(tuning: Tuning, plan: Plan) -> Measured:
    check_layers(plan, tuning.layers)
    meter: LossMeter = tuning.meter
    tuning.say("evaluate", "loss of the model, and under the plan", 0, 1)
    differences = meter.by_phase(plan.layers)
    tuning.say("evaluate", "", 1, 1)
    plans = {"plan": plan.layers} if plan.layers else {}
    if plan.layers and not tuning.none_is_stock:
        plans["none"] = dict.fromkeys(plan.layers, NONE)
    times = tuning.timer.time(plans, "measure")
    return Measured(
        metric=tuning.metric_name,
        baseline_loss=float(meter.baseline().double().mean()),
        difference=largest(differences),
        phase_differences=differences if meter.forms.differ(plan.layers) else {},
        phases=times["plan" if plan.layers else UNQUANTIZED],
        baseline_phases=times[UNQUANTIZED],
        none_phases=times.get("none", {}),
        weight_bytes=tuning.costs.weight_bytes(plan.layers),
        baseline_weight_bytes=tuning.costs.weight_bytes({}),
        calls={name: phase.calls for name, phase in tuning.phases.items()},
        compiled=tuning.timer.how(),
    )


def loss_meter(model: nn.Module, plan: Plan | None, batches: Any, *, loss_fn: LossFn | None = None) -> LossMeter:
    """What measures the loss of a model and of plans for it, on the same samples; nothing is timed.

    Args:
        model: unquantized, compiled or not; it is not changed.
        plan: checked against the model; None for none.
        batches: as in ``autoq.tune``.
        loss_fn: as in ``autoq.tune``.

    Raises:
        InputError: as ``autoq.tune``.
        PlanError: if the plan names layers the model lacks.
    """
    root = unwrap(model)
    layers = [site.name for site in find_linears(root) if site.reason is None]
    if plan is not None:
        check_layers(plan, layers)
    given = as_batches(batches)
    if loss_fn is None and is_causal_lm(root):
        given = rows_as_batches(tokens_of(given))
    metric = default_metric(root, given, loss_fn)
    return LossMeter(Shadow(root, PackedStore(root, layers)), metric, given)


def check_layers(plan: Plan, layers: Sequence[str]) -> None:
    """Refuse a plan for other layers than these.

    Raises:
        PlanError: naming them.
    """
    unknown = sorted(set(plan.layers) - set(layers))
    if unknown:
        raise PlanError(
            "the plan names quantizable layers of the model",
            got=", ".join(unknown[:5]),
            fix="The plan is for another model; plan.rebase(model) finds layers under another prefix.",
        )
