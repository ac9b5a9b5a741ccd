"""A checkpoint's tensors put into a model: everything is checked and read before the first of them is."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoq.candidates import Candidate
from autoq.checkpoint_files import PLAN, Checkpoint
from autoq.errors import AutoqError, CheckpointError
from autoq.linear_layers import bias_of, size_of, weight_of
from autoq.modules import QuantLinear, find_linears, replace_modules, unwrap
from autoq.plan import Plan, plain_name
from autoq.quant_linear import PackedModule
from autoq.sections import HEADER, Unfilled, allocate, finished
from autoq.shards import Form

_MISFIT = "Pass a float model of the same structure as the one that was saved."
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class _Undrawn(TorchFunctionMode):
    """Leaves meta tensors as they are where a module draws its first values: there are none, and drawing takes time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in _DRAWING:
            tensor = args[0] if args else given.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **given)


_DRAWING = frozenset(
    {
        *(one for name, one in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")),
        *(getattr(Tensor, name) for name in ("fill_", "normal_", "uniform_", "zero_")),
    }
)


@contextmanager
def without_collection() -> Iterator[None]:
    """No cyclic garbage collection meanwhile.

    Building a model makes many objects and no garbage, but their number sets off a full collection, which in a process
    with torch and transformers imported takes as long as loading a small model.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def skeleton(factory: Callable[[], nn.Module]) -> nn.Module | None:
    """The factory's model on the meta device, without values; None if it cannot be built so."""
    # Building on the meta device fails with these wherever a value is needed.
    with suppress(RuntimeError, NotImplementedError, ValueError, TypeError):
        with torch.device("meta"), _Undrawn():
            model = factory()
        plain = (value for module in model.modules() for value in vars(module).values())
        if not any(isinstance(value, Tensor) and value.is_meta for value in plain):
            return model
    return None


def stored_name(layer: str, section: str) -> str:
    """A section's name in tensor files.

    The header has the name of the float weight: a program that does not know autoq finds a weight of another shape and
    stops, where it would else miss a weight and make one up.
    """
    return f"{layer}.weight" if section == HEADER else f"{layer}.{section}"


def install(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Check that model and checkpoint fit, read the tensors, and put them into the model.

    Args:
        model: changed in place, or after an error not at all.
        checkpoint: open.

    Raises:
        CheckpointError: as ``load_quantized``.
    """
    with torch.inference_mode(False), torch.no_grad():
        _install(unwrap(model), checkpoint)


def _install(root: nn.Module, checkpoint: Checkpoint) -> None:
    plan = Plan.from_json(checkpoint.json(PLAN), where=str(checkpoint.folder / PLAN))
    linears = _matching_linears(root, checkpoint)
    rest, sections = _divided(checkpoint)
    replaced = set(linears.values())
    holders = {
        name: (module, leaf, old)
        for name, (module, leaf, old) in holdings(root).items()
        if leaf == "bias" or module not in replaced
    }
    sources = _sources(holders, rest, checkpoint.tied)
    buffers = {name: allocate(sections[name], where=name) for name in linears}
    targets = {name: torch.empty(form.shape, dtype=form.dtype, device="cpu") for name, form in rest.items()}
    places = {
        _name_in_files(checkpoint, layer, one): view
        for layer, buffer in buffers.items()
        for one, view in buffer.views.items()
    }
    checkpoint.read(targets | places)
    places.clear()
    changes: dict[nn.Module, QuantLinear] = {}
    schemes: dict[bytes, Candidate] = {}
    for name, linear in linears.items():
        changes[linear] = _layer(name, checkpoint.layers[name]["dtype"], linear, buffers.pop(name), schemes)
    values = _values(holders, sources, targets)
    for name, (module, leaf, _) in holders.items():
        owner = changes.get(module, module)
        held: dict[str, Any] = owner._parameters if leaf in module._parameters else owner._buffers
        held[leaf] = values[name]
    replace_modules(root, changes)
    for layer in list(changes.values())[:1]:
        layer.plan_json = json.dumps(plan.to_json())


def holdings(root: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Name → (module, attribute, tensor) of all parameters and buffers but the packed weights, tied ones each time."""
    found: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for path, module in root.named_modules():
        held = dict(module._parameters)
        if not isinstance(module, PackedModule):
            held |= module._buffers
        for leaf, tensor in held.items():
            if tensor is not None:
                found[plain_name(f"{path}.{leaf}" if path else leaf)] = (module, leaf, tensor)
    return found


def _matching_linears(root: nn.Module, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """Layer → the model's float layer in its place, of every quantized layer of the checkpoint."""
    linears = {site.name: site.module for site in find_linears(root)}
    for name, fields in checkpoint.layers.items():
        linear = linears.get(name)
        if linear is None:
            raise CheckpointError(
                "the model has the checkpoint's layers", where=name, got="no linear layer of that name", fix=_MISFIT
            )
        known = fields if isinstance(fields, dict) else {}
        n, k = size_of(linear)
        shape = {"in_features": k, "out_features": n, "bias": bias_of(linear) is not None}
        if known.get("dtype") not in list(DTYPES) or shape != {key: known.get(key) for key in shape}:
            raise CheckpointError("the layer is the model's", where=name, got=fields, fix=f"The model's is {shape}.")
    return {name: linears[name] for name in checkpoint.layers}


def _divided(checkpoint: Checkpoint) -> tuple[dict[str, Form], dict[str, dict[str, Form]]]:
    """The forms of tensors outside packed weights, and of each packed weight's sections by layer."""
    rest: dict[str, Form] = {}
    sections: dict[str, dict[str, Form]] = {name: {} for name in checkpoint.layers}
    for name, form in checkpoint.forms.items():
        owner, _, leaf = name.rpartition(".")
        if owner in sections and leaf != "bias":
            is_header = name == _name_in_files(checkpoint, owner, HEADER)
            sections[owner][HEADER if is_header else leaf] = form
        else:
            rest[name] = form
    return rest, sections


def _name_in_files(checkpoint: Checkpoint, layer: str, section: str) -> str:
    """The name that a section has in this checkpoint: up to schema 2 the header had its own."""
    own = f"{layer}.{section}"
    return own if own in checkpoint.forms else stored_name(layer, section)


def _layer(name: str, dtype: str, linear: nn.Module, buffer: Unfilled, schemes: dict[bytes, Candidate]) -> QuantLinear:
    """The quantized layer, still with the old bias."""
    packed, candidate = finished(buffer, where=name, schemes=schemes)
    weight = weight_of(linear)
    if not weight.is_meta:
        packed = packed._replace(data=packed.data.to(weight.device))
    n, k = size_of(linear)
    try:
        return QuantLinear(candidate, packed, bias_of(linear), k, n, dtype=DTYPES[dtype])
    except AutoqError as problem:
        raise CheckpointError(problem.rule, where=name, got=problem.got) from problem


def _sources(
    holders: Mapping[str, tuple[nn.Module, str, Tensor]], forms: Mapping[str, Form], tied: Mapping[str, str]
) -> dict[str, str]:
    """Name of every parameter and buffer → name of the stored tensor it gets, after checking that all fit."""
    sources = {name: tied.get(name, name) for name in holders}
    lacking = sorted(name for name, source in sources.items() if source not in forms)
    foreign = sorted(set(forms) - set(sources.values()))
    if lacking or foreign:
        parts = [f"not in the checkpoint: {', '.join(lacking[:5])}"] if lacking else []
        parts += [f"not in the model: {', '.join(foreign[:5])}"] if foreign else []
        raise CheckpointError("checkpoint and model have the same tensors", got="; ".join(parts), fix=_MISFIT)
    for name, (_, _, old) in holders.items():
        found = forms[sources[name]].shape
        if found != tuple(old.shape):
            raise CheckpointError(
                f"the model's tensor has shape {list(old.shape)}", where=name, got=list(found), fix=_MISFIT
            )
    return sources


def _values(
    holders: Mapping[str, tuple[nn.Module, str, Tensor]], sources: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The new tensor of every parameter and buffer; tied ones are one object."""
    values: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    for name, (_, _, old) in holders.items():
        source = sources[name]
        if source not in shared or isinstance(shared[source], nn.Parameter) != isinstance(old, nn.Parameter):
            shared[source] = _like(old, tensors[source])
        values[name] = shared[source]
    return values


def _like(old: Tensor, new: Tensor) -> Any:
    """The new values as the old tensor is: parameter or buffer, on its device, with or without gradient."""
    moved = new if old.is_meta else new.to(old.device)
    if not isinstance(old, nn.Parameter):
        return moved
    return nn.Parameter(moved, requires_grad=old.requires_grad and moved.is_floating_point())
