"""A static KV cache for transformers models that holds numbers, or codes of 8 or 4 bits per head and token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer

from autoq.attention import KVPrecision, checked
from autoq.errors import InputError
from autoq_kernels import kv_rows


class KVLayer(StaticLayer):  # type: ignore[no-untyped-call]  # of transformers
    """The keys and values of one layer.

    Args:
        max_cache_len: tokens it holds.
        precision: of what it holds.
        length: int64, how many tokens the cache holds; one tensor for all layers.
        is_last: whether this layer, the last to be called, counts new tokens.

    Attributes:
        keys: [B, G, L, D], or uint8 [B, G, L, R] rows of ``kernels/kv_rows.py``.
        values: the same with E.
    """

    def __init__(self, max_cache_len: int, precision: KVPrecision, length: Tensor, *, is_last: bool) -> None:
        super().__init__(max_cache_len)
        self.precision = precision
        self.cumulative_length = length
        self.is_last = is_last

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate what ``key_states`` and ``value_states`` of [B, G, any, D or E] need."""
        super().lazy_initialization(key_states, value_states)
        if self.precision != "none":
            self.keys, self.values = (
                key_states.new_zeros((*key_states.shape[:2], self.max_cache_len, size), dtype=torch.uint8)
                for size in (kv_rows.row_bytes(self.precision, one.shape[3]) for one in (key_states, value_states))
            )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens, and give all that is held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys: Any = self.keys
        values: Any = self.values
        torch.ops.autoq.store_kv(keys, values, key_states, value_states, self.cumulative_length)
        if self.is_last:
            self.cumulative_length.add_(key_states.shape[-2])
        return keys, values


class KVCache(Cache):
    """A static cache whose layers count their tokens together.

    For a model that runs with autoq's attention (`autoq.attention.using`), which reads its rows.

    Args:
        config: of a decoder with one kind of attention over all tokens.
        batch: sequences B.
        max_length: tokens of each.
        dtype: of keys and values.
        device: of the cache.
        kv_cache: what keys and values are rounded to, per head and token.

    Raises:
        InputError: another kind of model; heads that int4 cannot hold.
    """

    def __init__(
        self,
        config: Any,
        *,
        batch: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_cache: KVPrecision = "none",
    ) -> None:
        text = config.get_text_config(decoder=True)
        heads, size = _heads(text)
        precision = checked(kv_cache)
        if precision == "int4" and size % 32:
            raise InputError("an int4 KV cache needs heads of a multiple of 32 numbers", got=size, fix="Take int8.")
        self.length = torch.zeros((), dtype=torch.long)  # on the CPU: operators read it
        last = text.num_hidden_layers - 1
        own = [KVLayer(max_length, precision, self.length, is_last=i == last) for i in range(last + 1)]
        super().__init__(layers=[*own])
        self.early_initialization(batch, heads, size, dtype, device)
        for layer in own:
            layer.cumulative_length = self.length
        self._own = own
        self.device = device

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(one.nbytes for layer in self._own for one in (layer.keys, layer.values) if one is not None)

    def rewind(self, length: int) -> None:
        """Forget all tokens from number ``length`` on."""
        self.length.fill_(length)


def _heads(text: Any) -> tuple[int, int]:
    """How many heads of keys and values a decoder has, and of how many numbers."""
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(text, "sliding_window", None) is not None:
        raise InputError(
            "autoq's decode loop serves decoders whose every layer attends to all tokens",
            got=", ".join(sorted(kinds)) if kinds != {"full_attention"} else "a sliding window",
            fix="Use model.generate.",
        )
    queries = getattr(text, "num_attention_heads", None)
    if queries is None or getattr(text, "num_hidden_layers", None) is None:
        raise InputError(
            "autoq's decode loop serves transformers decoders", got=type(text).__name__, fix="Use model.generate."
        )
    heads = getattr(text, "num_key_value_heads", None) or queries
    size = getattr(text, "head_dim", None) or text.hidden_size // queries
    return int(heads), int(size)
