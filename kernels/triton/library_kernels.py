"""Products by kernels that come with PyTorch, on weights packed for autoq.

Legend: M rows of x, K inputs, N outputs, G groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq_kernels import layout
from autoq_kernels.layout import Kind
from autoq_kernels.triton import activation, dequantize, reduce
from autoq_kernels.triton.launching import run
from autoq_kernels.triton.weight import Weight, refuse_capture

INT4PACKED = "int4pack"  # what `Weight.prepared` has once `prepare_int4pack` was called
_INT4_GROUPS = (32, 64, 128, 256)
_INT_MM_ROWS = 16  # _int_mm wants more on CUDA


def whole_buffer(weight: Weight) -> Tensor:
    """uint8 [total bytes], without asking the device for the header."""
    return weight.head.as_strided((weight.form.total_bytes,), (1,), weight.head.storage_offset())


def aten_linear(x_MK: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` for a dense weight of x's dtype, or for one that is made dense first: [M, N]."""
    if weight.form.kind is Kind.DENSE:
        form = weight.form
        start, end = form.codes_offset, form.codes_offset + form.n * form.k * x_MK.element_size()
        w_NK = whole_buffer(weight)[start:end].view(x_MK.dtype).view(form.n, form.k)
    else:
        w_NK = x_MK.new_empty(weight.form.n, weight.form.k)
        run(dequantize.launches(weight, w_NK))
    return torch.nn.functional.linear(x_MK, w_NK, None if bias is None else bias.to(x_MK.dtype))


def int_mm_why_not(form: layout.Header, m: int) -> str | None:
    """Why ``torch._int_mm`` cannot multiply m rounded rows by such a weight; None where it can."""
    if form.kind is not Kind.INT8:
        return f"it multiplies int8 codes, not {form.kind.name}"
    if m <= _INT_MM_ROWS:
        return f"it needs more than {_INT_MM_ROWS} rows, not {m}"
    if form.k % 8 or form.n % 8:
        return f"K and N must be multiples of 8, not {form.k} and {form.n}"
    return None


def int_mm(x_MK: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` with x rounded to int8 per row, by ``torch._int_mm``: [M, N]."""
    form = weight.form
    rounding, rounded = activation.launch(x_MK, weight)
    rounding.run()
    start = form.codes_offset
    codes_NK = whole_buffer(weight)[start : start + form.n * form.k].view(torch.int8).view(form.n, form.k)
    sums_MN = torch._int_mm(rounded.codes, codes_NK.t())
    y_MN = x_MK.new_empty(sums_MN.shape)
    reduce.launch(sums_MN[None], weight, rounded.scale, 1.0, bias, y_MN).run()
    return y_MN


def int4pack_why_not(form: layout.Header, dtype: torch.dtype) -> str | None:
    """Why ``torch.ops.aten._weight_int4pack_mm`` cannot multiply by such a weight; None where it can."""
    if form.kind is not Kind.AFFINE or form.bits != 4:
        return f"it multiplies 4-bit codes with minima, not {form.kind.name} of {form.bits} bits"
    if dtype is not torch.bfloat16:
        return f"x must be bfloat16, not {str(dtype).removeprefix('torch.')}"
    if form.group_size not in _INT4_GROUPS:
        return f"groups must have one of {_INT4_GROUPS} inputs, not {form.group_size}"
    rows = 8 if torch.version.hip is None else 16  # AMD's packer writes whole tiles of 16
    if form.k % form.group_size or form.n % rows:
        return f"K must be a multiple of the group and N of {rows}, not {form.k} and {form.n}"
    return None


def int4pack(x_MK: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` by tinygemm's ``_weight_int4pack_mm``: [M, N].

    The weight is packed a second time for it, once, in that kernel's layout: 4 bits and 32 / group bits a weight more.
    """
    packed, scale_and_zero, *column = prepare_int4pack(weight)
    if column:
        x_MK = (x_MK.float() * column[0]).to(x_MK.dtype)
    y_MN = torch.ops.aten._weight_int4pack_mm(x_MK, packed, weight.form.group_size, scale_and_zero)
    return y_MN if bias is None else y_MN + bias.to(y_MN.dtype)


def prepare_int4pack(weight: Weight) -> tuple[Tensor, ...]:
    """Codes in tinygemm's layout, bfloat16 [G, N, 2] of scale and zero, and the column scale if there is one.

    Made at the first call and kept with the weight, so that must not be while a CUDA graph is warmed up or recorded.
    """
    known = weight.prepared.get(INT4PACKED)
    if known is None:
        refuse_capture(weight.head)
        data = whole_buffer(weight)
        codes_NK, parts = layout.codes(data), layout.sections(data)
        tiles = next(count for count in (8, 4, 2) if weight.form.k % (16 * count) == 0)
        pairs = (codes_NK[:, ::2] << 4) | codes_NK[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
        column = (
            [parts["column_scale"].clone()] if "column_scale" in parts else []
        )  # a view would keep the weight alive
        known = (packed, int4_scale_and_zero(parts), *column)
        if packed.is_cuda:  # whatever stream uses it next
            torch.cuda.current_stream(packed.device).synchronize()
        weight.prepared[INT4PACKED] = known
    return known


def int4_scale_and_zero(parts: dict[str, Tensor]) -> Tensor:
    """Tinygemm's form of scales and minima, W = (q - 8)·scale + zero: bfloat16 [G, N, 2]."""
    scale_NG = parts["scale"].float()
    minimum_NG = parts["minimum"].float() if "minimum" in parts else torch.zeros_like(scale_NG)
    if "row_scale" in parts:
        scale_NG, minimum_NG = scale_NG * parts["row_scale"][:, None], minimum_NG * parts["row_scale"][:, None]
    both = torch.stack([scale_NG, minimum_NG + 8 * scale_NG], dim=2)
    return both.transpose(0, 1).to(torch.bfloat16).contiguous()
