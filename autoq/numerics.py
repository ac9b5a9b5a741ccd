"""Quantization maths on plain float32 tensors: no files, no kernels, no candidates.

Legend: N rows (output features), K columns (input features), g members of one group, H rows of a tile.

The affine form used everywhere is ``w ≈ q·scale + minimum``. It is the only one in autoq: ``(q − z)·s``,
``(q − 8)·s + z`` and ``s·(q + z)`` of other libraries are the same numbers with ``minimum = −z·s``,
``z − 8·s`` and ``z·s``. Mixing them up is the commonest bug of the field (a relative error near 4).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ROW_EXPONENT = 12  # rows are scaled to |w| < 2¹²: the middle of fp16's range, so scales have room both ways
SINKHORN_MIN_ROWS = 16  # below, column deviations are noise and SINQ is worse than plain rounding
_FACTOR_RANGE = (math.exp(-0.3), math.exp(10.0))  # of the published code
_FP6_CODES = 64
_NO_FRACTION = 1.5 * 2**23  # float32 has no bits below 1 there


# The published defaults: penalty, its growth per iteration, and how many iterates are judged.
HQQ_BETA, HQQ_KAPPA, HQQ_ITERATIONS = 10.0, 1.01, 20


class Grid(NamedTuple):
    """Affine codes of groups: ``w ≈ codes·scale[..., None] + minimum[..., None]``.

    Attributes:
        codes: uint8 ``[..., g]`` in ``[0, 2**bits − 1]``.
        scale: float16 ``[...]``, not negative.
        minimum: float16 ``[...]``.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor

    def dequantize(self) -> Tensor:
        """The float32 values the codes stand for, ``[..., g]``."""
        return self.codes.float() * self.scale.float().unsqueeze(-1) + self.minimum.float().unsqueeze(-1)


class FloatFormat(NamedTuple):
    """A 6-bit float: one sign bit, then exponent and mantissa; no infinity, no NaN.

    Attributes:
        mantissa_bits: stored bits of the mantissa.
        bias: what is subtracted from the stored exponent.
        max: the largest value, to which larger ones saturate.
    """

    mantissa_bits: int
    bias: int
    max: float


E3M2 = FloatFormat(mantissa_bits=2, bias=3, max=28.0)
E2M3 = FloatFormat(mantissa_bits=3, bias=1, max=7.5)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖`` (Frobenius), accumulated in float64.

    Returns:
        0 when both are zero, infinity when only ``expected`` is, NaN when either holds a NaN.
    """
    error = power = 0.0
    chunk = 1 << 22
    flat, reference = actual.reshape(-1), expected.reshape(-1)
    for start in range(0, reference.numel(), chunk):
        want = reference[start : start + chunk].double()
        error += float((flat[start : start + chunk].double() - want).square().sum())
        power += float(want.square().sum())
    if power == 0.0:
        return error * math.inf if error else 0.0
    return math.sqrt(error / power)


def int8_rows(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row: ``w ≈ codes·scale``, ``scale = max|w|/127.5``.

    Both ends are half a step inside the outermost codes, −128 and 127, so no error exceeds half a step.
    The guard of a zero row is the smallest normal number, not float32's epsilon (torchao), which would
    coarsen rows below 1.5e-5.

    Returns:
        int8 codes ``[N, K]`` and the float32 scale ``[N]``.
    """
    w_NK = w_NK.float()
    scale_N = (w_NK.abs().amax(dim=1) / 127.5).clamp_min(torch.finfo(torch.float32).tiny)
    codes_NK = _round(w_NK / scale_N.unsqueeze(1)).clamp_(-128, 127)
    return codes_NK.to(torch.int8), scale_N


def power_of_two_rows(w_NK: Tensor) -> Tensor:
    """Per row, the power of two that brings its largest magnitude into ``[2¹¹, 2¹²)``; 1 for a zero row.

    Dividing by it is exact, and then float16 holds group scales and minima whatever the weights' magnitude.

    Returns:
        float32 ``[N]``.
    """
    amax_N = w_NK.abs().amax(dim=1).float()
    exponent_N = torch.frexp(amax_N).exponent - ROW_EXPONENT
    row_N = torch.ldexp(torch.ones_like(amax_N), exponent_N.clamp(-126, 126))
    return torch.where(amax_N > 0, row_N, 1.0)


def rtn(w: Tensor, bits: int) -> Grid:
    """Round to nearest on the grid from each group's minimum to its maximum.

    Minimum and scale are rounded outwards to float16 before the codes are chosen, so every value lies
    inside the stored grid and no error exceeds half a stored step, also in groups far from zero; in a
    constant group the grid shrinks to the gap between the constant and the float16 below it.

    Args:
        w: float32 ``[..., g]``, below 2¹³ in magnitude (see :func:`power_of_two_rows`).
        bits: 2 to 8.
    """
    top = 2**bits - 1
    offset, _, scale, minimum = _offsets(w, top)
    return Grid(_round(offset).clamp_(0, top).to(torch.uint8), scale, minimum)


def hqq(
    w: Tensor, bits: int, *, beta: float = HQQ_BETA, kappa: float = HQQ_KAPPA, iterations: int = HQQ_ITERATIONS
) -> Grid:
    """Half-quadratic quantization: the scale of :func:`rtn`, the minimum moved to lower an l_0.7 error.

    Badri and Shaji, 2023. Runs in code units, ``w/scale``: on raw weights of a language model every
    residual is below the threshold of the shrinkage operator, which then never acts. With
    r = a + z − q, the update z ← mean(q − (a − shrink(r))) is z ← z − mean(sign(r)·min(|r|, |r|^−0.3/β)).
    Each iterate is judged with the float16 minimum that would be stored, and each group keeps its best
    (by mean absolute error), codes and minimum together; so no group is worse than under :func:`rtn`.

    Args:
        w: float32 ``[..., g]``, below 2¹³ in magnitude.
        bits: 2 to 8.
        beta: initial strength of the quadratic penalty.
        kappa: factor on ``beta`` per iteration.
        iterations: iterates judged, the first being :func:`rtn`'s.
    """
    top = 2**bits - 1
    offset, inverse, scale, start = _offsets(w, top)
    step, start32 = scale.float().unsqueeze(-1), start.float().unsqueeze(-1)
    residual, size, move, work = (torch.empty_like(offset) for _ in range(4))
    ideal = torch.zeros_like(step)  # z relative to start, which keeps far-off groups exact
    best_z, best_error = ideal, torch.full_like(step, torch.inf)
    for _ in range(iterations):
        z = (start32 - (start32 - ideal * step).half().float()) * inverse
        torch.add(offset, z, out=residual)
        torch.add(residual, _NO_FRACTION, out=work).sub_(_NO_FRACTION)  # _round into work
        residual.sub_(work.clamp_(0, top))
        torch.abs(residual, out=size)
        error = size.sum(dim=-1, keepdim=True)
        better = error < best_error
        best_error, best_z = torch.where(better, error, best_error), torch.where(better, z, best_z)
        torch.minimum(_power(size, 1 / beta, move, work), size, out=move)
        total = torch.copysign(move, residual, out=move).sum(dim=-1, keepdim=True)
        ideal = ideal - total / w.shape[-1]  # not rounded to what can be stored, so that small moves add up
        beta *= kappa
    torch.add(offset, best_z, out=residual)
    codes = _round(residual).clamp_(0, top).to(torch.uint8)
    return Grid(codes, scale, (start32 - best_z * step).squeeze(-1).half())


def _power(x: Tensor, factor: float, out: Tensor, work: Tensor) -> Tensor:
    """``factor · x^−0.3`` for x ≥ 0, three times faster than ``torch.pow``, where HQQ spends its time.

    With c = x^(1/16), it is (x^(−1/8))² · c^(−4/5); the last is a quadratic fitted over 0.12 < x < 1 to a
    relative error of 5e-5. Below 0.12 the result exceeds x, which is all that HQQ needs to know.
    """
    a2, a1, a0 = 0.8642431, -2.52148952, 2.65729528
    middle = a1 / (2 * a2)
    torch.rsqrt(x, out=out).rsqrt_().rsqrt_()
    c = torch.rsqrt(out, out=work)
    out.square_()
    return out.mul_(c.add_(middle).square_().add_(a0 / a2 - middle**2).mul_(a2 * factor))


def _round(x: Tensor) -> Tensor:
    """Round to the nearest whole number in place, ties to even, for float32 below 2²² in magnitude.

    The sum has no fractional bits left. ``torch.round`` and ``sqrt`` go through MKL's vector library,
    whose threads meet at a barrier for any size: 12 ms instead of 6 µs when the cores are shared.
    """
    return x.add_(_NO_FRACTION).sub_(_NO_FRACTION)


def _offsets(w: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Grid of :func:`rtn`: ``(w − minimum)/scale``, ``1/scale`` ``[..., 1]`` (0 for 0), scale, minimum."""
    low = w.amin(dim=-1)
    minimum = low.half()
    minimum = torch.where(minimum.float() > low, _neighbour(minimum, -1), minimum)
    span = (w.amax(dim=-1) - minimum.float()) / top
    scale = span.half()
    scale = torch.where(scale.float() < span, _neighbour(scale, 1), scale)
    inverse = torch.where(scale > 0, 1 / scale.float(), 0.0).unsqueeze(-1)
    return (w - minimum.float().unsqueeze(-1)).mul_(inverse), inverse, scale, minimum


def _neighbour(x: Tensor, direction: int) -> Tensor:
    """The next float16 above (+1) or below (−1): ``torch.nextafter`` has no float16."""
    bits = x.view(torch.int16)
    away = torch.where(x > 0, direction, -direction).to(torch.int16)
    smallest = torch.full_like(bits, 1 if direction > 0 else -0x7FFF)
    return torch.where(x == 0, smallest, bits + away).view(torch.float16)


def sinkhorn(w_HK: Tensor, iterations: int = 16) -> tuple[Tensor, Tensor]:
    """Column and row factors that even out the standard deviations of one tile (SINQ, arXiv 2509.22944).

    ``w / t / r`` has the smallest imbalance met, the largest standard deviation over both axes divided by
    the smallest. Unlike the published code, the tile is first divided by its standard deviation, which
    makes the factors independent of the weights' magnitude, and constant rows and columns (zero ones
    among them) are left out and keep the factor 1: their deviation is rounding noise and would stop the
    iteration at once.

    Args:
        w_HK: float32, all rows of the weight × the columns of one group.
        iterations: iterates judged; the first is the tile as it is.

    Returns:
        t ``[K]`` and r ``[H]``, float32, positive, t with mean 1: the iterates of a tile without structure differ by
        one factor only, and rounding would decide which is the best. All ones below 16 usable rows or 2 columns.
    """
    t_K, r_H = w_HK.new_ones(w_HK.shape[1]), w_HK.new_ones(w_HK.shape[0])
    rows_H, columns_K = _varying(w_HK)
    if int(rows_H.sum()) < SINKHORN_MIN_ROWS or int(columns_K.sum()) < 2:
        return t_K, r_H
    whole = bool(rows_H.all()) and bool(columns_K.all())
    tile = w_HK if whole else w_HK[rows_H][:, columns_K]
    peak = tile.abs().amax()  # first, so that the squares of very small or large weights stay finite
    tile = tile / peak
    centred = tile - tile.mean()
    tile.div_(math.sqrt(float(centred.square_().sum()) / (tile.numel() - 1)))
    t, r = _balance(tile, iterations, work=centred)
    mean = t.double().mean().float()
    t_K[columns_K], r_H[rows_H] = t / mean, r * mean
    return t_K, r_H


def _varying(w_HK: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of the rows and columns that are not constant, each within the others' selection."""
    rows_H = w_HK.amax(dim=1) > w_HK.amin(dim=1)
    columns_K = w_HK.amax(dim=0) > w_HK.amin(dim=0)
    while not (bool(rows_H.all()) and bool(columns_K.all())):
        inner = w_HK[rows_H][:, columns_K]
        if inner.numel() == 0:
            break
        keep_rows, keep_columns = inner.amax(1) > inner.amin(1), inner.amax(0) > inner.amin(0)
        if bool(keep_rows.all()) and bool(keep_columns.all()):
            break
        rows_H[rows_H.clone()], columns_K[columns_K.clone()] = keep_rows, keep_columns
    return rows_H, columns_K


def _balance(tile: Tensor, iterations: int, work: Tensor) -> tuple[Tensor, Tensor]:
    """The iteration of SINQ's published ``sinkhorn_log``: damped, both updates from the same iterate.

    It multiplies where that adds logarithms. ``work`` is scratch of the tile's shape.
    """
    t, r = tile.new_ones(tile.shape[1]), tile.new_ones(tile.shape[0])
    best, best_t, best_r, target = float("inf"), t, r, 0.0
    current = torch.empty_like(tile)
    for iteration in range(iterations):
        torch.div(tile, t, out=current).div_(r.unsqueeze(1))
        column, row = _deviation(current, 0, work), _deviation(current, 1, work)
        smallest = min(float(column.min()), float(row.min()))
        imbalance = max(float(column.max()), float(row.max())) / max(smallest, 1e-12)
        if imbalance > best:
            break  # the published gate: after the first rise nothing changes any more
        best, best_t, best_r = imbalance, t, r
        if not iteration:
            target = min(max(smallest, 1e-3), 1e3) + 1e-6
        t = (t * (column / target).clamp_(0.7, 2.0)).clamp_(*_FACTOR_RANGE)
        r = (r * (row / target).clamp_(0.7, 2.0)).clamp_(*_FACTOR_RANGE)
    return best_t, best_r


def _deviation(x: Tensor, dim: int, work: Tensor) -> Tensor:
    """Unbiased standard deviation, in two passes: ten times faster than ``Tensor.std`` on a CPU."""
    torch.sub(x, x.mean(dim=dim, keepdim=True), out=work)
    return work.square_().sum(dim=dim).div_(x.shape[dim] - 1).rsqrt_().reciprocal_()


def encode_fp6(x: Tensor, form: FloatFormat) -> Tensor:
    """Nearest 6-bit float, ties to the even mantissa, saturating; −0 keeps its sign.

    Args:
        x: float32, any shape, already divided by its scale.
        form: :data:`E3M2` or :data:`E2M3`.

    Returns:
        uint8 codes: sign in bit 5, then exponent, then mantissa.
    """
    magnitude = x.abs().clamp_max_(form.max)
    exponent = (magnitude.view(torch.int32) >> 23).sub_(127).clamp_(min=1 - form.bias)
    # Within a binade the codes are evenly spaced, and they go on counting into the next: with
    # q = round(|x| / spacing), q of a normal number already holds the 1 of its implicit bit.
    inverse_spacing = ((127 + form.mantissa_bits - exponent) << 23).view(torch.float32)
    steps = _round(magnitude.mul_(inverse_spacing)).to(torch.int32)
    codes = steps.add_((exponent - (1 - form.bias)) << form.mantissa_bits)
    return codes.add_(torch.signbit(x).to(torch.int32) << 5).to(torch.uint8)


def decode_fp6(codes: Tensor, form: FloatFormat) -> Tensor:
    """The float32 values of 6-bit codes (uint8, any shape)."""
    return fp6_values(form).to(codes.device)[codes.long()]


def fp6_values(form: FloatFormat) -> Tensor:
    """The values of all 64 codes, float32 ``[64]``."""
    code = torch.arange(_FP6_CODES)
    mantissa_range = 1 << form.mantissa_bits
    exponent, mantissa = (code & 31) >> form.mantissa_bits, code & (mantissa_range - 1)
    normal = exponent > 0
    fraction = (mantissa + torch.where(normal, mantissa_range, 0)).double() / mantissa_range
    value = fraction * torch.exp2((torch.where(normal, exponent, 1) - form.bias).double())
    return torch.copysign(value, torch.where(code >= 32, -1.0, 1.0).double()).float()


def fp6_rows(w_NK: Tensor, form: FloatFormat) -> tuple[Tensor, Tensor]:
    """6-bit floats per row: ``w ≈ decode(codes)·scale`` with ``scale = max|w|/form.max``.

    Returns:
        uint8 codes ``[N, K]`` and the float32 scale ``[N]``.
    """
    w_NK = w_NK.float()
    scale_N = (w_NK.abs().amax(dim=1) / form.max).clamp_min(torch.finfo(torch.float32).tiny)
    return encode_fp6(w_NK / scale_N.unsqueeze(1), form), scale_N
