"""The one-call entry: tune and apply now, at the next call, or after recording by hand; and measuring any plan."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoq.applying import apply
from autoq.calibration import Progress
from autoq.candidates import Candidate
from autoq.errors import InputError, PlanError
from autoq.evaluation import Difference, EvalFn, LossMeter, largest
from autoq.language import rows_as_batches, tokens_of
from autoq.losses import Batch, LossFn, as_batches, default_metric, is_causal_lm
from autoq.modules import FilterFn, find_linears, unwrap
from autoq.pipeline import Tuning, tune
from autoq.plan import Plan
from autoq.profiler.end_to_end import UNQUANTIZED
from autoq.profiler.timing import Timing
from autoq.results import Settings
from autoq.scheme import NONE, Scheme
from autoq.search import Objective
from autoq.shadow import PackedStore, Shadow
from autoq.ties import Ties, checked
from autoq.workload import Phase

_log = logging.getLogger(__name__)
_KEPT_CALLS = 64  # calls whose inputs manual recording keeps


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
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """Quantize a model as measurements on this device advise. Returns the same model, changed in place.

    With ``batches`` (or ``phases``) the model is tuned at once. Without, the next call of the model, or of its
    ``generate``, is recorded, tuned on and answered by the tuned model. With ``manual=True`` every call is recorded
    until ``model.finalize_autoquant()``.

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
        "seed": seed,
        "progress": progress,
    }
    pending = _Pending(model, arguments, path, keep_float)
    if batches is not None or (phases is not None and not manual):
        pending.tune(batches)
    else:
        pending.wait(manual=manual)
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


class _Pending:
    """A model that will be tuned: at once, at its next call, or when the user says so."""

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any], path: Path | None, keep_float: bool) -> None:
        self.model = model
        self.root = unwrap(model)
        self.arguments = dict(arguments)
        self.path = path
        self.keep_float = keep_float
        self.seen: list[Batch] = []
        self._handle: Any = None
        self._compiled_call: Any = None
        self._forwards: dict[nn.Module, Any] = {}

    def tune(self, batches: Any) -> None:
        """Tune, write the plan file if one was named, and apply."""
        training = self.root.training
        result = tune(self.model, batches, **self.arguments)
        if self.path is not None:
            result.plan.save(self.path)
        _apply(self.model, result.plan, keep_float=self.keep_float, packed=result.packed)
        self.root.train(training)

    def wait(self, *, manual: bool) -> None:
        """Watch the model's calls: the first one triggers tuning, or all are kept until finalize_autoquant."""
        action: Callable[[Batch], None] = self._keep if manual else self._first
        # Compiled code would trace the hook; until `_release`, wrapped and in-place compiled models run uncompiled.
        self._compiled_call, self.root._compiled_call_impl = self.root._compiled_call_impl, None
        for wrapper in _compiled_wrappers(self.model):
            self._forwards[wrapper] = wrapper.forward
            wrapper.forward = self.root.__call__
        self._handle = self.root.register_forward_pre_hook(
            lambda _module, args, kwargs: action(Batch(args, args, kwargs)), with_kwargs=True
        )
        if manual:
            self.model.__dict__["finalize_autoquant"] = self._finalize

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self.root._compiled_call_impl = self._compiled_call
        for wrapper, forward in self._forwards.items():
            wrapper.forward = forward
        self.model.__dict__.pop("finalize_autoquant", None)

    def _first(self, batch: Batch) -> None:
        self._release()
        self.tune(self._inputs([batch]))

    def _keep(self, batch: Batch) -> None:
        if len(self.seen) < _KEPT_CALLS:
            self.seen.append(_cloned(batch))

    def _finalize(self) -> None:
        """Stop recording, tune on what was recorded, and apply.

        Raises:
            InputError: if the model was not called since.
        """
        if not self.seen:
            raise InputError(
                "manual recording needs at least one call of the model before finalize_autoquant()",
                fix="Call the model on inputs you care about first.",
            )
        self._release()
        self.tune(self._inputs(self.seen))

    def _inputs(self, batches: list[Batch]) -> Any:
        """The recorded inputs as ``tune`` takes them; a language model's prompts only, without their caches."""
        if not is_causal_lm(self.root):
            return batches
        rows = [tokens for batch in batches if (tokens := _prompt(batch)) is not None]
        if not rows:
            raise InputError("a recorded call of a language model has a prompt of at least two tokens")
        return [_clone(one) for one in rows]


def _compiled_wrappers(model: nn.Module) -> list[nn.Module]:
    """The ``torch.compile`` wrappers around a model's root."""
    root = unwrap(model)
    found = []
    while model is not root:
        if "_orig_mod" in model._modules:
            found.append(model)
        model = next(iter(model.children()))
    return found


def _prompt(batch: Batch) -> Tensor | None:
    tokens = batch.kwargs.get("input_ids", batch.args[0] if batch.args else None)
    return tokens if isinstance(tokens, Tensor) and tokens.dim() == 2 and tokens.shape[1] > 1 else None


def _clone(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return tensor.clone()


def _cloned(batch: Batch) -> Batch:
    def copy(value: Any) -> Any:
        return _clone(value) if isinstance(value, Tensor) else value

    args = tuple(copy(one) for one in batch.args)
    return Batch(args, args, {name: copy(one) for name, one in batch.kwargs.items()})


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

    Raises:
        InputError: as ``autoq.tune``.
        PlanError: if the plan names layers the model lacks.
    """
    check_layers(plan, [site.name for site in find_linears(model) if site.reason is None])
    only = (lambda name, _: name in plan.layers) if plan.layers else None
    settings = Settings(loss_fn=loss_fn, eval_fn=eval_fn, seed=seed, filter_fn=only)
    tuning = Tuning(model, batches, phases, settings, None)
    tuning.prepare()
    check_layers(plan, tuning.layers)
    meter: LossMeter = tuning.meter
    differences = meter.by_phase(plan.layers)
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
