"""The float weight that a packed one stands for.

Legend: K inputs, N outputs.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl
from autoq_kernels.triton.decode import fp6_value, tile_of_codes
from autoq_kernels.triton.launching import Launch
from autoq_kernels.triton.weight import Weight, arguments, constants, grain

_BLOCK_N = 16
INT8: tl.constexpr = tl.constexpr(1)
AFFINE: tl.constexpr = tl.constexpr(2)
E3M2: tl.constexpr = tl.constexpr(3)


@triton.jit
def write_weight(
    out,
    head,
    n,
    k,
    padded,
    groups,
    codes_offset,
    high_offset,
    scale_offset,
    minimum_offset,
    factor_offset,
    column_offset,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    GRAIN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of out [N, K]; arguments as in `gemm_tile`, BLOCK_K at most GROUP."""
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(outputs, n - 1).to(tl.int64)
    start = tl.program_id(0) * BLOCK_K
    at = start + tl.arange(0, BLOCK_K)
    q = tile_of_codes(
        head + codes_offset,
        head + high_offset,
        rows,
        padded,
        start,
        BITS,
        KIND == INT8,
        GRAIN,
        EVEN,
        BLOCK_N,
        BLOCK_K,
    )
    if KIND > AFFINE:
        value = fp6_value(q, KIND == E3M2)
    else:
        value = q.to(tl.float32)
    if KIND == AFFINE:
        group = rows * groups + start // GROUP
        value *= tl.load((head + scale_offset).to(tl.pointer_type(tl.float16)) + group).to(tl.float32)[:, None]
        if HAS_MINIMUM:
            value += tl.load((head + minimum_offset).to(tl.pointer_type(tl.float16)) + group).to(tl.float32)[:, None]
    if HAS_FACTOR:
        value *= tl.load((head + factor_offset).to(tl.pointer_type(tl.float32)) + rows)[:, None]
    if HAS_COLUMN:
        column = (head + column_offset).to(tl.pointer_type(tl.float32))
        value *= tl.load(column + at, mask=at < k, other=0.0)[None, :]
    mask = (outputs < n)[:, None] & (at < k)[None, :]
    tl.store(out + rows[:, None] * k + at[None, :], value.to(out.dtype.element_ty), mask=mask)


def launches(weight: Weight, out_NK: Tensor) -> list[Launch]:
    """What writes the weight in float.

    Args:
        weight: not a dense one.
        out_NK: contiguous float [N, K], filled by the launch.
    """
    form = weight.form
    block_k = min(128, form.group_size) or 128
    return [
        Launch(
            kernel=write_weight,
            grid=(-(-form.k // block_k), -(-form.n // _BLOCK_N), 1),
            arguments={"out": out_NK, **arguments(weight)},
            constants={
                **constants(weight),
                "GRAIN": grain(form),
                "EVEN": form.k_padded % block_k == 0,
                "BLOCK_N": _BLOCK_N,
                "BLOCK_K": block_k,
            },
            warps=4,
        )
    ]
