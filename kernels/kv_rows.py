"""The rows of a quantized KV cache: the numbers of one token and head as codes, followed by what the codes stand for.

int8: D signed codes and a float32 scale, D + 4 bytes; number = code · scale, scale = max |x| / 127.
int4: D/2 bytes, each with code j below and code j + D/2 above, then scale and minimum as float16, D/2 + 4 bytes;
number = code · scale + minimum, from the smallest number to the largest in 15 steps. D is a multiple of 32.

Keys of int4 rows are rotated first, by a Hadamard transform of blocks of as many numbers as the largest power of two
that divides D: a few channels of keys are much larger than the others, and would take all the levels (QuaRot, Ashkboos
et al. 2024). The transform is its own inverse, and scores do not change when queries are rotated too.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Precision = Literal["int8", "int4"]
EXTRA_BYTES = 4
_INT8_LEVELS = 127
_INT4_LEVELS = 15
_INT4_UNIT = 32


def row_bytes(precision: Precision, d: int) -> int:
    """Bytes of a row of ``d`` numbers.

    Raises:
        ValueError: int4, and ``d`` is no multiple of 32.
    """
    if precision == "int8":
        return d + EXTRA_BYTES
    if d % _INT4_UNIT:
        raise ValueError(f"int4 rows hold a multiple of {_INT4_UNIT} numbers; got {d}")
    return d // 2 + EXTRA_BYTES


def precision_of(rows: Tensor, d: int) -> Precision:
    """What rows of uint8 that hold ``d`` numbers are.

    Raises:
        ValueError: rows of no such length.
    """
    length = rows.shape[-1]
    if length == d + EXTRA_BYTES:
        return "int8"
    if length == d // 2 + EXTRA_BYTES and d % _INT4_UNIT == 0:
        return "int4"
    raise ValueError(f"a row of {d} numbers has {d + EXTRA_BYTES} or {d // 2 + EXTRA_BYTES} bytes; got {length}")


def numbers(rows: Tensor, precision: Precision) -> int:
    """How many numbers a row holds."""
    codes = rows.shape[-1] - EXTRA_BYTES
    return int(codes if precision == "int8" else 2 * codes)


def pack(x: Tensor, precision: Precision, *, keys: bool) -> Tensor:
    """Quantize rows.

    Args:
        x: float [..., D].
        precision: of the codes.
        keys: whether int4 rows are rotated.

    Returns:
        uint8 [..., R]. A row with a number that is not finite reads as NaN.

    Raises:
        ValueError: int4, and D is no multiple of 32.
    """
    row_bytes(precision, x.shape[-1])
    return _pack_int8(x.float()) if precision == "int8" else _pack_int4(rotated(x.float()) if keys else x.float())


def unpack(rows: Tensor, precision: Precision, *, keys: bool) -> Tensor:
    """The numbers that rows stand for, float32 [..., D]."""
    d = numbers(rows, precision)
    if precision == "int8":
        return rows[..., :d].view(torch.int8).float() * _tail(rows, torch.float32)
    pairs = rows[..., : d // 2]
    scale, minimum = _tail(rows, torch.float16).float().split(1, dim=-1)
    found = torch.cat([pairs & 15, pairs >> 4], dim=-1).float() * scale + minimum
    return rotated(found) if keys else found


def rotated(x: Tensor) -> Tensor:
    """The blocks of each row times a Hadamard matrix over the root of its size.

    Args:
        x: float32 [..., D].
    """
    shape, d = x.shape, x.shape[-1]
    block, half = d & -d, 1
    while half < block:
        a, b = x.reshape(*shape[:-1], d // (2 * half), 2, half).unbind(dim=-2)
        x = torch.stack([a + b, a - b], dim=-2).reshape(shape)
        half *= 2
    return x * (1.0 / torch.tensor(float(block)).sqrt().item())


def _pack_int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(dim=-1, keepdim=True) / _INT8_LEVELS
    codes = (x / scale).round().clamp(-_INT8_LEVELS, _INT8_LEVELS)
    codes = codes.where(_finite(x) & (scale > 0), 0.0).to(torch.int8)
    return torch.cat([codes.view(torch.uint8), _bytes(scale.where(_finite(x), torch.nan))], dim=-1)


def _pack_int4(x: Tensor) -> Tensor:
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    scale = ((high - low) / _INT4_LEVELS).where(_finite(x), torch.nan).half()
    minimum = low.where(_finite(x), 0.0).half()
    codes = ((x - minimum.float()) / scale.float()).round().clamp(0, _INT4_LEVELS)
    codes = codes.where(scale > 0, 0.0).to(torch.uint8)
    below, above = codes.chunk(2, dim=-1)
    return torch.cat([below | above << 4, _bytes(scale), _bytes(minimum)], dim=-1)


def _finite(x: Tensor) -> Tensor:
    return x.isfinite().all(dim=-1, keepdim=True)


def _bytes(one: Tensor) -> Tensor:
    return one.contiguous().view(torch.uint8)


def _tail(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows[..., -EXTRA_BYTES:].contiguous().view(dtype)
