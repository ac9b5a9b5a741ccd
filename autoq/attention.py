"""autoq's CPU attention in transformers models: reads only the keys that a mask lets through, once for all heads.

Importing this module registers ``"autoq"`` with transformers, and ``"autoq_int8_kv"`` and ``"autoq_int4_kv"``, which
round keys and values to 8 or 4 bits per head and token, as `autoq.kv_cache.KVCache` stores them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from autoq.errors import InputError
from autoq_kernels import kv_rows
from autoq_kernels import ops as _ops  # noqa: F401  (defines the operators)

KVPrecision = Literal["none", "int8", "int4"]
NAMES: dict[KVPrecision, str] = {"none": "autoq", "int8": "autoq_int8_kv", "int4": "autoq_int4_kv"}
_HEAD_UNIT = 16  # the CPU kernel's heads are multiples of so many numbers
_OTHERS = ("softcap", "position_bias", "cache", "s_aux")  # what the kernel does not do, where not None


def attention(  # noqa: PLR0917 (transformers calls it so)
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    kv_cache: KVPrecision = "none",
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: autoq's kernel where it can, else ``sdpa``.

    Args:
        module: the attention layer; its ``is_causal`` says whether queries without a mask see all keys.
        query: [B, H, Q, D].
        key: [B, G, L, D], or the uint8 rows of a `autoq.kv_cache.KVCache`.
        value: [B, G, L, E], or such rows.
        attention_mask: bool, as ``sdpa_mask`` makes it, or None.
        dropout: above 0 only in training.
        scaling: on the scores; None for ``D ** -0.5``.
        is_causal: instead of the module's.
        kv_cache: what keys and values that come as numbers are rounded to.
        **others: what transformers gives besides; what the kernel does not do goes to ``sdpa``.

    Returns:
        [B, Q, H, E], and no weights.
    """
    if kv_cache != "none" and key.dtype != torch.uint8:
        key, value = _rows(key, value, kv_cache)
    if dropout or not _fits(query, key, value, attention_mask, others):
        if key.dtype == torch.uint8:
            precision = kv_rows.precision_of(key, query.shape[3])
            key = kv_rows.unpack(key, precision, keys=True).to(query.dtype)
            value = kv_rows.unpack(value, precision, keys=False).to(query.dtype)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **others
        )
    queries = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = queries > 1 and attention_mask is None and causal
    if causal and key.shape[2] > queries:  # an empty static cache: its places behind the prompt hold nothing
        key, value = key[:, :, :queries], value[:, :, :queries]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return torch.ops.autoq.attention(query, key, value, attention_mask, scale, causal), None


@contextmanager
def using(model: nn.Module, kv_cache: KVPrecision = "none") -> Iterator[None]:
    """Autoq's attention in a transformers model, until the block ends.

    Args:
        model: a transformers model, not wrapped.
        kv_cache: what keys and values are rounded to.

    Raises:
        InputError: an unknown precision.
    """
    name = NAMES[checked(kv_cache)]
    config: Any = model.config
    before = config._attn_implementation
    set_implementation: Any = model.set_attn_implementation
    set_implementation(name)
    try:
        yield
    finally:
        set_implementation(before)


def checked(kv_cache: str) -> KVPrecision:
    """The precision of that name.

    Raises:
        InputError: there is none.
    """
    for known in get_args(KVPrecision):
        if kv_cache == known:
            return known  # type: ignore[no-any-return]  # of a Literal's
    raise InputError("kv_cache is one of " + ", ".join(NAMES), got=kv_cache)


def _rows(key: Tensor, value: Tensor, precision: Literal["int8", "int4"]) -> tuple[Tensor, Tensor]:
    keys, values = (
        one.new_empty((*one.shape[:3], kv_rows.row_bytes(precision, one.shape[3])), dtype=torch.uint8)
        for one in (key, value)
    )
    torch.ops.autoq.store_kv(keys, values, key, value, torch.zeros((), dtype=torch.long))
    return keys, values


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, others: dict[str, Any]) -> bool:
    rows = key.dtype == torch.uint8
    return (
        query.device.type == "cpu"
        and (rows or query.dtype == key.dtype == value.dtype)
        and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and query.shape[3] % _HEAD_UNIT == 0
        and (rows or value.shape[3] % _HEAD_UNIT == 0)
        and (mask is None or mask.dtype == torch.bool)
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        and all(others.get(name) is None for name in _OTHERS)
    )


for _precision, _name in NAMES.items():
    AttentionInterface.register(_name, functools.partial(attention, kv_cache=_precision))
    AttentionMaskInterface.register(_name, sdpa_mask)
