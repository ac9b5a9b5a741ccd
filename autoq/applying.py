"""Applies a plan to a model in place, says which plan a model carries, and brings the float model back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoq import candidates
from autoq.apply_report import ApplyReport, SkippedLayer
from autoq.candidates import Candidate, Packed
from autoq.device_check import stale_figures
from autoq.errors import CandidateError, ModelError, PlanError
from autoq.fitting import Layer, fit
from autoq.fused import FusedPart
from autoq.hf_marks import mark
from autoq.linear_layers import bias_of, weight_of
from autoq.modules import QuantLinear, quantized_layers, replace_modules, unwrap
from autoq.other_weights import other_weights
from autoq.plan import Plan
from autoq.quant_embedding import embeddings_of
from autoq.scheme import NONE, Scheme

__all__ = ["ApplyReport", "SkippedLayer", "apply", "plan_of", "restore"]

Progress = Callable[[str, str, int, int], None]


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    keep_float: bool = False,
    strict: bool = False,
    packed: Mapping[str, Packed] | None = None,
    progress: Progress | None = None,
) -> ApplyReport:
    """Quantize a model's linear layers as a plan says, in place.

    All weights are packed before the first layer is replaced: after an error the model is as it was. Layers planned as
    ``none`` keep their weight: in autoq's kernels where those are faster (bfloat16 and float16 on the CPU; it is no
    parameter then), and as the layer they are elsewhere. A plan without layers leaves the layers alone. A model
    that is quantized already can change its plan if it kept its float weights, or where the scheme stays the same.
    Parameters tied to a packed weight (an embedding) keep theirs. A transformers model gets the attention that the
    plan's section ``model`` names, if it names one, and keeps it when layers are restored.

    Args:
        model: plain, compiled or wrapped.
        plan: names with the prefixes ``_orig_mod.``, ``module.`` and PEFT's are understood; ``plan.rebase`` finds those
            with others.
        keep_float: keeps the float layers beside the packed ones, so that ``restore`` works.
        strict: raises, before anything is packed, where the report would have skipped, unmatched, missing or slow
            layers.
        packed: layer → its weight, packed before in the plan's scheme; the others are packed now.
        progress: called with ("apply", layer, layers packed, layers to pack).

    Returns:
        What was applied, left alone, not found and not planned, by name; which weights no plan can quantize; which of
        the plan's figures are stale on this device, and which of its schemes are slow there. The slow ones are logged
        before anything is packed.

    Raises:
        PlanError: if no layer of the plan is in the model, anything was left out and ``strict`` is set, or the model
            cannot have the plan's attention.
        CandidateError: if a scheme is unknown, or a weight cannot be packed (NaN); the layer is named.
        ModelError: if the model is quantized already and its float weights are gone.
    """
    attention = _attention_of(model, plan)
    found = fit(model, plan, strict=strict)
    stale = stale_figures(plan, found.chosen[0][0].device) if found.chosen else ()
    others = other_weights(model)
    _check_unread(model, [layer.module for layer, candidate in found.chosen if _becomes_float(layer, candidate)])
    with torch.inference_mode(False), torch.no_grad():
        weights = _pack(found.chosen, packed or {}, progress)
        _install(model, found.chosen, weights, keep_float)
    if attention is not None:
        use_attention(model, attention)
    carried = {layer.name: candidate.scheme for layer, candidate in found.chosen}
    _remember(model, _changed(plan, {name: carried.get(name, NONE) for name in found.wanted}))
    mark(model)
    return ApplyReport(
        applied={name: scheme for name, scheme in carried.items() if scheme != NONE},
        unquantized=tuple(name for name in quantized_layers(model) if carried.get(name) == NONE),
        skipped=found.skipped,
        unmatched=found.unmatched,
        missing=found.missing,
        stale=stale,
        slow=found.slow,
        others=others,
        attention=attention,
    )


def use_attention(model: nn.Module, name: str) -> None:
    """Give a transformers model another attention, by the name that transformers knows it by."""
    import autoq.attention  # noqa: F401  (registers autoq's)

    root: Any = unwrap(model)
    root.set_attn_implementation(name)


def _attention_of(model: nn.Module, plan: Plan) -> str | None:
    """Transformers' name of the attention that a plan decided on; None where it says nothing."""
    wanted = plan.model.get("attention")
    if wanted is not None and (wanted != "autoq" or not hasattr(unwrap(model), "set_attn_implementation")):
        raise PlanError(
            "$.model.attention is autoq, for a model of transformers",
            got=f"{wanted} for {type(unwrap(model)).__name__}",
        )
    return None if wanted is None else str(wanted)


def plan_of(model: nn.Module) -> Plan | None:
    """The plan a model carries, with its provenance; None if autoq runs none of its layers.

    The layers' own schemes count: layers that were restored or replaced since are left out or updated.
    """
    layers = quantized_layers(model)
    if not layers:
        return None
    text = next((layer.plan_json for layer in layers.values() if layer.plan_json), None)
    plan = Plan(layers={}) if text is None else Plan.from_json(json.loads(text))
    schemes = dict.fromkeys(plan.layers, NONE) | {name: layer.candidate.scheme for name, layer in layers.items()}
    return _changed(plan, schemes)


def restore(model: nn.Module) -> int:
    """Bring the float layers back that ``apply(keep_float=True)`` replaced; all of them or, on an error, none.

    They come back on the model's present device and in its present dtype; unmoved ones are bit-equal to before.

    Returns:
        How many layers were restored; 0 if autoq ran none.

    Raises:
        ModelError: if a layer did not keep its float weight.
    """
    layers = quantized_layers(model)
    gone = [name for name, layer in layers.items() if layer.original is None]
    if gone:
        raise ModelError(
            "restore() needs the float weights",
            where=gone[0],
            got=f"{len(gone)} of {len(layers)} quantized layers without them",
            fix="Apply the plan with keep_float=True, or load the float model again.",
        )
    _check_unread(model, list(layers.values()))
    replace_modules(model, {layer: _float_layer(layer) for layer in layers.values()})
    mark(model)
    return len(layers)


def _pack(
    chosen: Sequence[tuple[Layer, Candidate]], known: Mapping[str, Packed], progress: Progress | None
) -> dict[str, Packed]:
    """The packed weights of all layers that change, but for those that become float layers."""
    weights: dict[str, Packed] = {}
    todo = [(layer, candidate) for layer, candidate in chosen if _changes(layer, candidate)]
    _check_free(todo)
    for count, (layer, candidate) in enumerate(todo):
        if progress is not None:
            progress("apply", layer.name, count, len(todo))
        shape = layer.size
        if _is_left_alone(layer, candidate):
            _float_weight(layer)
        elif layer.name not in known:
            weight = _float_weight(layer)
            weight = weight.to(layer.dtype) if candidate.scheme == NONE else weight
            weights[layer.name] = candidate.pack(weight, layer=layer.name)
        elif known[layer.name].shape == shape:
            weights[layer.name] = known[layer.name]
        else:
            raise CandidateError(f"its packed weight has shape {shape}", where=layer.name, got=known[layer.name].shape)
    return weights


def _check_free(todo: Sequence[tuple[Layer, Candidate]]) -> None:
    """Refuse to change layers that are fused."""
    fused = next(((layer.name, candidate) for layer, candidate in todo if isinstance(layer.module, FusedPart)), None)
    if fused is not None:
        name, candidate = fused
        raise ModelError(
            "a fused layer keeps its scheme", where=name, got=candidate.scheme, fix="Call autoq.unfuse(model) first."
        )


def _check_unread(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Refuse to make layers float again whose packed weight an embedding reads."""
    read = next((name for name, one in embeddings_of(unwrap(model)).items() if one.source in layers), None)
    if read is not None:
        raise ModelError(
            "a layer stays quantized while an embedding reads its weight (autoq.share_embedding)",
            where=read,
            fix="Load the model again.",
        )


def _float_weight(layer: Layer) -> Tensor:
    if layer.original is None:
        raise ModelError(
            "a quantized layer changes its scheme from its float weight",
            where=layer.name,
            got="a layer that did not keep it",
            fix="Apply plans with keep_float=True, or load the float model again.",
        )
    return weight_of(layer.original)


def _is_left_alone(layer: Layer, candidate: Candidate) -> bool:
    """Whether the layer is a float layer under the scheme."""
    unplanned = candidate.scheme == NONE and layer.reason is not None
    return unplanned or candidate.leaves_alone(layer.dtype, layer.device)


def _becomes_float(layer: Layer, candidate: Candidate) -> bool:
    return _changes(layer, candidate) and _is_left_alone(layer, candidate)


def _changes(layer: Layer, candidate: Candidate) -> bool:
    if isinstance(layer.module, QuantLinear):
        return candidate.scheme != layer.module.candidate.scheme
    return not _is_left_alone(layer, candidate)


def _install(
    model: nn.Module,
    chosen: Sequence[tuple[Layer, Candidate]],
    weights: Mapping[str, Packed],
    keep_float: bool,
) -> None:
    """Make all changes; nothing here fails."""
    changes: dict[nn.Module, nn.Module] = {}
    for layer, candidate in chosen:
        module = layer.module
        if isinstance(module, QuantLinear):
            if layer.name in weights:
                module.set_packed(weights[layer.name], candidate)
            elif _changes(layer, candidate):
                changes[module] = _float_layer(module)
        elif layer.name in weights:
            n, k = layer.size
            changes[module] = QuantLinear(
                candidate,
                weights[layer.name],
                bias_of(module),
                k,
                n,
                dtype=layer.dtype,
                original=module if keep_float else None,
            )
    replace_modules(model, changes)


def _float_layer(layer: QuantLinear) -> nn.Module:
    original = layer.original
    if original is None:
        raise ModelError("the layer kept its float weight", fix="Apply the plan with keep_float=True.")
    original.register_parameter("bias", layer.bias)
    return original.to(device=layer.head.device, dtype=layer.dtype)


def _remember(model: nn.Module, plan: Plan) -> None:
    """Keep the plan's text on the first quantized layer: the model's copies and pickles then carry it."""
    layers = list(quantized_layers(unwrap(model)).values())
    for layer in layers:
        layer.plan_json = None
    if layers:
        layers[0].plan_json = json.dumps(plan.to_json())


def _changed(plan: Plan, schemes: Mapping[str, Scheme]) -> Plan:
    """The plan with these layers; the plan itself if they are what it says, else without its measured figures."""
    if schemes == {name: candidates.parse(scheme).scheme for name, scheme in plan.layers.items()}:
        return plan
    return plan.edited(schemes)
