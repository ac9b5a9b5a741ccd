"""Device functions that turn codes into numbers; what the planes look like is described in `layout`.

Legend: a *field* is a code or a part of one inside a 32-bit word; an *octet* is eight neighbouring inputs.

Converting integers to floats takes a slow unit of the processor. But bits 0 … 22 of a float32 with nothing above them
are a subnormal number: a field at bit r, left where it is and all else masked out, is the float32 q·2^(r-149), exactly.
Multiplying by subnormals is as fast as by others. The power of two is put into x beforehand, which is shared by all
rows of the weight, and taken out of the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sums with `subnormal` fields are this too small: 2^(64 - 149). So x from 2^-40 to 2^60 meets neither end of float32.
SUBNORMAL_UNIT = tl.constexpr(2.0**-85)


@triton.constexpr_function
def subnormal_shift(bit, bits):
    """Right shift that brings a field of ``bits`` at ``bit`` of a word below bit 23; alike for neighbouring fields."""
    return 0 if bit + bits <= 23 else (16 if bits == 8 else 12)


@triton.constexpr_function
def subnormal_mask(bit, bits):
    """The field's bits after the shift."""
    return ((1 << bits) - 1) << (bit - subnormal_shift(bit, bits))


@triton.constexpr_function
def subnormal_factor(bit, bits, weight):
    """What x is multiplied by for products with this field, whose lowest bit is worth ``weight``."""
    return weight * 2.0 ** (64 - bit + subnormal_shift(bit, bits))


@triton.constexpr_function
def field_bit(octet, element, bits):
    """Where in its word an element of an octet of a block is, in a plane of ``bits``."""
    if bits == 1:
        return 8 * octet + element
    if bits == 2:
        return 8 * (element % 4) + 2 * octet
    if bits == 4:
        return 8 * (element % 4) + 4 * (octet // 2)
    return 8 * (element % 4)


@triton.jit
def subnormal(word, S: tl.constexpr, B: tl.constexpr):
    """The field q of B bits at bit S of uint32 words as a float32: q·SUBNORMAL_UNIT / `subnormal_factor`."""
    if subnormal_shift(S, B) > 0:
        word = word >> subnormal_shift(S, B)
    return (word & subnormal_mask(S, B)).to(tl.float32, bitcast=True)


@triton.jit
def field(word, S: tl.constexpr, B: tl.constexpr):
    """The field of B bits at bit S of uint32 words, int32."""
    return ((word >> S) & ((1 << B) - 1)).to(tl.int32)


@triton.jit
def signed_byte(word, S: tl.constexpr):
    """The byte at bit S of uint32 words as a signed number, int32."""
    return (word << (24 - S)).to(tl.int32, bitcast=True) >> 24


@triton.jit
def words(pair):
    """The low and the high half of int64 values, uint32."""
    return pair.to(tl.uint32), (pair >> 32).to(tl.uint32)


@triton.jit
def fp6_of_bytes(quad, S: tl.constexpr, E3M2: tl.constexpr):
    """The 6-bit float whose sign (bit 7) and five other bits (0 to 4) are in the byte at bit S of words; float32.

    Its exponent and mantissa are those of a float16 2^12 (e3m2) or 2^14 (e2m3) times smaller, subnormals included.
    """
    bits = ((quad >> S) & 0xFF).to(tl.int16) << 8
    if not E3M2:
        bits = (bits >> 1) & -28800  # 0x8F80: the shift copies the sign
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def fp6_bytes(low, high):
    """Four codes, of a word with a nibble a byte and one of the 2-bit plane, as `fp6_of_bytes` reads them."""
    return low | ((high & 0x01010101) << 4) | ((high & 0x02020202) << 6)


@triton.jit
def fp6_value(codes, E3M2: tl.constexpr):
    """The values of 6-bit codes (any shape, integers), float32.

    Their exponent and mantissa are those of a float32 2^124 (e3m2) or 2^126 times smaller, subnormals included.
    """
    bits = codes.to(tl.uint32)
    sign = (bits & 32) << 26
    if E3M2:
        value = (sign | ((bits & 31) << 21)).to(tl.float32, bitcast=True) * 2.0**124
    else:
        value = (sign | ((bits & 31) << 20)).to(tl.float32, bitcast=True) * 2.0**126
    return value


@triton.jit
def lifted(codes):
    """256 + codes of at most 8 bits (any shape, uint8), put together from bits; float32."""
    return ((codes.to(tl.uint32) << 15) | 0x43800000).to(tl.float32, bitcast=True)


@triton.jit
def floats_of(pair, C: tl.constexpr, dtype: tl.constexpr):
    """The C-th 16-bit float in int64 values, float32."""
    return (pair >> (16 * C)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def octet(x, at, k, ALIGNED: tl.constexpr):
    """Eight neighbouring elements x[at] … x[at+7], float32 each; 0 from k on.

    Args:
        x: pointer to floats.
        at: int32 [B], multiples of 8.
        k: how many elements there are.
        ALIGNED: k is a multiple of 8 and x starts at a multiple of 16 bytes.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    if ALIGNED and dtype.primitive_bitwidth == 16:
        place = x.to(tl.pointer_type(tl.int64)) + ((at // 8) * 2)[:, None] + tl.arange(0, 2)[None, :]
        low, high = tl.split(tl.load(place, mask=(at < k)[:, None], other=0, eviction_policy="evict_last"))
        return (
            floats_of(low, 0, dtype),
            floats_of(low, 1, dtype),
            floats_of(low, 2, dtype),
            floats_of(low, 3, dtype),
            floats_of(high, 0, dtype),
            floats_of(high, 1, dtype),
            floats_of(high, 2, dtype),
            floats_of(high, 3, dtype),
        )
    elif ALIGNED and dtype.primitive_bitwidth == 32:
        place = x.to(tl.pointer_type(tl.int64)) + ((at // 8) * 4)[:, None] + tl.arange(0, 2)[None, :]
        mask = (at < k)[:, None]
        a, b = tl.split(tl.load(place, mask=mask, other=0, eviction_policy="evict_last"))
        c, d = tl.split(tl.load(place + 2, mask=mask, other=0, eviction_policy="evict_last"))
        return (
            a.to(tl.uint32).to(dtype, bitcast=True),
            (a >> 32).to(tl.uint32).to(dtype, bitcast=True),
            b.to(tl.uint32).to(dtype, bitcast=True),
            (b >> 32).to(tl.uint32).to(dtype, bitcast=True),
            c.to(tl.uint32).to(dtype, bitcast=True),
            (c >> 32).to(tl.uint32).to(dtype, bitcast=True),
            d.to(tl.uint32).to(dtype, bitcast=True),
            (d >> 32).to(tl.uint32).to(dtype, bitcast=True),
        )
    else:
        return (
            tl.load(x + at, mask=at < k, other=0.0).to(tl.float32),
            tl.load(x + at + 1, mask=at + 1 < k, other=0.0).to(tl.float32),
            tl.load(x + at + 2, mask=at + 2 < k, other=0.0).to(tl.float32),
            tl.load(x + at + 3, mask=at + 3 < k, other=0.0).to(tl.float32),
            tl.load(x + at + 4, mask=at + 4 < k, other=0.0).to(tl.float32),
            tl.load(x + at + 5, mask=at + 5 < k, other=0.0).to(tl.float32),
            tl.load(x + at + 6, mask=at + 6 < k, other=0.0).to(tl.float32),
            tl.load(x + at + 7, mask=at + 7 < k, other=0.0).to(tl.float32),
        )


@triton.jit
def byte_octet(x, at, k, ALIGNED: tl.constexpr):
    """Eight neighbouring signed bytes x[at] … x[at+7], int32 each; 0 from k on. Arguments as in `octet`."""
    if ALIGNED:
        pair = tl.load(x.to(tl.pointer_type(tl.int64)) + at // 8, mask=at < k, other=0, eviction_policy="evict_last")
        low, high = words(pair)
        return (
            signed_byte(low, 0),
            signed_byte(low, 8),
            signed_byte(low, 16),
            signed_byte(low, 24),
            signed_byte(high, 0),
            signed_byte(high, 8),
            signed_byte(high, 16),
            signed_byte(high, 24),
        )
    else:
        return (
            tl.load(x + at, mask=at < k, other=0).to(tl.int32),
            tl.load(x + at + 1, mask=at + 1 < k, other=0).to(tl.int32),
            tl.load(x + at + 2, mask=at + 2 < k, other=0).to(tl.int32),
            tl.load(x + at + 3, mask=at + 3 < k, other=0).to(tl.int32),
            tl.load(x + at + 4, mask=at + 4 < k, other=0).to(tl.int32),
            tl.load(x + at + 5, mask=at + 5 < k, other=0).to(tl.int32),
            tl.load(x + at + 6, mask=at + 6 < k, other=0).to(tl.int32),
            tl.load(x + at + 7, mask=at + 7 < k, other=0).to(tl.int32),
        )


@triton.jit
def tile_of_units(
    codes, rows, padded, start, UNIT: tl.constexpr, GRAIN: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A tile [N, BLOCK_K / UNIT] of a plane.

    Args:
        codes: pointer to the plane's first byte.
        rows: int64 [N].
        padded: inputs in a row.
        start: the first input, a multiple of BLOCK_K.
        UNIT: inputs in a byte.
        GRAIN: a known divisor of `padded`, from which the compiler knows how loads are aligned.
        EVEN: no row ends inside a tile; else zeros follow it.
        BLOCK_K: inputs of a tile.
    """
    row_units = padded // GRAIN * (GRAIN // UNIT)
    at = start // BLOCK_K * (BLOCK_K // UNIT) + tl.arange(0, BLOCK_K // UNIT)
    place = codes + rows[:, None] * row_units + at[None, :]
    if EVEN:
        units = tl.load(place, eviction_policy="evict_first")
    else:
        units = tl.load(place, mask=(at < row_units)[None, :], other=0, eviction_policy="evict_first")
    return units


@triton.jit
def tile_of_nibbles(
    codes,
    rows,
    padded,
    start,
    GRAIN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Codes [BLOCK_N, BLOCK_K] of a 4-bit plane in the order of the inputs, uint8.

    Args:
        codes: pointer to the plane's first byte.
        rows: int64 [BLOCK_N].
        padded: inputs in a row.
        start: the first input.
        GRAIN: see `tile_of_units`.
        EVEN: see `tile_of_units`.
        BLOCK_N: rows.
        BLOCK_K: inputs, a multiple of 32.
    """
    units = tile_of_units(codes, rows, padded, start, 2, GRAIN, EVEN, BLOCK_K)
    both = tl.reshape(tl.join(units & 15, units >> 4), (BLOCK_N, BLOCK_K // 32, 16, 2))
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), (BLOCK_N, BLOCK_K))


@triton.jit
def tile_of_crumbs(
    codes,
    rows,
    padded,
    start,
    GRAIN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`tile_of_nibbles` for a plane of 2 bits."""
    units = tile_of_units(codes, rows, padded, start, 4, GRAIN, EVEN, BLOCK_K)
    both = tl.join(tl.join(units & 3, (units >> 4) & 3), tl.join((units >> 2) & 3, units >> 6))
    both = tl.reshape(both, (BLOCK_N, BLOCK_K // 32, 8, 2, 2))
    return tl.reshape(tl.permute(both, (0, 1, 3, 4, 2)), (BLOCK_N, BLOCK_K))


@triton.jit
def tile_of_bits(
    codes, rows, padded, start, GRAIN: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """`tile_of_nibbles` for a plane of 1 bit."""
    units = tile_of_units(codes, rows, padded, start, 8, GRAIN, EVEN, BLOCK_K)
    even = tl.join(tl.join(units & 1, (units >> 4) & 1), tl.join((units >> 2) & 1, (units >> 6) & 1))
    odd = tl.join(tl.join((units >> 1) & 1, (units >> 5) & 1), tl.join((units >> 3) & 1, units >> 7))
    return tl.reshape(tl.join(even, odd), (BLOCK_N, BLOCK_K))


@triton.jit
def tile_of_codes(
    codes,
    high,
    rows,
    padded,
    start,
    BITS: tl.constexpr,
    SIGNED: tl.constexpr,
    GRAIN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Codes [BLOCK_N, BLOCK_K] of any format but the dense one; zeros behind a row's end.

    Args:
        codes: pointer to the first byte of the plane with the low bits.
        high: pointer to that of the other plane.
        rows: int64 [BLOCK_N].
        padded: codes in a row.
        start: the first input, a multiple of BLOCK_K.
        BITS: of a code.
        SIGNED: codes of 8 bits are int8; all else is uint8.
        GRAIN: see `tile_of_units`.
        EVEN: see `tile_of_units`.
        BLOCK_N: rows.
        BLOCK_K: inputs, a multiple of 32.
    """
    if SIGNED:
        codes = codes.to(tl.pointer_type(tl.int8))
    if BITS == 8:
        found = tile_of_units(codes, rows, padded, start, 1, GRAIN, EVEN, BLOCK_K)
    elif BITS == 3:
        found = tile_of_crumbs(codes, rows, padded, start, GRAIN, EVEN, BLOCK_N, BLOCK_K)
        found |= tile_of_bits(high, rows, padded, start, GRAIN, EVEN, BLOCK_N, BLOCK_K) << 2
    else:
        found = tile_of_nibbles(codes, rows, padded, start, GRAIN, EVEN, BLOCK_N, BLOCK_K)
        if BITS == 5:
            found |= tile_of_bits(high, rows, padded, start, GRAIN, EVEN, BLOCK_N, BLOCK_K) << 4
        if BITS == 6:
            found |= tile_of_crumbs(high, rows, padded, start, GRAIN, EVEN, BLOCK_N, BLOCK_K) << 4
    return found
