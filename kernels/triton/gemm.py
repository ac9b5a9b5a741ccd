"""Products with many rows of x: a tile of the weight is decoded into a matrix instruction's operand.

Legend: M rows of x, K inputs, N outputs, G groups of inputs.

The weight is the left operand: a tile's outputs lie along the long side of the instruction, which few rows of x need
not fill, and decoded registers go straight into it where the hardware takes its left operand from there.

Column scales are multiplied into the tile of x, which is the smaller one; but where x is float16 into that of the
weight: beside one large column scale, others would bring small activations below float16's normal numbers. The weight
has room, as its rows are scaled to 2^12.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from autoq_kernels.triton import activation, reduce
from autoq_kernels.triton.configs import Config, dynamic
from autoq_kernels.triton.decode import fp6_value, lifted, tile_of_codes
from autoq_kernels.triton.launching import Launch
from autoq_kernels.triton.reduce import finish
from autoq_kernels.triton.weight import Weight, arguments, constants, grain

INT8: tl.constexpr = tl.constexpr(1)
AFFINE: tl.constexpr = tl.constexpr(2)
E3M2: tl.constexpr = tl.constexpr(3)
_NEIGHBOURS: tl.constexpr = tl.constexpr(8)  # tiles of outputs that run beside each other, for the cache's sake


@triton.jit
def tile_at(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which tile a program has: (of rows of x, of outputs). Programs beside each other share tiles."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    width = _NEIGHBOURS * tiles_m
    first = (program // width) * _NEIGHBOURS
    height = tl.minimum(tiles_n - first, _NEIGHBOURS)
    inside = program % width
    return inside // height, first + inside % height


@triton.jit
def tile_of_weight(q, scale, minimum, group, KIND: tl.constexpr, HAS_MINIMUM: tl.constexpr):
    """What a tile of codes [BLOCK_N, BLOCK_K] stands for, without the factors of outputs and inputs; float32.

    Args:
        q: the codes.
        scale: pointer to float16 [N, G].
        minimum: as scale.
        group: int64 [BLOCK_N], the position of each row's scale.
        KIND: see `layout.Kind`.
        HAS_MINIMUM: whether there are minima.
    """
    if KIND == INT8:
        value = q.to(tl.float32)
    elif KIND > AFFINE:
        value = fp6_value(q, KIND == E3M2)
    else:
        s = tl.load(scale + group).to(tl.float32)
        offset = -256.0 * s
        if HAS_MINIMUM:
            offset += tl.load(minimum + group).to(tl.float32)
        value = lifted(q) * s[:, None] + offset[:, None]
    return value


@triton.jit(do_not_specialize=["m", "parts"])
def gemm_tile(
    x,
    x_scale,
    x_sums,
    head,
    bias,
    y,
    m,
    parts,
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
    column_unit,
    x_factor,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    WHOLE: tl.constexpr,
    GRAIN: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """BLOCK_N outputs of BLOCK_M rows of x, over one of so many parts of the inputs.

    Args:
        x: [M, K], bfloat16 or float16, or int8 where WHOLE.
        x_scale: float32 [M] where WHOLE, else None.
        x_sums: int32 [M, groups], sums of x's groups, where WHOLE, else None.
        head: the packed weight; offsets are bytes from there.
        bias: [N] or None.
        y: [M, N], or where PARTIAL float32 [parts, M, N], then without factors and bias.
        m: M.
        parts: programs for one output.
        n: N.
        k: K.
        padded: codes in a row.
        groups: G, scales in a row.
        codes_offset: of the plane with the low bits.
        high_offset: of the other plane.
        scale_offset: of float16 [N, groups].
        minimum_offset: as scale_offset.
        factor_offset: of float32 [N].
        column_offset: of float32 [K].
        column_unit: a power of two; column scales are multiplied by it, so that none exceeds 1.
        x_factor: see `finish`.
        KIND: see `layout.Kind`.
        BITS: of a code.
        GROUP: inputs that share a scale, a multiple of BLOCK_K (where WHOLE: BLOCK_K itself), or 0.
        HAS_MINIMUM: AFFINE with minima.
        HAS_FACTOR: whether outputs have factors.
        HAS_COLUMN: whether inputs have factors, and x has not been multiplied by them yet.
        WHOLE: x is int8.
        GRAIN: see `tile_of_units`.
        EVEN: rows of codes are multiples of BLOCK_K.
        EVEN_K: K is a multiple of BLOCK_K.
        BLOCK_M: rows of x.
        BLOCK_N: outputs.
        BLOCK_K: inputs of a step.
        PARTIAL: whether there are several parts.
    """
    tile_m, tile_n = tile_at(m, n, BLOCK_M, BLOCK_N)
    part = tl.program_id(1)
    outputs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(outputs, n - 1).to(tl.int64)
    x_rows = tl.minimum(tokens, m - 1).to(tl.int64)
    scale = (head + scale_offset).to(tl.pointer_type(tl.float16))
    minimum = (head + minimum_offset).to(tl.pointer_type(tl.float16))
    column = (head + column_offset).to(tl.pointer_type(tl.float32))
    lanes = tl.arange(0, BLOCK_K)

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if WHOLE and KIND == INT8 else tl.float32)
    steps = tl.cdiv(k, BLOCK_K)
    share = tl.cdiv(steps, parts)
    for step in range(part * share, tl.minimum(part * share + share, steps)):
        start = step * BLOCK_K
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
        at = start + lanes
        place = x + x_rows[None, :] * k + at[:, None]
        if EVEN_K:
            values = tl.load(place)
        else:
            values = tl.load(place, mask=(at < k)[:, None], other=0)
        if WHOLE and KIND == INT8:
            total = tl.dot(q, values, total, out_dtype=tl.int32)
        elif WHOLE:
            group = start // GROUP
            products = tl.dot(q.to(tl.int8), values, out_dtype=tl.int32)
            s = tl.load(scale + rows * groups + group).to(tl.float32)
            total += products.to(tl.float32) * s[:, None]
            if HAS_MINIMUM:
                low = tl.load(minimum + rows * groups + group).to(tl.float32)
                total += low[:, None] * tl.load(x_sums + x_rows * groups + group).to(tl.float32)[None, :]
        else:
            group = rows * groups + (start // GROUP if KIND == AFFINE else 0)
            w = tile_of_weight(q, scale, minimum, group, KIND, HAS_MINIMUM)
            if HAS_COLUMN:
                t = tl.load(column + at, mask=at < k, other=0.0) * column_unit
                if values.dtype == tl.float16:
                    w *= t[None, :]
                else:
                    values = (values.to(tl.float32) * t[:, None]).to(values.dtype)
            total = tl.dot(w.to(values.dtype), values, total)

    mask = (outputs < n)[:, None] & (tokens < m)[None, :]
    at_y = x_rows[None, :] * n + outputs.to(tl.int64)[:, None]  # of neighbours, as the clamped rows are not known to be
    if PARTIAL:
        tl.store(y + tl.cast(part, tl.int64) * m * n + at_y, total.to(tl.float32), mask=mask)
    else:
        value = finish(total, rows[:, None], x_rows[None, :], head, factor_offset, x_scale, x_factor, bias, HAS_FACTOR)
        tl.store(y + at_y, value.to(y.dtype.element_ty), mask=mask)


def launches(x_MK: Tensor, weight: Weight, bias: Tensor | None, y_MN: Tensor, config: Config) -> list[Launch]:
    """What computes ``x @ W.T + bias`` for any number of rows.

    Args:
        x_MK: contiguous bfloat16 or float16 [M, K]; float32 only where the product rounds x to int8.
        weight: of K inputs and N outputs.
        bias: float [N] or None.
        y_MN: contiguous float [M, N], filled by the launches.
        config: of family gemm.

    Returns:
        One launch, with one before it where x is rounded and one behind where the inputs are split.
    """
    m, k = x_MK.shape
    form, found = weight.form, []
    x_scale = x_sums = None
    whole = dynamic(form, m)
    fixed = constants(weight)
    if whole:
        rounding, rounded = activation.launch(x_MK, weight)
        found.append(rounding)
        x_MK, x_scale, x_sums = rounded
        fixed["HAS_COLUMN"] = False
    power = weight.column_power if fixed["HAS_COLUMN"] else 0
    split = config.split_k > 1
    out = y_MN.new_empty((config.split_k, *y_MN.shape), dtype=torch.float32) if split else y_MN
    tiles = -(-form.n // config.block_n) * -(-m // config.block_m)
    found.append(
        Launch(
            kernel=gemm_tile,
            grid=(tiles, config.split_k, 1),
            arguments={
                "x": x_MK,
                "x_scale": x_scale,
                "x_sums": x_sums,
                "bias": bias,
                "y": out,
                "m": m,
                "parts": config.split_k,
                "column_unit": 2.0**-power,
                "x_factor": 2.0**power,
                **arguments(weight),
            },
            constants={
                **fixed,
                "WHOLE": whole,
                "GRAIN": grain(form),
                "EVEN": form.k_padded % config.block_k == 0,
                "EVEN_K": k % config.block_k == 0,
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k,
                "PARTIAL": split,
            },
            warps=config.warps,
            stages=config.stages,
        )
    )
    if split:
        found.append(reduce.launch(out, weight, x_scale, 2.0**power, bias, y_MN))
    return found
