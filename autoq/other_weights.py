"""What of a model's weights autoq leaves alone, and how large a part of the model that is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from autoq.apply_report import OtherWeight
from autoq.linear_layers import is_linear, weight_of
from autoq.modules import find_linears, place_of, unwrap
from autoq.plan import plain_name
from autoq.quant_linear import QuantLinear

_EXPERTS = "experts (3-D parameters)"


def other_weights(model: nn.Module, reasons: Mapping[str, str] | None = None) -> tuple[OtherWeight, ...]:
    """The weights with at least two dimensions that autoq leaves alone, largest first; embeddings are not among them.

    Args:
        model: unquantized or not; compiled and wrapped models are looked through.
        reasons: linear layer → why it is left alone, as far as that was seen while the model ran.

    Returns:
        Experts, convolutions, … and the linear layers that cannot be quantized, with the reason.
    """
    root = unwrap(model)
    total = sum({place_of(one): one.nbytes for one in root.parameters()}.values())
    found: dict[str, tuple[str, int]] = {}
    for site in find_linears(root):
        reason = site.reason or (reasons or {}).get(site.name)
        if reason is not None and site.module._parameters.get("weight") is not None:
            found[f"{site.name}.weight"] = (f"linear layers: {reason}", weight_of(site.module).nbytes)
    for path, module in root.named_modules():
        if is_linear(module) or isinstance(module, QuantLinear | nn.Embedding | nn.EmbeddingBag):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            kind = _kind(module, path, parameter)
            if kind:
                found[plain_name(f"{path}.{leaf}" if path else leaf)] = (kind, parameter.nbytes)
    weights = [
        OtherWeight(name=name, kind=kind, size_bytes=size, share=size / max(1, total))
        for name, (kind, size) in found.items()
    ]
    return tuple(sorted(weights, key=lambda one: -one.size_bytes))


def _kind(module: nn.Module, path: str, parameter: nn.Parameter) -> str:
    """What a weight outside the linear layers is; empty when it is a vector, however it is stored."""
    sizes = [size for size in parameter.shape if size > 1]
    if len(sizes) < 2 or not parameter.is_floating_point():
        return ""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolutions"
    if isinstance(module, nn.MultiheadAttention):
        return "projections of nn.MultiheadAttention"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent layers"
    if len(sizes) > 2 and "expert" in f"{path}.{type(module).__name__}".lower():
        return _EXPERTS
    return "parameters of other modules"
