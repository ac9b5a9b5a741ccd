"""The operators autoq::linear and autoq::dequantize: schema, shapes, gradient and plain-PyTorch default.

One operator serves every scheme: ``head`` is a view of the first 128 bytes of a packed weight (see `layout`),
and the kernel reads from it what to do. The defaults below run on any device and are what the kernels of
`cpu` and `triton` are held against; those are registered for their device over the default.

Inside ``torch.autocast`` x is converted to autocast's dtype, as ``nn.Linear`` converts it.

``y = x @ W.T + bias``; with 8 activation bits, each row of x·column_scale is first rounded to ``q·amax/127``, q in
[-127, 127]: always, or where m_switch is not 0 in products of at least that many rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autoq_kernels import layout
from autoq_kernels.layout import Kind

NAMESPACE = "autoq"
SCHEMAS = (
    "linear(Tensor x, Tensor head, Tensor? bias, int n) -> Tensor",
    "dequantize(Tensor head, int n, int k) -> Tensor",
)
ACTIVATION_LEVELS = 127
_AUTOCAST = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


def quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8 levels, symmetrically, half to even.

    Args:
        x_MK: float [M, K].

    Returns:
        (q, scale): q float32 [M, K] of whole numbers in [-127, 127] (NaN where x is not finite), and
        scale float32 [M, 1], amax/127, kept above zero for an all-zero row.
    """
    x_MK = x_MK.float()
    scale = (x_MK.abs().amax(dim=1, keepdim=True) / ACTIVATION_LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.round(x_MK / scale).clamp(-ACTIVATION_LEVELS, ACTIVATION_LEVELS), scale


def dequantize(head: Tensor, n: int, k: int) -> Tensor:
    """The weight a packed buffer stands for, in plain PyTorch.

    Args:
        head: uint8 [128], a view of the packed weight's first bytes.
        n: output features, as in the header.
        k: input features, as in the header.

    Returns:
        float32 [N, K].

    Raises:
        layout.LayoutError: not a packed weight, or not of this shape.
    """
    data = layout.buffer(head)
    form = layout.header(data)
    if (form.n, form.k) != (n, k):
        raise layout.LayoutError(f"the packed weight is [{form.n}, {form.k}]; the call says [{n}, {k}]")
    parts, codes_NK = layout.sections(data), layout.codes(data)
    w_NK: Tensor
    if form.kind is Kind.DENSE:
        w_NK = codes_NK.to(torch.float32, copy=True)
    elif form.kind is Kind.INT8:
        w_NK = codes_NK.float() * parts["scale"][:, None]
    elif form.kind is not Kind.AFFINE:
        w_NK = layout.fp6_values(form.kind).to(head.device)[codes_NK.int()] * parts["scale"][:, None]
    else:
        group = torch.arange(k, device=head.device) // form.group_size
        w_NK = codes_NK.float() * parts["scale"].float()[:, group]
        if "minimum" in parts:
            w_NK = w_NK + parts["minimum"].float()[:, group]
        if "row_scale" in parts:
            w_NK = w_NK * parts["row_scale"][:, None]
        if "column_scale" in parts:
            w_NK = w_NK * parts["column_scale"]
    return w_NK


def linear(x: Tensor, head: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """Multiply by a packed weight, in plain PyTorch.

    Args:
        x: float [..., K].
        head: uint8 [128], a view of the packed weight's first bytes.
        bias: float [N] or None.
        n: output features, as in the header.

    Returns:
        [..., N] in the dtype of `x`; products are summed in float32, or exactly where activations are rounded.

    Raises:
        TypeError: x is not of a floating-point type.
        layout.LayoutError: not a packed weight, or not of this shape.
    """
    if not x.is_floating_point():
        raise TypeError(f"autoq: x must be float32, bfloat16 or float16; got {x.dtype}")
    data = layout.buffer(head)
    form = layout.header(data)
    k = x.shape[-1]
    if (form.n, form.k) != (n, k):
        raise layout.LayoutError(f"the packed weight is [{form.n}, {form.k}]; the call says [{n}, {k}]")
    if form.kind is Kind.DENSE:
        w_NK = layout.codes(data).to(x.dtype)
        return torch.nn.functional.linear(x, w_NK, None if bias is None else bias.to(x.dtype))
    x_MK = x.reshape(-1, k)
    y_MN: Tensor
    if form.activation_bits and len(x_MK) >= form.m_switch:
        y_MN = _rounded_product(x_MK, data)
    else:
        y_MN = x_MK.float() @ dequantize(head, n, k).T
    if bias is not None:
        y_MN = y_MN + bias.float()
    return y_MN.to(x.dtype).reshape(*x.shape[:-1], n)


def _rounded_product(x_MK: Tensor, data: Tensor) -> Tensor:
    """The product with x rounded to int8 per row: whole numbers are summed exactly, then scaled; float32 [M, N]."""
    form, parts = layout.header(data), layout.sections(data)
    codes_NK = layout.codes(data).double()
    if "column_scale" in parts:
        x_MK = x_MK.float() * parts["column_scale"]
    q_MK, scale_M1 = quantize_rows(x_MK)
    if form.kind is Kind.INT8:  # sums of whole numbers below 2^53
        return (q_MK.double() @ codes_NK.T).float() * scale_M1 * parts["scale"]
    sum_MN = torch.zeros(len(x_MK), form.n, dtype=torch.float64, device=x_MK.device)
    for group in range(form.groups):
        inputs = slice(group * form.group_size, (group + 1) * form.group_size)
        q_Mg = q_MK[:, inputs].double()
        sum_MN += (q_Mg @ codes_NK[:, inputs].T) * parts["scale"][:, group].double()
        if "minimum" in parts:
            sum_MN += q_Mg.sum(dim=1, keepdim=True) * parts["minimum"][:, group].double()
    y_MN = sum_MN.float() * scale_M1
    return y_MN * parts["row_scale"] if "row_scale" in parts else y_MN


def _linear_fake(x: Tensor, head: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _dequantize_fake(head: Tensor, n: int, k: int) -> Tensor:
    return head.new_empty((n, k), dtype=torch.float32)


def _save_head(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, head, bias, n = inputs
    ctx.save_for_backward(head)
    ctx.n, ctx.k, ctx.dtype, ctx.bias_dtype = n, x.shape[-1], x.dtype, None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    """The gradient of x (straight through the rounding of activations) and of the bias; none of the weight."""
    (head,) = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        w_NK = torch.ops.autoq.dequantize(head, ctx.n, ctx.k)
        with _without_autocast():
            grad_x = (grad.float() @ w_NK).to(ctx.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, ctx.n).float().sum(dim=0).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, None


def _without_autocast() -> Any:
    keys = torch._C.DispatchKeySet(_AUTOCAST["cpu"]) | torch._C.DispatchKeySet(_AUTOCAST["cuda"])
    return torch._C._ExcludeDispatchKeyGuard(keys)


def _autocast(device: str) -> Callable[[Tensor, Tensor, Tensor | None, int], Tensor]:
    """What ``linear`` is inside ``torch.autocast``; nothing that it does is converted once more."""

    def linear(x: Tensor, head: Tensor, bias: Tensor | None, n: int) -> Tensor:
        converted = x.is_floating_point() and x.dtype != torch.float64  # as autocast has it for nn.Linear
        with _without_autocast():
            x = x.to(torch.get_autocast_dtype(device)) if converted else x
            result: Tensor = torch.ops.autoq.linear(x, head, bias, n)
        return result

    return linear


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in SCHEMAS:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    for name, default in (("linear", linear), ("dequantize", dequantize)):
        library.impl(name, default, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    for device, key in _AUTOCAST.items():
        library.impl("linear", _autocast(device), key.name)  # type: ignore[no-untyped-call]
    torch.library.register_fake("autoq::linear", _linear_fake, lib=library)
    torch.library.register_fake("autoq::dequantize", _dequantize_fake, lib=library)
    torch.library.register_autograd("autoq::linear", _linear_backward, setup_context=_save_head, lib=library)
    return library


# A Library object undoes its registrations when collected, and a reload of this module keeps its globals.
_LIBRARY = globals().get("_LIBRARY") or _register()
