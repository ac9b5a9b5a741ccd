"""Products with few rows of x: bound by reading the weight, so each thread decodes whole blocks in its registers.

Legend: M rows of x, K inputs, N outputs, R outputs of a program (``BLOCK_N``), B blocks of a step, one a thread; a
block is 32 inputs (``UNIT``; 16 of 8-bit codes). No value moves between threads before the sums are complete.

A block of 4-bit codes is one load of 16 bytes. With ``PAIR`` 2 a thread takes two neighbouring blocks of one group and
loads its scale once. Loads of codes say that they are not needed again, those of x that they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from autoq_kernels.layout import Kind
from autoq_kernels.triton import activation, reduce
from autoq_kernels.triton.configs import Config, dynamic, unit
from autoq_kernels.triton.decode import (
    SUBNORMAL_UNIT,
    byte_octet,
    field,
    field_bit,
    fp6_bytes,
    fp6_of_bytes,
    octet,
    signed_byte,
    subnormal,
    subnormal_factor,
    words,
)
from autoq_kernels.triton.launching import Launch
from autoq_kernels.triton.reduce import finish
from autoq_kernels.triton.weight import Weight, arguments, constants

INT8: tl.constexpr = tl.constexpr(1)
AFFINE: tl.constexpr = tl.constexpr(2)
E3M2: tl.constexpr = tl.constexpr(3)
_FP6_FACTORS = {Kind.FP6_E3M2: 2.0**12, Kind.FP6_E2M3: 2.0**14}  # see `fp6_of_bytes`


@triton.constexpr_function
def low_bits(bits):
    """Bits of a block's first plane."""
    return {3: 2, 5: 4, 6: 4}.get(bits, bits)


@triton.constexpr_function
def high_bits(kind, bits):
    """Bits of the plane that is multiplied apart; 0 where there is none."""
    return {3: 1, 5: 1, 6: 2}.get(bits, 0) if kind == 2 else 0


@triton.constexpr_function
def high_weight(bits):
    """What the lowest bit of the second plane is worth."""
    return 4 if bits == 3 else 16


@triton.jit
def load_block(codes, rows, row_blocks, block, ok, WORDS: tl.constexpr):
    """A block of one plane for each row and thread, as two int64 [R, B] (4 words), or twice the same int64 or uint32.

    Args:
        codes: pointer to the plane's first byte.
        rows: int64 [R].
        row_blocks: blocks in a row of the plane.
        block: int32 [B].
        ok: bool [B].
        WORDS: 32-bit words of a block: 4, 2 or 1.
    """
    at = rows[:, None] * row_blocks + block[None, :]
    if WORDS == 4:
        both = (at * 2)[:, :, None] + tl.arange(0, 2)[None, None, :]
        place = codes.to(tl.pointer_type(tl.int64)) + both
        low, high = tl.split(tl.load(place, mask=ok[None, :, None], other=0, eviction_policy="evict_first"))
    elif WORDS == 2:
        place = codes.to(tl.pointer_type(tl.int64)) + at
        low = tl.load(place, mask=ok[None, :], other=0, eviction_policy="evict_first")
        high = low
    else:
        place = codes.to(tl.pointer_type(tl.uint32)) + at
        low = tl.load(place, mask=ok[None, :], other=0, eviction_policy="evict_first")
        high = low
    return low, high


@triton.jit
def plane_octet(plane, O: tl.constexpr, B: tl.constexpr, WHOLE: tl.constexpr):
    """Octet O of a block of a plane of B bits: eight tensors [R, B] of `field` where WHOLE, else of `subnormal`."""
    if B == 1:
        low, high = plane[0], plane[0]
    elif B == 2:
        low, high = words(plane[0])
    else:
        low, high = words(plane[O % 2])
    found = ()
    for e in tl.static_range(8):
        if e < 4:
            word = low
        else:
            word = high
        if WHOLE:
            found = found + (field(word, field_bit(O, e, B), B),)
        else:
            found = found + (subnormal(word, field_bit(O, e, B), B),)
    return found


@triton.jit
def signed_octet(plane, O: tl.constexpr):
    """Octet O of a block of signed bytes: eight int32 [R, B]."""
    low, high = words(plane[O % 2])
    found = ()
    for e in tl.static_range(8):
        if e < 4:
            word = low
        else:
            word = high
        found = found + (signed_byte(word, 8 * (e % 4)),)
    return found


@triton.jit
def scattered_octet(codes, rows, k, at, O: tl.constexpr):
    """`signed_octet` for rows that start at any byte: one load a code."""
    found = ()
    for e in tl.static_range(8):
        index = at + 8 * O + e
        place = codes.to(tl.pointer_type(tl.int8)) + rows[:, None] * k + index[None, :]
        found = found + (tl.load(place, mask=(index < k)[None, :], other=0).to(tl.int32),)
    return found


@triton.jit
def fp6_octet(nibbles, pairs, O: tl.constexpr, IS_E3M2: tl.constexpr):
    """Octet O of a block of 6-bit floats: eight float32 [R, B], 2^12 (e3m2) or 2^14 times too small."""
    low, high = words(nibbles[O % 2])
    low_pairs, high_pairs = words(pairs[0])
    low = fp6_bytes((low >> (4 * (O // 2))) & 0x0F0F0F0F, low_pairs >> (2 * O))
    high = fp6_bytes((high >> (4 * (O // 2))) & 0x0F0F0F0F, high_pairs >> (2 * O))
    found = ()
    for e in tl.static_range(8):
        if e < 4:
            word = low
        else:
            word = high
        found = found + (fp6_of_bytes(word, 8 * (e % 4), IS_E3M2),)
    return found


@triton.jit
def octet_fields(
    planes,
    codes,
    rows,
    k,
    at,
    O: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    SCATTERED: tl.constexpr,
):
    """Octet O of a block, eight tensors [R, B] of each plane; the second repeats the first where there is one only."""
    if KIND == INT8 and SCATTERED:
        first = scattered_octet(codes, rows, k, at, O)
    elif KIND == INT8 and WHOLE:
        first = signed_octet(planes[0], O)
    elif KIND > AFFINE:
        first = fp6_octet(planes[0], planes[1], O, KIND == E3M2)
    else:
        first = plane_octet(planes[0], O, low_bits(BITS), WHOLE)
    second = first
    if high_bits(KIND, BITS) > 0:
        second = plane_octet(planes[1], O, high_bits(KIND, BITS), WHOLE)
    return first, second


@triton.jit
def add_products(total, f, x, O: tl.constexpr, B: tl.constexpr, WEIGHT: tl.constexpr, SUBNORMAL: tl.constexpr):
    """Total [R, B] plus WEIGHT · fields · x for an octet; with SUBNORMAL in units of `SUBNORMAL_UNIT`."""
    for e in tl.static_range(8):
        if SUBNORMAL:
            total += f[e] * (x[e] * subnormal_factor(field_bit(O, e, B), B, WEIGHT))[None, :]
        elif WEIGHT != 1:
            total += f[e] * (x[e] * WEIGHT)[None, :]
        else:
            total += f[e] * x[e][None, :]
    return total


@triton.jit
def load_planes(
    codes,
    high,
    rows,
    row_blocks,
    block,
    ok,
    BITS: tl.constexpr,
    FLIPPED: tl.constexpr,
    SCATTERED: tl.constexpr,
):
    """The planes of a block, low bits first; the second is the first again where there is one only.

    FLIPPED makes signed bytes q the unsigned q + 128.
    """
    if SCATTERED:
        first = (rows, rows)
    elif BITS == 3:
        first = load_block(codes, rows, row_blocks, block, ok, 2)
    else:
        first = load_block(codes, rows, row_blocks, block, ok, 4)
    if FLIPPED:
        first = (first[0] ^ -9187201950435737472, first[1] ^ -9187201950435737472)  # 0x80 in each byte
    second = first
    if BITS == 6:
        second = load_block(high, rows, row_blocks, block, ok, 2)
    if BITS % 2 == 1:
        second = load_block(high, rows, row_blocks, block, ok, 1)
    return first, second


@triton.jit
def scaled_octet(x, t):
    """Eight tensors times eight others."""
    return x[0] * t[0], x[1] * t[1], x[2] * t[2], x[3] * t[3], x[4] * t[4], x[5] * t[5], x[6] * t[6], x[7] * t[7]


@triton.jit
def sum_of_octet(x):
    """The sum of eight tensors."""
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))


@triton.jit
def add_block(
    products,
    sums,
    x,
    column,
    planes,
    codes,
    rows,
    m,
    k,
    at,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCATTERED: tl.constexpr,
    SUBNORMAL: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One block of each thread: (products [R, B] plus codes · x, sums [B] plus x) for each of BLOCK_M rows of x."""
    for o in tl.static_range(UNIT // 8):
        first, second = octet_fields(planes, codes, rows, k, at, o, KIND, BITS, WHOLE, SCATTERED)
        if HAS_COLUMN:
            t = octet(column, at + 8 * o, k, ALIGNED)
        new_products = ()
        new_sums = ()
        for j in tl.static_range(BLOCK_M):
            row = x + tl.cast(tl.minimum(j, m - 1), tl.int64) * k
            if WHOLE:
                values = byte_octet(row, at + 8 * o, k, ALIGNED)
            else:
                values = octet(row, at + 8 * o, k, ALIGNED)
            if HAS_COLUMN:
                values = scaled_octet(values, t)
            added = add_products(products[j], first, values, o, low_bits(BITS), 1, SUBNORMAL)
            if high_bits(KIND, BITS) > 0:
                added = add_products(added, second, values, o, high_bits(KIND, BITS), high_weight(BITS), SUBNORMAL)
            new_products = new_products + (added,)
            new_sums = new_sums + (sums[j] + sum_of_octet(values),)
        products = new_products
        sums = new_sums
    return products, sums


@triton.jit
def add_scaled(totals, scale, products, minimum, sums, HAS_MINIMUM: tl.constexpr, BLOCK_M: tl.constexpr):
    """Totals [R, B] plus scale · products, plus minimum · sums if there are minima, for each row of x."""
    found = ()
    for j in tl.static_range(BLOCK_M):
        total = totals[j] + scale * products[j].to(tl.float32)
        if HAS_MINIMUM:
            total += minimum * sums[j].to(tl.float32)[None, :]
        found = found + (total,)
    return found


@triton.jit
def add_codes(totals, products, sums, FLIPPED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Totals [R, B] plus products, for each row of x; FLIPPED products are of codes 128 too large."""
    found = ()
    for j in tl.static_range(BLOCK_M):
        total = totals[j] + products[j]
        if FLIPPED:
            total -= (sums[j] * (128 * SUBNORMAL_UNIT))[None, :]
        found = found + (total,)
    return found


@triton.jit(do_not_specialize=["m", "parts"])
def gemv_rows(
    x,
    x_scale,
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
    x_factor,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCATTERED: tl.constexpr,
    UNIT: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """BLOCK_N outputs of up to BLOCK_M rows of x, over one of so many parts of the inputs.

    Args:
        x: [M, K], float, or int8 where WHOLE.
        x_scale: float32 [M] where WHOLE, else None.
        head: the packed weight; offsets are bytes from there.
        bias: [N] or None.
        y: [M, N], or where PARTIAL float32 [parts, M, N], then without factors and bias.
        m: M.
        parts: programs for one output.
        n: N.
        k: K.
        padded: codes in a row.
        groups: scales in a row.
        codes_offset: of the plane with the low bits.
        high_offset: of the other plane.
        scale_offset: of float16 [N, groups].
        minimum_offset: as scale_offset.
        factor_offset: of float32 [N].
        column_offset: of float32 [K].
        x_factor: see `finish`.
        KIND: see `layout.Kind`.
        BITS: of a code.
        GROUP: inputs that share a scale; a multiple of UNIT·PAIR, or 0.
        HAS_MINIMUM: AFFINE with minima.
        HAS_FACTOR: whether outputs have factors.
        HAS_COLUMN: whether inputs have factors, and x has not been multiplied by them yet.
        WHOLE: x is int8.
        ALIGNED: K is a multiple of 8 and rows of x start at multiples of 16 (int8: 8) bytes.
        SCATTERED: int8 codes whose rows start at any byte.
        UNIT: inputs of a block.
        PAIR: blocks of a thread in a step.
        BLOCK_M: 1, 2 or 4.
        BLOCK_N: R.
        BLOCKS: B.
        PARTIAL: whether there are several parts.
    """
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(outputs, n - 1).to(tl.int64)
    part = tl.program_id(1)
    codes = head + codes_offset
    high = head + high_offset
    scale = (head + scale_offset).to(tl.pointer_type(tl.float16))
    minimum = (head + minimum_offset).to(tl.pointer_type(tl.float16))
    column = (head + column_offset).to(tl.pointer_type(tl.float32))
    SUM: tl.constexpr = tl.int32 if WHOLE else tl.float32
    SUBNORMAL: tl.constexpr = not (WHOLE or SCATTERED or KIND > AFFINE)
    FLIPPED: tl.constexpr = SUBNORMAL and KIND == INT8

    totals = (tl.zeros((BLOCK_N, BLOCKS), SUM if KIND == INT8 else tl.float32),) * BLOCK_M
    steps = tl.cdiv(tl.cdiv(k, UNIT), BLOCKS * PAIR)
    share = tl.cdiv(steps, parts)
    for step in range(part * share, tl.minimum(part * share + share, steps)):
        first = (step * BLOCKS + tl.arange(0, BLOCKS)) * PAIR
        products = (tl.zeros((BLOCK_N, BLOCKS), SUM),) * BLOCK_M
        sums = (tl.zeros((BLOCKS,), SUM),) * BLOCK_M
        for i in tl.static_range(PAIR):
            block = first + i
            ok = block * UNIT < k
            planes = load_planes(codes, high, rows, padded // UNIT, block, ok, BITS, FLIPPED, SCATTERED)
            products, sums = add_block(
                products,
                sums,
                x,
                column,
                planes,
                codes,
                rows,
                m,
                k,
                block * UNIT,
                KIND,
                BITS,
                HAS_COLUMN,
                WHOLE,
                ALIGNED,
                SCATTERED,
                SUBNORMAL,
                UNIT,
                BLOCK_M,
            )
        if KIND == AFFINE:
            group = rows[:, None] * groups + (first * UNIT // GROUP)[None, :]
            ok = (first * UNIT < k)[None, :]
            s = tl.load(scale + group, mask=ok, other=0.0).to(tl.float32)
            if SUBNORMAL:
                s = s / SUBNORMAL_UNIT
            low = s
            if HAS_MINIMUM:
                low = tl.load(minimum + group, mask=ok, other=0.0).to(tl.float32)
            totals = add_scaled(totals, s, products, low, sums, HAS_MINIMUM, BLOCK_M)
        else:
            totals = add_codes(totals, products, sums, FLIPPED, BLOCK_M)

    for j in tl.static_range(BLOCK_M):
        total = tl.sum(totals[j], axis=1)
        mask = outputs < tl.where(j < m, n, 0)
        if PARTIAL:
            tl.store(y + tl.cast(part * m + j, tl.int64) * n + rows, total.to(tl.float32), mask=mask)
        else:
            at_m = tl.minimum(j, m - 1)
            value = finish(total, rows, at_m, head, factor_offset, x_scale, x_factor, bias, HAS_FACTOR)
            tl.store(y + tl.cast(at_m, tl.int64) * n + rows, value.to(y.dtype.element_ty), mask=mask)


def launches(x_MK: Tensor, weight: Weight, bias: Tensor | None, y_MN: Tensor, config: Config) -> list[Launch]:
    """What computes ``x @ W.T + bias`` for few rows.

    Args:
        x_MK: contiguous float [M, K], M at most ``config.block_m``.
        weight: of K inputs and N outputs.
        bias: float [N] or None.
        y_MN: contiguous float [M, N], filled by the launches.
        config: of family gemv.

    Returns:
        One launch, with one before it where x is rounded and one behind where the inputs are split.
    """
    m, k = x_MK.shape
    form, found = weight.form, []
    x_scale, whole = None, dynamic(form, m)
    if whole:
        rounding, rounded = activation.launch(x_MK, weight)
        found.append(rounding)
        x_MK, x_scale = rounded.codes, rounded.scale
    inputs = unit(form)
    width = 32 * config.warps
    given, fixed = arguments(weight), constants(weight)
    fixed["HAS_COLUMN"] = fixed["HAS_COLUMN"] and not whole
    split = config.split_k > 1
    out = y_MN.new_empty((config.split_k, *y_MN.shape), dtype=torch.float32) if split else y_MN
    scattered = form.kind is Kind.INT8 and k % 16 != 0
    x_factor = 1.0
    if form.kind is Kind.INT8 and not (whole or scattered):
        x_factor = 1 / SUBNORMAL_UNIT.value
    elif form.kind in _FP6_FACTORS:
        x_factor = _FP6_FACTORS[form.kind]
    found.append(
        Launch(
            kernel=gemv_rows,
            grid=(-(-form.n // config.block_n), config.split_k, 1),
            arguments={
                "x": x_MK,
                "x_scale": x_scale,
                "bias": bias,
                "y": out,
                "m": m,
                "parts": config.split_k,
                "x_factor": x_factor,
                **given,
            },
            constants={
                **fixed,
                "WHOLE": whole,
                "ALIGNED": k % 8 == 0 and x_MK.data_ptr() % 16 == 0,
                "SCATTERED": scattered,
                "UNIT": inputs,
                "PAIR": config.block_k // (width * inputs),
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCKS": width,
                "PARTIAL": split,
            },
            warps=config.warps,
        )
    )
    if split:
        found.append(reduce.launch(out, weight, x_scale, x_factor, bias, y_MN))
    return found
