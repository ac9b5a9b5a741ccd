"""The user's ``nn.Module``: its linear layers found, judged and replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoq.errors import ModelError
from autoq.linear_layers import has_own_forward, is_linear, size_of, weight_of
from autoq.plan import plain_name
from autoq.quant_linear import QuantLinear

__all__ = [
    "FilterFn",
    "LinearSite",
    "QuantLinear",
    "check_weights",
    "compile_arguments",
    "evaluating",
    "find_linears",
    "place_of",
    "quantized_layers",
    "replace_module",
    "replace_modules",
    "unwrap",
]

FilterFn = Callable[[str, nn.Module], bool]

_ADAPTED = "base_layer"  # what PEFT calls the layer beside its adapters

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
        module: the layer: an ``nn.Linear``, or a ``Conv1D`` of transformers.
        aliases: other names under which the same module appears.
        tied_to: name of another parameter that shares the weight (an embedding), or None. Quantizing the layer leaves
            that parameter as it is.
        reason: why autoq leaves the layer alone, or None when it may be quantized.
    """

    name: str
    module: nn.Module
    aliases: tuple[str, ...] = ()
    tied_to: str | None = None
    reason: str | None = None


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
    """Every linear layer of a model in definition order, each module once, with the reason where it is left alone.

    Linear layers are ``nn.Linear`` and the ``Conv1D`` of transformers (GPT-2).

    Args:
        model: compiled and wrapped models are looked through.
        filter_fn: called with a layer's name and module; False leaves the layer alone.

    Raises:
        ModelError: if two layers have one name but for wrappers' prefixes.
    """
    root = unwrap(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        if is_linear(module):
            names.setdefault(module, []).append(plain_name(name))
    _check_distinct(names)
    foreign = _read_by_parent(root) | _adapters(root)
    sharded = tuple(
        f"{plain_name(name)}." if name else ""
        for name, module in root.named_modules()
        if type(module).__name__ == "FullyShardedDataParallel"  # by name: importing FSDP takes a second
    )
    holders = _parameter_names(root)
    sites = []
    for module, found in names.items():
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
                parent._modules[name] = new = changes[child]
                if isinstance(new, QuantLinear) and name == _ADAPTED:
                    new.under_adapter = True


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


def _adapters(root: nn.Module) -> dict[nn.Module, str]:
    """What PEFT puts beside a layer, or in its place, to be trained: quantized, it could not be trained or merged."""
    found: dict[nn.Module, str] = {}
    for children in (one._modules for one in root.modules()):
        if children.get(_ADAPTED) is not None:
            beside = [child for name, child in children.items() if name.startswith("lora_") and child]
            found |= dict.fromkeys(_linears_in(beside), "it is a LoRA adapter")
        if children.get("original_module") is not None and children.get("modules_to_save") is not None:
            found |= dict.fromkeys(_linears_in([children["modules_to_save"]]), "PEFT trains it (modules_to_save)")
    return found


def _linears_in(modules: Iterable[nn.Module | None]) -> list[nn.Module]:
    return [layer for module in modules if module for layer in module.modules() if is_linear(layer)]


def _why_left_alone(module: nn.Module) -> str | None:  # noqa: PLR0911 (one return per rule)
    """The first thing about the layer that forbids replacing it, or None."""
    kind = type(module)
    weight = module._parameters.get("weight")
    if hasattr(module, "parametrizations"):  # before its class: parametrize makes a subclass
        return "its weight is parametrized"
    if weight is None:
        return "its weight is computed from other parameters (pruning, weight or spectral norm)"
    if has_own_forward(module):
        base = "nn.Linear" if isinstance(module, nn.Linear) else "Conv1D"
        return f"{kind.__name__} is a subclass of {base} with its own forward"
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
    if tuple(weight_of(module).shape) != size_of(module):
        return f"its weight has shape {list(weight.shape)} (sharded?)"
    return None


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors share when one is the other's memory: device, address and, where there is none, identity."""
    address = 0 if tensor.is_meta or type(tensor).__name__ == "DTensor" else tensor.data_ptr()
    return (tensor.device, address) if address else (id(tensor),)


def _parameter_names(root: nn.Module) -> dict[tuple[Any, ...], list[str]]:
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(place_of(parameter), []).append(plain_name(name))
    return names


def _tied_to(module: nn.Module, names: list[str], holders: Mapping[tuple[Any, ...], list[str]]) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    own = {f"{name}.weight" for name in names}
    return next((name for name in holders.get(place_of(weight), ()) if name not in own), None)


def check_weights(model: nn.Module, filter_fn: FilterFn | None = None) -> None:
    """Refuse a model without a linear layer that may be quantized, or with NaN or infinite weights in one.

    Raises:
        ModelError: naming the layer.
    """
    sites = find_linears(model, filter_fn)
    if not sites:
        raise ModelError(
            "the model has linear layers (nn.Linear, or Conv1D of transformers)",
            where=type(model).__name__,
            got="none",
            fix="autoq quantizes linear layers only; convolutions and other weights stay as they are.",
        )
    if all(site.reason is not None for site in sites):
        raise ModelError(
            "the model has a linear layer that may be quantized",
            got="; ".join(f"{site.name}: {site.reason}" for site in sites[:5]),
            fix="Load the weights into memory first where they are on the meta device or offloaded.",
        )
    for site in sites:
        if site.reason is None and not bool((finite := torch.isfinite(weight_of(site.module))).all()):
            count = int((~finite).sum())
            raise ModelError(
                "weights must be finite numbers",
                where=site.name,
                got=f"{count} NaN or infinite values",
                fix="Repair the checkpoint, or leave the layer out with filter_fn.",
            )


def compile_arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments a model was compiled with, wrapped or in place, as far as ``torch.compile`` keeps them.

    Empty if it was not compiled.
    """
    context = getattr(model, "dynamo_ctx", None)
    call = unwrap(model)._compiled_call_impl
    reader: Any = getattr(call, "get_compiler_config", None)
    if context is None and reader is not None:  # model.compile(): the context is what this function reads
        context = dict(zip(reader.__code__.co_freevars, reader.__closure__, strict=True))["self"].cell_contents
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
