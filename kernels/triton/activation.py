"""Rows of x rounded to int8, each with its own scale, and their sums by group.

Legend: M rows, K inputs, G groups of inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from autoq_kernels.triton.launching import Launch
from autoq_kernels.triton.weight import Weight

_BLOCK_K = 1024


class Rounded(NamedTuple):
    """Rows in int8.

    Attributes:
        codes: int8 [M, K], in [-127, 127].
        scale: float32 [M]; a row is codes·scale.
        sums: int32 [M, G], of the codes of each group; one column where there are no groups.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor


@triton.jit
def read_x(x, at, ok, head, column_offset, HAS_COLUMN: tl.constexpr):
    """x[at] in float32, times the column scale."""
    value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    if HAS_COLUMN:
        column = (head + column_offset).to(tl.pointer_type(tl.float32))
        value = value * tl.load(column + at, mask=ok, other=0.0)
    return value


@triton.jit
def round_rows(
    x,
    codes,
    scale,
    sums,
    head,
    column_offset,
    k,
    groups,
    GROUP: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program a row: its largest magnitude first, then codes, half to even; what is not finite makes a row NaN."""
    row = tl.program_id(0).to(tl.int64)
    x += row * k
    codes += row * k
    lanes = tl.arange(0, BLOCK_K)
    largest = tl.zeros((BLOCK_K,), tl.float32)
    wrong = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, k, BLOCK_K):
        at = start + lanes
        value = tl.abs(read_x(x, at, at < k, head, column_offset, HAS_COLUMN))
        wrong |= (value - value != 0.0).to(tl.int32)
        largest = tl.maximum(largest, value)
    step = tl.maximum(tl.div_rn(tl.max(largest, axis=0), 127.0), 1.1754943508222875e-38)
    if tl.max(wrong, axis=0) > 0:
        step = float("nan")
    tl.store(scale + row, step)
    for start in range(0, k, BLOCK_K):
        at = start + lanes
        exact = tl.div_rn(read_x(x, at, at < k, head, column_offset, HAS_COLUMN), step)
        whole = (tl.minimum(tl.maximum(exact, -127.0), 127.0) + 12582912.0) - 12582912.0
        code = whole.to(tl.int32).to(tl.int8)
        tl.store(codes + at, code, mask=at < k)
        if GROUP > 0:
            total = tl.sum(tl.reshape(code.to(tl.int32), (BLOCK_K // GROUP, GROUP)), axis=1)
            group = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
            tl.store(sums + row * groups + group, total, mask=group < groups)


def launch(x_MK: Tensor, weight: Weight) -> tuple[Launch, Rounded]:
    """The launch that rounds x (times the weight's column scale, if any), and where its results will be.

    Args:
        x_MK: contiguous float [M, K].
        weight: whose column scale and groups count.
    """
    m, k = x_MK.shape
    form = weight.form
    out = Rounded(
        x_MK.new_empty((m, k), dtype=torch.int8),
        x_MK.new_empty(m, dtype=torch.float32),
        x_MK.new_empty((m, max(1, form.groups)), dtype=torch.int32),
    )
    return (
        Launch(
            kernel=round_rows,
            grid=(m, 1, 1),
            arguments={
                "x": x_MK,
                "codes": out.codes,
                "scale": out.scale,
                "sums": out.sums,
                "head": weight.head,
                "column_offset": form.column_scale_offset,
                "k": k,
                "groups": form.groups,
            },
            constants={
                "GROUP": form.group_size,
                "HAS_COLUMN": form.column_scale_offset > 0,
                "BLOCK_K": _BLOCK_K,
            },
            warps=4,
        ),
        out,
    )
