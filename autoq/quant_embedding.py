"""An embedding without a table of its own: it reads the rows of a quantized layer's packed weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoq.quant_linear import QuantLinear


class QuantEmbedding(nn.Module):
    """Looks up rows of a quantized layer's weight, dequantized.

    Args:
        layer: the quantized layer, a module of the same model. What becomes of its weight holds here too.
        padding_idx: as ``nn.Embedding`` has it, for code that asks; the row is read like any other.
        dtype: of the rows.
    """

    def __init__(self, layer: QuantLinear, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = layer.out_features, layer.in_features
        self.padding_idx = padding_idx
        self.dtype = dtype
        # In a tuple, so that it is a submodule in one place only.
        self._source = (layer,)

    def forward(self, input: Tensor) -> Tensor:
        """The rows [..., K] of int64 or int32 indices [...], each in [0, N)."""
        found: Tensor = torch.ops.autoq.embedding(
            input, self._source[0].head, self.num_embeddings, self.embedding_dim, self.dtype
        )
        return found

    @property
    def source(self) -> QuantLinear:
        """The layer whose weight is read."""
        return self._source[0]

    @property
    def weight(self) -> Tensor:
        """The dequantized table [N, K], computed anew at each access: slow. Writing to it changes nothing."""
        weight: Tensor = torch.ops.autoq.dequantize(self._source[0].head, self.num_embeddings, self.embedding_dim)
        return weight.to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantEmbedding:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """Shape and scheme, as ``print(model)`` shows them."""
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self._source[0].scheme}"


def embeddings_of(model: nn.Module) -> dict[str, QuantEmbedding]:
    """The embeddings of a model that read a layer's weight, by name."""
    return {name: one for name, one in model.named_modules() if isinstance(one, QuantEmbedding)}
