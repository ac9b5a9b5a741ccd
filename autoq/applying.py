"""Applies a plan to a model in place, says which plan a model carries, and brings the float model back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autoq import candidates
from autoq.candidates import Candidate, LinearOp, Packed
from autoq.errors import CandidateError, ModelError, PlanError
from autoq.modules import QuantLinear, find_linears, quantized_layers, replace_modules, unwrap
from autoq.plan import Plan, whole_units
from autoq.scheme import NONE, Scheme

Progress = Callable[[str, str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedLayer:
    """A layer that the plan would quantize and that was left alone.

    Attributes:
        name: the layer.
        scheme: what the plan asked for.
        reason: why it was left alone.
    """

    name: str
    scheme: Scheme
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyReport:
    """What ``apply`` did.

    Attributes:
        applied: layer → scheme of every layer that is quantized now.
        unquantized: layers planned as ``none`` whose weight, as it is, runs in autoq's kernels now.
        skipped: layers the plan quantizes that were left alone, with the reason.
        unmatched: layers the plan names and the model lacks.
        missing: linear layers of the model the plan does not name; they stay as they are. None if it names no layer.
    """

    applied: Mapping[str, Scheme]
    unquantized: tuple[str, ...]
    skipped: tuple[SkippedLayer, ...]
    unmatched: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.applied)} layers quantized"]
        if self.unquantized:
            lines.append(f"{len(self.unquantized)} layers unquantized in autoq's kernels")
        lines += [f"left alone: {one.name} ({one.scheme}): {one.reason}" for one in self.skipped]
        lines += [f"not in the model: {name}" for name in self.unmatched]
        lines += [f"not in the plan: {name}" for name in self.missing]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A layer of the model as ``apply`` sees it, an ``nn.Linear`` or replaced already."""

    name: str
    module: nn.Linear | QuantLinear
    reason: str | None
    names: tuple[str, ...]

    @property
    def original(self) -> nn.Linear | None:
        """The float layer, if it is there."""
        return self.module.original if isinstance(self.module, QuantLinear) else self.module

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.module.dtype if isinstance(self.module, QuantLinear) else self.module.weight.dtype

    @property
    def device(self) -> str:
        """The device type."""
        module = self.module
        return module.head.device.type if isinstance(module, QuantLinear) else module.weight.device.type


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
    parameter then), and as the ``nn.Linear`` they are elsewhere. A plan without layers leaves the model alone. A model
    that is quantized already can change its plan if it kept its float weights, or where the scheme stays the same.
    Parameters tied to a packed weight (an embedding) keep theirs.

    Args:
        model: plain, compiled or wrapped.
        plan: names with the prefixes ``_orig_mod.`` and ``module.`` are understood.
        keep_float: keeps the float layers beside the packed ones, so that ``restore`` works.
        strict: raises where the report would have skipped, unmatched or missing layers.
        packed: layer → its weight, packed before in the plan's scheme; the others are packed now.
        progress: called with ("apply", layer, layers packed, layers to pack).

    Returns:
        What was applied, left alone, not found and not planned, by name.

    Raises:
        PlanError: if no layer of the plan is in the model, or anything was left out and ``strict`` is set.
        CandidateError: if a scheme is unknown, or a weight cannot be packed (NaN); the layer is named.
        ModelError: if the model is quantized already and its float weights are gone.
    """
    layers = _layers(model)
    by_name = {name: layer for layer in layers for name in reversed((layer.name, *layer.names))}
    wanted: dict[str, Scheme] = {}
    for name, scheme in plan.layers.items():
        if name in by_name:
            wanted.setdefault(by_name[name].name, scheme)
    unmatched = tuple(name for name in plan.layers if name not in by_name)
    if plan.layers and not wanted:
        raise PlanError(
            "the plan names layers of this model",
            got=f"none of its {len(unmatched)} layers, such as {unmatched[0]}",
            fix="The plan is for another model.",
        )
    missing = tuple(layer.name for layer in layers if wanted and layer.reason is None and layer.name not in wanted)
    chosen, skipped = _choose([layer for layer in layers if layer.name in wanted], wanted)
    if strict and (skipped or unmatched or missing):
        raise PlanError("plan and model name the same layers", got=_differences(skipped, unmatched, missing))
    with torch.inference_mode(False), torch.no_grad():
        weights = _pack(chosen, packed or {}, progress)
        _install(model, chosen, weights, keep_float)
    carried = {layer.name: candidate.scheme for layer, candidate in chosen}
    _remember(model, _changed(plan, {name: carried.get(name, NONE) for name in wanted}))
    return ApplyReport(
        applied={name: scheme for name, scheme in carried.items() if scheme != NONE},
        unquantized=tuple(name for name in quantized_layers(model) if carried.get(name) == NONE),
        skipped=tuple(skipped),
        unmatched=unmatched,
        missing=missing,
    )


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
    replace_modules(model, {layer: _float_layer(layer) for layer in layers.values()})
    return len(layers)


def _layers(model: nn.Module) -> list[_Layer]:
    layers = [
        _Layer(name=site.name, module=site.module, reason=site.reason, names=site.aliases)
        for site in find_linears(model)
    ]
    layers += [
        _Layer(name=name, module=module, reason=None, names=()) for name, module in quantized_layers(model).items()
    ]
    return layers


def _choose(
    layers: list[_Layer], wanted: Mapping[str, Scheme]
) -> tuple[list[tuple[_Layer, Candidate]], list[SkippedLayer]]:
    """The layers that get a scheme, and those that cannot, with the reason."""
    chosen: list[tuple[_Layer, Candidate]] = []
    skipped: list[SkippedLayer] = []
    for layer in layers:
        candidate = candidates.parse(wanted[layer.name])
        reason = None
        if candidate.scheme != NONE:
            reason = layer.reason or _why_not(layer, candidate)
        if reason is None:
            chosen.append((layer, candidate))
        else:
            skipped.append(SkippedLayer(name=layer.name, scheme=candidate.scheme, reason=reason))
    return chosen, skipped


def _why_not(layer: _Layer, candidate: Candidate) -> str | None:
    module = layer.module
    op = LinearOp(
        m=1,
        k=module.in_features,
        n=module.out_features,
        dtype=layer.dtype,
        device=layer.device,
        bias=module.bias is not None,
    )
    return candidate.why_not(op)


def _pack(
    chosen: list[tuple[_Layer, Candidate]], known: Mapping[str, Packed], progress: Progress | None
) -> dict[str, Packed]:
    """The packed weights of all layers that change, but for those that become ``nn.Linear``."""
    weights: dict[str, Packed] = {}
    todo = [(layer, candidate) for layer, candidate in chosen if _changes(layer, candidate)]
    for count, (layer, candidate) in enumerate(todo):
        if progress is not None:
            progress("apply", layer.name, count, len(todo))
        shape = (layer.module.out_features, layer.module.in_features)
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


def _float_weight(layer: _Layer) -> Tensor:
    if layer.original is None:
        raise ModelError(
            "a quantized layer changes its scheme from its float weight",
            where=layer.name,
            got="a layer that did not keep it",
            fix="Apply plans with keep_float=True, or load the float model again.",
        )
    return layer.original.weight


def _is_left_alone(layer: _Layer, candidate: Candidate) -> bool:
    """Whether the layer is an ``nn.Linear`` under the scheme."""
    unplanned = candidate.scheme == NONE and layer.reason is not None
    return unplanned or candidate.leaves_alone(layer.dtype, layer.device)


def _changes(layer: _Layer, candidate: Candidate) -> bool:
    if isinstance(layer.module, QuantLinear):
        return candidate.scheme != layer.module.candidate.scheme
    return not _is_left_alone(layer, candidate)


def _install(
    model: nn.Module,
    chosen: list[tuple[_Layer, Candidate]],
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
            changes[module] = QuantLinear(
                candidate,
                weights[layer.name],
                module.bias,
                module.in_features,
                module.out_features,
                dtype=module.weight.dtype,
                original=module if keep_float else None,
            )
    replace_modules(model, changes)


def _float_layer(layer: QuantLinear) -> nn.Linear:
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
    kept = {key: value for key, value in plan.provenance.items() if key not in ("measured", "predicted")}
    return replace(plan, layers=schemes, units=whole_units(plan.units, schemes), provenance=kept | {"edited": True})


def _differences(skipped: list[SkippedLayer], unmatched: tuple[str, ...], missing: tuple[str, ...]) -> str:
    parts = [f"{one.name}: {one.reason}" for one in skipped]
    parts += [f"{name} is not in the model" for name in unmatched]
    parts += [f"{name} is not in the plan" for name in missing]
    return "; ".join(parts)
