"""One packed table for the input embedding and the output layer of a model that ties them.

Shapes: N tokens, K features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoq.errors import ModelError
from autoq.fused import FusedPart
from autoq.modules import QuantLinear, quantized_layers, replace_modules, unwrap
from autoq.plan import plain_name
from autoq.quant_embedding import QuantEmbedding

__all__ = ["SharedEmbedding", "share_embedding"]

MOST_ERROR = 0.3  # relative RMS between tied tables; 3-bit codes make about 0.2, tables that are not tied about 1.4
_CHUNK = 4096  # rows compared at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedEmbedding:
    """What ``share_embedding`` did.

    Attributes:
        embedding: the embedding's name.
        layer: the quantized layer whose weight it reads.
        error: relative RMS between the float table and the layer's weight, which the embedding has from now on.
        freed_bytes: of the float table.
    """

    embedding: str
    layer: str
    error: float
    freed_bytes: int

    def __str__(self) -> str:
        return f"{self.embedding} reads {self.layer}: {self.freed_bytes} bytes less, relative error {self.error:.2%}"


def share_embedding(model: nn.Module) -> SharedEmbedding:
    """Let the input embedding read the packed weight of the quantized output layer, in place; its own table is dropped.

    For models whose embedding and output layer have one weight (``tie_word_embeddings``): ``apply`` packs the layer's
    and leaves the embedding the float table. The pair is found by its values. The embedding is quantized as the layer
    is then, which no plan's figures include: it changes the loss a little, and ``autoq.perplexity`` says how much.

    ``save_quantized`` refuses such a model: save it before, and call this after loading. The layer may change its
    scheme (the embedding follows); the way back is to load the model again.

    Args:
        model: quantized, plain, compiled or wrapped.

    Returns:
        Which embedding reads which layer, the error, and the bytes freed.

    Raises:
        ModelError: if there is not exactly one such pair, or the embedding does more than look rows up.
    """
    root = unwrap(model)
    pairs = [
        (embedding, layer, error)
        for embedding in _embeddings(root).items()
        for layer in quantized_layers(root).items()
        if not isinstance(layer[1], FusedPart) and (error := _difference(embedding[1], layer[1])) <= MOST_ERROR
    ]
    if len(pairs) != 1:
        found = "; ".join(f"{embedding} and {layer}" for (embedding, _), (layer, _), _ in pairs)
        raise ModelError(
            "one embedding and one quantized layer have the same weight",
            got=found or "no such pair",
            fix="Apply a plan that quantizes the output layer first; models that do not tie them keep both tables.",
        )
    (name, old), (layer_name, layer), error = pairs[0]
    _check_plain(name, old)
    with torch.inference_mode(False), torch.no_grad():
        replace_modules(root, {old: QuantEmbedding(layer, old.padding_idx, old.weight.dtype)})
    return SharedEmbedding(embedding=name, layer=layer_name, error=error, freed_bytes=old.weight.nbytes)


def _embeddings(root: nn.Module) -> dict[str, nn.Embedding]:
    return {plain_name(name): one for name, one in root.named_modules() if isinstance(one, nn.Embedding)}


def _difference(embedding: nn.Embedding, layer: QuantLinear) -> float:
    """Relative RMS between the embedding's table and the layer's weight; infinite where they cannot be compared."""
    n, k = layer.out_features, layer.in_features
    head, table = layer.head, embedding.weight.detach()
    if tuple(table.shape) != (n, k) or table.is_meta or head.device != table.device:
        return float("inf")
    error = size = 0.0
    for first in range(0, n, _CHUNK):
        part = table[first : first + _CHUNK].double()
        rows = torch.arange(first, first + len(part), device=table.device)
        found = torch.ops.autoq.embedding(rows, head, n, k, torch.float32).double()
        error += float((found - part).square().sum())
        size += float(part.square().sum())
    return (error / size) ** 0.5 if size else float("inf")


def _check_plain(name: str, embedding: nn.Embedding) -> None:
    reasons: Mapping[str, Callable[[], Any]] = {
        f"{type(embedding).__name__}, which has a forward of its own": lambda: (
            type(embedding).forward is not nn.Embedding.forward or "forward" in embedding.__dict__
        ),
        "max_norm": lambda: embedding.max_norm is not None,
        "a parametrized weight": lambda: hasattr(embedding, "parametrizations"),
    }
    found = [reason for reason, holds in reasons.items() if holds()]
    if found:
        raise ModelError("the embedding looks rows up and does nothing else", where=name, got=found[0])
