"""Fuses siblings of a quantized model: layers that are called with the same activation run as one product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoq.errors import InputError, ModelError
from autoq.fused import FusedPart, FusedWeight
from autoq.losses import Batch
from autoq.modules import QuantLinear, evaluating, quantized_layers, replace_modules, unwrap
from autoq.quant_embedding import embeddings_of
from autoq.stacking import why_not_stacked

__all__ = ["FuseReport", "fuse", "unfuse"]

_Group = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseReport:
    """What ``fuse`` did.

    Attributes:
        fused: groups of layers that share a weight and a product now.
        left: groups of siblings (or what remains of them) that stay as they were, with the reason.
    """

    fused: tuple[_Group, ...]
    left: Mapping[_Group, str]

    def __str__(self) -> str:
        lines = [f"{sum(map(len, self.fused))} layers fused into {len(self.fused)}"]
        lines += [f"left alone: {', '.join(group)}: {reason}" for group, reason in self.left.items()]
        return "\n".join(lines)


def fuse(model: nn.Module, batch: Any = None, *, groups: Sequence[Sequence[str]] | None = None) -> FuseReport:
    """Let quantized siblings (q, k and v; gate and up) share one packed weight and one product, in place.

    Siblings are layers of one module that are called with the very same tensors; one run of the model finds them.
    Those of the same scheme, dtype and kind of bias are fused, which saves calls and meetings of threads in every
    token; the others, and those with column scales of their own (``sinq``), stay.

    The model's code, layers' names, ``state_dict``, ``save_quantized``, ``plan_of`` and ``restore`` are as before. The
    first sibling called with an activation computes the product of all, the others take views of it. Called with
    another tensor, a second time, or with one that was changed in between, a layer computes anew: right, and slower.
    In a compiled graph the product is one node, and a change in place between siblings' calls is not noticed; a model
    whose code makes such changes shows no siblings in the run. A fused layer keeps its scheme: ``unfuse`` before
    another plan is applied.

    Args:
        model: quantized, plain, compiled or wrapped.
        batch: what the model is run on once, in eval mode and uncompiled: a tensor, or a tuple or mapping of arguments.
            None takes the ``dummy_inputs`` that transformers models have.
        groups: names of the layers to fuse, instead of a run; each list is of one module's layers with one scheme.

    Returns:
        The fused groups, and the siblings that stay, with the reason.

    Raises:
        InputError: if there is neither a batch nor groups, or both.
        ModelError: if the model has no quantized layers, or a group of ``groups`` cannot be fused.
    """
    root = unwrap(model)
    layers = quantized_layers(root)
    if not layers:
        raise ModelError("fuse() needs quantized layers", got="none", fix="Apply a plan first.")
    if groups is not None and batch is not None:
        raise InputError("fuse() takes a batch or groups", got="both")
    found = _named(layers, groups) if groups is not None else _siblings(layers, _inputs(root, layers, batch))
    read = [one.source for one in embeddings_of(root).values()]
    fused: list[_Group] = []
    left: dict[_Group, str] = {}
    for part in (part for group in found for part in _alike(layers, group)):
        reason = _why_not([layers[name] for name in part], read)
        if reason is None:
            fused.append(part)
        else:
            left[part] = reason
    if groups is not None and left:
        group, reason = next(iter(left.items()))
        raise ModelError("the layers of a group can be fused", where=", ".join(group), got=reason)
    with torch.inference_mode(False), torch.no_grad():
        for group in fused:
            _fuse(root, [layers.pop(name) for name in group])
    return FuseReport(fused=tuple(fused), left=left)


def unfuse(model: nn.Module) -> int:
    """Give fused layers weights of their own again, bit-equal to what they were, in place.

    Args:
        model: plain, compiled or wrapped.

    Returns:
        How many layers were fused.
    """
    parts = [layer for layer in quantized_layers(model).values() if isinstance(layer, FusedPart)]
    with torch.inference_mode(False), torch.no_grad():
        replace_modules(model, {part: part.unfused() for part in parts})
    return len(parts)


def _fuse(root: nn.Module, layers: list[QuantLinear]) -> None:
    fused = FusedWeight(layers)
    parts: dict[nn.Module, nn.Module] = {}
    start = 0
    for layer in layers:
        parts[layer] = FusedPart(layer, fused, start, owner=not parts)
        start += layer.out_features
    replace_modules(root, parts)


def _named(layers: Mapping[str, QuantLinear], groups: Sequence[Sequence[str]]) -> list[_Group]:
    """The groups that were asked for, if they are of quantized layers of one module each."""
    found = [tuple(group) for group in groups]
    names = [name for group in found for name in group]
    for group in found:
        unknown = [name for name in group if name not in layers]
        if unknown or len(group) < 2 or len({_owner(name) for name in group}) > 1:
            raise ModelError(
                "a group is two or more quantized layers of one module", where=", ".join(group), got=unknown or None
            )
        shapes = sorted({layers[name].in_features for name in group})
        if len(shapes) > 1:
            raise ModelError("the layers of a group have as many inputs", where=", ".join(group), got=shapes)
    if len(set(names)) < len(names):
        raise ModelError("a layer is in one group", got=next(name for name in names if names.count(name) > 1))
    return found


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _inputs(root: nn.Module, layers: Mapping[str, QuantLinear], batch: Any) -> dict[str, list[tuple[int, int]]]:
    """Layer → the number and version of each tensor it was called with, in one run."""
    given = getattr(root, "dummy_inputs", None) if batch is None else batch
    if given is None:
        raise InputError(
            "fuse() runs the model once to see which layers are called with the same tensors",
            got="no batch",
            fix="Pass a batch, or groups=[[…], …] with the layers' names.",
        )
    seen: dict[str, list[tuple[int, int]]] = {}
    tensors: dict[int, Tensor] = {}  # kept meanwhile, so that no other one gets the same number
    with torch.inference_mode(False), torch.no_grad(), evaluating(root), torch.compiler.set_stance("force_eager"):
        handles = [
            layer.register_forward_pre_hook(_Watch(name, seen, tensors), with_kwargs=True)
            for name, layer in layers.items()
        ]
        try:
            Batch.of(given).call(root)
        finally:
            for handle in handles:
                handle.remove()
    return seen


class _Watch:
    """Notes what a layer is called with."""

    def __init__(self, name: str, seen: dict[str, list[tuple[int, int]]], tensors: dict[int, Tensor]) -> None:
        self._name, self._seen, self._tensors = name, seen, tensors

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else kwargs["x"]
        self._tensors[id(x)] = x
        self._seen.setdefault(self._name, []).append((id(x), 0 if x.is_inference() else x._version))


def _siblings(layers: Mapping[str, QuantLinear], seen: Mapping[str, list[tuple[int, int]]]) -> list[_Group]:
    """Layers of one module that were called with the same tensors, each as often, in the layers' order."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in layers.items():
        if name in seen and not isinstance(layer, FusedPart):
            found.setdefault((_owner(name), *seen[name]), []).append(name)
    return [tuple(group) for group in found.values() if len(group) > 1]


def _alike(layers: Mapping[str, QuantLinear], group: _Group) -> Iterator[_Group]:
    """A group's parts of one scheme, dtype, device, kind of bias and mode."""
    parts: dict[tuple[Any, ...], list[str]] = {}
    for name in group:
        layer = layers[name]
        bias = None if layer.bias is None else layer.bias.dtype
        parts.setdefault((layer.candidate.scheme, layer.dtype, layer.packed.device, bias), []).append(name)
    yield from map(tuple, parts.values())


def _why_not(members: Sequence[QuantLinear], read: Sequence[QuantLinear]) -> str | None:
    if len(members) == 1:
        return "none of its siblings has its scheme, dtype and bias"
    if any(isinstance(layer, FusedPart) for layer in members):
        return "they are fused already"
    if any(layer in read for layer in members):
        return "an embedding reads the weight of one of them"
    if any(layer.under_adapter for layer in members):
        return "an adapter is beside one of them"
    if any(layer.packed.is_meta for layer in members):
        return "they have no values"
    return why_not_stacked([layer.packed for layer in members])
