"""The user's ``nn.Module``: its linear layers found, judged and replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoq.errors import ModelError
from autoq.plan import plain_name
from autoq.quant_linear import QuantLinear

__all__ = [
    "FilterFn",
    "LinearSite",
    "OtherWeight",
    "QuantLinear",
    "check_weights",
    "compile_arguments",
    "evaluating",
    "find_linears",
    "other_weights",
    "quantized_layers",
    "replace_module",
    "replace_modules",
    "unwrap",
]

FilterFn = Callable[[str, nn.Linear], bool]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSite:
    """One linear layer in a model.

    Attributes:
        name: its qualified name, without the prefixes of torch.compile and DistributedDataParallel.
        module: the layer.
        aliases: other names under which the same module appears.
        tied_to: name of another parameter that shares the weight (an embedding), or None. Quantizing the layer leaves
            that parameter as it is.
        reason: why autoq leaves the layer alone, or None when it may be quantized.
    """

    name: str
    module: nn.Linear
    aliases: tuple[str, ...] = ()
    tied_to: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherWeight:
    """A weight that multiplies but is no ``nn.Linear``, so autoq leaves it alone.

    Attributes:
        name: the parameter's qualified name.
        kind: what it is, such as ``transformers Conv1D`` or ``3-D parameter (experts)``.
        size_bytes: of its data.
        share: ``size_bytes`` over the bytes of all the model's parameters, each storage counted once; 0 to 1.
    """

    name: str
    kind: str
    size_bytes: int
    share: float


def device_of(model: nn.Module) -> str:
    """The device of a model's first parameter, such as ``"cuda:0"``; the CPU for a model without parameters."""
    return str(next((parameter.device for parameter in model.parameters()), "cpu"))


def unwrap(model: nn.Module) -> nn.Module:
    """The module under ``torch.compile`` and (Distributed)DataParallel wrappers."""
    while True:
        children = model._modules
        compiled = children.get("_orig_mod")  # torch._dynamo.OptimizedModule, without importing dynamo
        if compiled is not None:
            model = compiled
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def find_linears(model: nn.Module, filter_fn: FilterFn | None = None) -> tuple[LinearSite, ...]:
    """Every ``nn.Linear`` of a model in definition order, each module once, with the reason where it is left alone.

    Args:
        model: compiled and wrapped models are looked through.
        filter_fn: called with a layer's name and module; False leaves the layer alone.

    Raises:
        ModelError: if two layers have one name but for wrappers' prefixes.
    """
    root = unwrap(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and module.in_features > 0 and module.out_features > 0:
            names.setdefault(module, []).append(plain_name(name))
    _check_distinct(names)
    foreign = _read_by_parent(root)
    sharded = tuple(
        f"{plain_name(name)}." if name else ""
        for name, module in root.named_modules()
        if type(module).__name__ == "FullyShardedDataParallel"  # by name: importing FSDP takes a second
    )
    holders = _parameter_names(root)
    sites = []
    for module, found in names.items():
        assert isinstance(module, nn.Linear)  # for the type checker: only such were collected
        name = found[0]
        reason = foreign.get(module) or _why_left_alone(module)
        if reason is None and name.startswith(sharded):
            reason = "its weight is sharded by FullyShardedDataParallel"
        if reason is None and filter_fn is not None and not filter_fn(name, module):
            reason = "left alone by filter_fn"
        sites.append(
            LinearSite(
                name=name,
                module=module,
                aliases=tuple(dict.fromkeys(one for one in found[1:] if one != name)),
                tied_to=_tied_to(module, found, holders),
                reason=reason,
            )
        )
    return tuple(sites)


def other_weights(model: nn.Module) -> tuple[OtherWeight, ...]:
    """Matrix weights autoq does not handle, largest first: transformers' ``Conv1D``, experts as 3-D parameters."""
    root = unwrap(model)
    total = sum({_place(p): p.nbytes for p in root.parameters()}.values())
    found: list[OtherWeight] = []
    for path, module in root.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.EmbeddingBag):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            kind = _kind(module, parameter)
            if kind:
                name = plain_name(f"{path}.{leaf}" if path else leaf)
                share = parameter.nbytes / max(1, total)
                found.append(OtherWeight(name=name, kind=kind, size_bytes=parameter.nbytes, share=share))
    return tuple(sorted(found, key=lambda one: -one.size_bytes))


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers of a model by name, each module once, in definition order."""
    return {
        plain_name(name): module for name, module in unwrap(model).named_modules() if isinstance(module, QuantLinear)
    }


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one called ``name``, under all its names; hooks and mode move along."""
    replace_modules(model, {unwrap(model).get_submodule(name): module})


def replace_modules(model: nn.Module, changes: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the places of some, wherever they appear in the model; hooks and mode move along.

    Args:
        model: changed in place.
        changes: module of the model → its replacement.
    """
    for old, new in changes.items():
        new.training = old.training
        for hooks in _HOOKS:  # the same dictionaries, so that the user's handles still remove them
            new.__dict__[hooks] = old.__dict__[hooks]
    for parent in list(unwrap(model).modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in changes:
                parent._modules[name] = changes[child]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards each module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _check_distinct(names: Mapping[nn.Module, list[str]]) -> None:
    owners: dict[str, nn.Module] = {}
    for module, found in names.items():
        for name in found:
            if owners.setdefault(name, module) is not module:
                raise ModelError(
                    "a layer's name is its own also without the prefixes of wrappers (_orig_mod., module., PEFT's)",
                    where=name,
                    got="two layers of that name",
                    fix="Rename the part of the model that is called like a wrapper's.",
                )


def _read_by_parent(root: nn.Module) -> dict[nn.Module, str]:
    """Layers whose parents are known to read ``.weight`` instead of calling them."""
    reason = "nn.MultiheadAttention reads its weight directly"
    return {one.out_proj: reason for one in root.modules() if isinstance(one, nn.MultiheadAttention)}


def _why_left_alone(module: nn.Linear) -> str | None:  # noqa: PLR0911 (one return per rule)
    """The first thing about the layer that forbids replacing it, or None."""
    kind = type(module)
    weight = module._parameters.get("weight")
    if hasattr(module, "parametrizations"):  # before its class: parametrize makes a subclass
        return "its weight is parametrized"
    if weight is None:
        return "its weight is computed from other parameters (pruning, weight or spectral norm)"
    if kind.forward is not nn.Linear.forward:
        return f"{kind.__name__} is a subclass of nn.Linear with its own forward"
    if weight.is_meta:
        offloaded = hasattr(module, "_hf_hook")
        return "its weight is offloaded" if offloaded else "its weight is on the meta device"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance (offloading hooks do this)"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if weight.layout is not torch.strided:
        return f"its weight is {weight.layout}"
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its weight is {weight.dtype}".replace("torch.", "")
    if tuple(weight.shape) != (module.out_features, module.in_features):
        return f"its weight has shape {list(weight.shape)} (sharded?)"
    return None


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors share when one is the other's memory: device, address and, where there is none, identity."""
    address = 0 if tensor.is_meta or type(tensor).__name__ == "DTensor" else tensor.data_ptr()
    return (tensor.device, address) if address else (id(tensor),)


def _parameter_names(root: nn.Module) -> dict[tuple[Any, ...], list[str]]:
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(_place(parameter), []).append(plain_name(name))
    return names


def _tied_to(module: nn.Linear, names: list[str], holders: Mapping[tuple[Any, ...], list[str]]) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    own = {f"{name}.weight" for name in names}
    return next((name for name in holders.get(_place(weight), ()) if name not in own), None)


def _kind(module: nn.Module, parameter: nn.Parameter) -> str:
    """What a matrix weight outside the linears is; empty when it is none."""
    if type(module).__name__ == "Conv1D" and parameter.dim() == 2:
        return "transformers Conv1D"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution" if parameter.dim() >= 3 else ""
    if isinstance(module, nn.MultiheadAttention) and parameter.dim() == 2:
        return "nn.MultiheadAttention projection"
    if isinstance(module, nn.RNNBase) and parameter.dim() == 2:
        return "recurrent layer"
    if parameter.dim() == 3 and parameter.is_floating_point():
        return "3-D parameter (experts)"
    return ""


def check_weights(model: nn.Module, filter_fn: FilterFn | None = None) -> None:
    """Refuse a model without linear layers, or with NaN or infinite weights in one that may be quantized.

    Raises:
        ModelError: naming the layer.
    """
    sites = find_linears(model, filter_fn)
    if not sites:
        raise ModelError(
            "the model has linear layers (nn.Linear)",
            where=type(model).__name__,
            got="none",
            fix="autoq quantizes nn.Linear only; convolutions and other weights stay as they are.",
        )
    for site in sites:
        if site.reason is None and not bool(torch.isfinite(site.module.weight).all()):
            count = int((~torch.isfinite(site.module.weight)).sum())
            raise ModelError(
                "weights must be finite numbers",
                where=site.name,
                got=f"{count} NaN or infinite values",
                fix="Repair the checkpoint, or leave the layer out with filter_fn.",
            )


def compile_arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments a compiled model was compiled with, as far as ``torch.compile`` keeps them; empty if it was not."""
    context = getattr(model, "dynamo_ctx", None)
    if context is None:
        return {}
    found: dict[str, Any] = {}
    backend = getattr(context, "callback", None)
    while (inner := getattr(backend, "_torchdynamo_orig_backend", None)) is not None:
        backend = inner
    if callable(backend):
        found["backend"] = backend
    if getattr(context, "_dynamic", None) is not None:
        found["dynamic"] = context._dynamic
    return found
