"""The end of every product: factors, bias, and the sum over parts where the inputs were split among programs.

Legend: M rows of x, N outputs, S parts.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl
from autoq_kernels.triton.launching import Launch
from autoq_kernels.triton.weight import Weight, arguments, constants

_BLOCK_N = 256


@triton.jit
def finish(total, at_n, at_m, head, factor_offset, x_scale, x_factor, bias, HAS_FACTOR: tl.constexpr):
    """Sums of products (any shape) times the factors of their output and their row, plus bias; float32.

    Args:
        total: the sums.
        at_n: outputs, broadcast against `total`; none beyond the last.
        at_m: rows of x, as `at_n`.
        head: the packed weight.
        factor_offset: of float32 [N] in it.
        x_scale: float32 [M], or None.
        x_factor: a number.
        bias: [N], or None.
        HAS_FACTOR: whether there is a factor for each output.
    """
    value = total.to(tl.float32) * x_factor
    if x_scale is not None:
        value *= tl.load(x_scale + at_m)
    if HAS_FACTOR:
        value *= tl.load((head + factor_offset).to(tl.pointer_type(tl.float32)) + at_n)
    if bias is not None:
        value += tl.load(bias + at_n).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["m", "count"])
def add_parts(
    parts,
    head,
    factor_offset,
    x_scale,
    x_factor,
    bias,
    y,
    m,
    n,
    count,
    HAS_FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Y [M, N] from parts [S, M, N], added in order."""
    row = tl.program_id(0)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = outputs < n
    inside = tl.minimum(outputs, n - 1)
    at = tl.cast(row, tl.int64) * n + outputs
    total = tl.load(parts + at, mask=mask, other=0)
    for part in range(1, count):
        total += tl.load(parts + at + part * (tl.cast(m, tl.int64) * n), mask=mask, other=0)
    value = finish(total, inside, row, head, factor_offset, x_scale, x_factor, bias, HAS_FACTOR)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


def launch(
    parts_SMN: Tensor, weight: Weight, x_scale: Tensor | None, x_factor: float, bias: Tensor | None, y_MN: Tensor
) -> Launch:
    """The launch that adds up parts and ends the product; arguments as in `finish`."""
    parts, m, n = parts_SMN.shape
    return Launch(
        kernel=add_parts,
        grid=(m, -(-n // _BLOCK_N), 1),
        arguments={
            "parts": parts_SMN,
            "head": weight.head,
            "factor_offset": arguments(weight)["factor_offset"],
            "x_scale": x_scale,
            "x_factor": x_factor,
            "bias": bias,
            "y": y_MN,
            "m": m,
            "n": n,
            "count": parts,
        },
        constants={"HAS_FACTOR": constants(weight)["HAS_FACTOR"], "BLOCK_N": _BLOCK_N},
        warps=2,
    )
