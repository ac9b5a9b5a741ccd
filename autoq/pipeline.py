"""The two calls that measure a model without changing it: ``tune`` finds its plan, ``record`` its workload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from autoq import candidates as schemes
from autoq import search
from autoq.calibration import Progress
from autoq.candidates import Candidate
from autoq.errors import CandidateError, ModelError
from autoq.evaluation import EvalFn
from autoq.losses import LossFn
from autoq.modules import FilterFn, device_of, evaluating, unwrap
from autoq.recorder import record as record_inputs
from autoq.results import TRIALS, Settings, TuneResult
from autoq.scheme import NONE, Scheme
from autoq.ties import Ties, checked
from autoq.tuning import Tuning
from autoq.workload import Phase, Workload


def tune(
    model: nn.Module,
    batches: Any = None,
    *,
    phases: Mapping[str, Phase] | None = None,
    loss_fn: LossFn | None = None,
    eval_fn: EvalFn | None = None,
    candidates: Sequence[Candidate | Scheme | str] | None = None,
    max_degradation: float = 0.01,
    max_increase: float | None = None,
    objective: search.Objective = "latency",
    max_latency_us: float | None = None,
    max_weight_bytes: int | None = None,
    cache_dir: str | Path | None = None,
    profile_from: str | None = None,
    filter_fn: FilterFn | None = None,
    n_trials: int | None = None,
    storage: str | None = None,
    ties: Ties | None = None,
    kv_cache: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> TuneResult:
    """Find the plan for a model. The model itself is not changed; ``autoq.apply`` does that.

    Args:
        model: compiled with ``torch.compile`` or not.
        batches: inputs by which accuracy is judged: a tensor, a mapping of keyword arguments, a tuple of positional
            ones, or a sequence of these. For a causal language model, token rows int64 [rows, length].
        phases: what latency is measured on, by name; by default the batches themselves, and for a causal language
            model a prompt and single-token decoding after it.
        loss_fn: ``loss_fn(outputs, batch) -> Tensor[samples]``, differentiable. Default: token NLL for causal language
            models, KL to the unquantized model for other logits, relative RMS of the outputs otherwise.
        eval_fn: ``eval_fn(model) -> float`` or a 1-D tensor of losses per sample, lower is better; judges plans instead
            of ``loss_fn``, whose gradients still predict.
        candidates: schemes to choose from; default ``autoq.candidates.DEFAULT``.
        max_degradation: how much worse the metric may get, relative to |baseline| (for token NLL: of the perplexity).
            A KL divergence has no baseline; its limit is 0.01 nats, or ``max_increase``.
        max_increase: the same, absolute in the metric's unit.
        objective: what is minimised: ``latency`` (µs per request), ``memory`` (bytes of weights) or ``loss``.
        max_latency_us: limit on the request's latency.
        max_weight_bytes: limit on the bytes of weights.
        cache_dir: where measurements are kept; default ``~/.cache/autoq``.
        profile_from: key of another device's profile in the cache (``autoq cache ls``), whose ratios predict the shapes
            that were not measured here. Every product is still checked here, and finalists are timed here.
        filter_fn: ``filter_fn(name, linear) -> bool``; False leaves a layer alone.
        n_trials: plans whose loss is measured, at most.
        storage: Optuna storage URL, or ``journal:PATH``; default a journal file in ``cache_dir``.
        ties: which layers get one scheme together. By default (``layers``) each decides alone. ``siblings``: those that
            the same module calls with the same inputs (q, k and v; gate and up), and a block's experts role by role.
            Regular expressions tie the layers whose whole names they match with the same captured groups, such as
            ``(.*)[.](?:q|k|v)_proj``; among them, ``siblings`` stands for the siblings that no expression matches.
        kv_cache: of a causal language model: precisions (``none``, ``int8``, ``int4``) of the KV cache to try under the
            plan that was found, with autoq's attention. The best within the budget, the model's own attention
            included, becomes the plan's section ``model``, which ``apply`` and ``generate`` heed.
        seed: the same seed and the same measurements give the same plan.
        progress: called with (stage, text, done, total).

    Returns:
        The plan and all tables. If nothing is faster within the budget, the plan leaves every layer alone and a note
        says so.

    Raises:
        InputError: batches, phases or limits are not usable, or a loss is NaN.
        ModelError: the model has no linear layer that can be quantized, or NaN weights.
        CacheError: the cache folder cannot be written, a file in it is damaged, or has no profile ``profile_from``.
        SearchError: the storage cannot be used.
    """
    settings = Settings(
        loss_fn=loss_fn,
        eval_fn=eval_fn,
        candidates=_candidates(candidates),
        max_degradation=max_degradation,
        max_increase=max_increase,
        objective=objective,
        max_latency_us=max_latency_us,
        max_weight_bytes=max_weight_bytes,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        profile_from=profile_from,
        filter_fn=filter_fn,
        n_trials=TRIALS if n_trials is None else n_trials,
        storage=storage,
        ties=checked(ties),
        kv_cache=tuple(dict.fromkeys(kv_cache)),
        seed=seed,
    )
    with evaluating(unwrap(model)):
        return Tuning(model, batches, phases, settings, progress).run()


def record(
    model: nn.Module,
    batches: Any = None,
    *,
    phases: Mapping[str, Phase] | None = None,
    filter_fn: FilterFn | None = None,
) -> Workload:
    """Record which linear layers a model runs, on which shapes and how often; nothing is measured.

    Args:
        model: compiled with ``torch.compile`` or not; it runs uncompiled, in eval mode, and is not changed.
        batches: a tensor, a mapping of keyword arguments, a tuple of positional ones, or a sequence of these.
        phases: instead, the inputs of each phase by its name.
        filter_fn: ``filter_fn(name, linear) -> bool``; False leaves a layer alone.

    Raises:
        InputError: if there are no inputs, or both kinds.
        ModelError: if the model has no linear layer, or is on the meta device, without values to run with.
    """
    if device_of(model) == "meta" and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ModelError(
            "recording runs the model, so its weights are in memory",
            where=type(unwrap(model)).__name__,
            got="weights on the meta device",
            fix="Load them first.",
        )
    return record_inputs(model, batches, phases=phases, filter_fn=filter_fn, samples_per_layer=0).workload


def _candidates(given: Sequence[Candidate | Scheme | str] | None) -> tuple[Candidate, ...]:
    """The candidates to search, ``none`` first and each once."""
    found = [_known(one) if isinstance(one, Candidate) else schemes.parse(one) for one in given or schemes.DEFAULT]
    none = schemes.parse(NONE)
    return tuple(dict.fromkeys([none, *found]))


def _known(candidate: Candidate) -> Candidate:
    """The candidate, if it is what a plan that names its scheme would give."""
    found = schemes.parse(candidate.scheme)
    if found != candidate:
        raise CandidateError(
            f"the scheme {candidate.key} is {type(candidate).__qualname__}",
            got=f"{type(found).__module__}.{type(found).__qualname__}, which plans mean by it",
            fix="Give your class a key of its own, and install it as a plugin (docs/plugins.md).",
        )
    return candidate
