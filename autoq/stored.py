"""What of a model is stored in a checkpoint: its tensors by name, its quantized layers' shapes, its plan, its form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from autoq.checkpoint_files import SCHEMA, Checkpoint
from autoq.errors import CheckpointError, ModelError
from autoq.experts import split_experts
from autoq.installing import holdings, stored_name
from autoq.modules import QuantLinear, quantized_layers
from autoq.plan import Plan
from autoq.quant_embedding import embeddings_of
from autoq.shard_writing import why_not_stored

METHOD = "autoq"  # the name of the method in transformers
CONFIG_KEY = "quantization_config"  # of a model's config.json

_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


def config_entry() -> dict[str, str]:
    """What ``config.json`` says of a quantized model; transformers knows the method once ``autoq.hf`` is imported."""
    return {"quant_method": METHOD, "autoq": version("autoq")}


def stored_tensors(root: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Everything to store by name, and name → stored name of what is tied to something stored.

    Raises:
        CheckpointError: if a module has state besides tensors, a tensor cannot be stored, or an embedding reads a
            layer's weight.
    """
    for name, module in root.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                "all of a model's state is in tensors",
                where=name,
                got="a module with extra state",
                fix="Keep the state in buffers.",
            )
    for name in embeddings_of(root):
        raise CheckpointError(
            "an embedding is stored as its float table",
            where=name,
            got="one that reads a layer's packed weight (autoq.share_embedding)",
            fix="Save the model before, and share the embedding after loading.",
        )
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    places: dict[tuple[Any, ...], str] = {}
    for name, (_, _, tensor) in holdings(root).items():
        reason = why_not_stored(tensor)
        if reason is not None:
            raise CheckpointError(
                "every tensor has values that safetensors can hold",
                where=name,
                got=reason,
                fix="Make it a plain tensor with values, or remove it.",
            )
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = places.setdefault(place, name) if tensor.numel() else name
        if first != name:
            tied[name] = first
        else:
            tensors[name] = tensor.detach()
    for name, layer in quantized_layers(root).items():
        tensors |= {stored_name(name, section): one for section, one in layer.sections().items()}
    return tensors, tied


def reshape(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Split a transformers model's experts, in place, if those of the checkpoint were (``autoq.split_experts``)."""
    if _has_experts(checkpoint.forms) and not _has_experts(name for name, _ in model.named_parameters()):
        with suppress(ModelError):  # then the names do not fit, which is said where they are compared
            split_experts(model)


def _has_experts(names: Iterable[str]) -> bool:
    return any(_EXPERT.search(name) for name in names)


def stored_layers(root: nn.Module) -> dict[str, dict[str, Any]]:
    """Quantized layer → its shape, bias and dtype."""
    return {name: _described(layer) for name, layer in quantized_layers(root).items()}


def stored_plan(root: nn.Module) -> Plan:
    """The plan that a model carries, or the schemes of its layers."""
    layers = quantized_layers(root)
    text = next((layer.plan_json for layer in layers.values() if layer.plan_json), None)
    if text is not None:
        return Plan.from_json(json.loads(text))
    return Plan(layers={name: layer.candidate.scheme for name, layer in layers.items()})


def note_in_files(root: nn.Module, tied: dict[str, str]) -> str:
    """What makes tensor files readable without the manifest: JSON for their metadata.

    ``from_pretrained`` of transformers fetches only the configuration and the tensors of a model by name.
    """
    fields = {"layers": stored_layers(root), "tied": tied, "plan": stored_plan(root).to_json()}
    return json.dumps({"schema": SCHEMA, **fields}, separators=(",", ":"))


def _described(layer: QuantLinear) -> dict[str, Any]:
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
        "dtype": str(layer.dtype).removeprefix("torch."),
    }
