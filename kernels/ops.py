"""The operators autoq::linear, dequantize, embedding and attention: schema, shapes, gradient, plain-PyTorch default.

One operator serves every scheme: ``head`` is a view of the first 128 bytes of a packed weight (see `layout`),
and the kernel reads from it what to do. The defaults below run on any device and are what the kernels of
`cpu` and `triton` are held against; those are registered for their device over the default.

Inside ``torch.autocast`` x is converted to autocast's dtype, as ``nn.Linear`` converts it.

``y = x @ W.T + bias``; with 8 activation bits, each row of x·column_scale is first rounded to ``q·amax/127``, q in
[-127, 127]: always, or where m_switch is not 0 in products of at least that many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from autoq_kernels import kv_rows, layout
from autoq_kernels.layout import Kind

NAMESPACE = "autoq"
SCHEMAS = (
    "linear(Tensor x, Tensor head, Tensor? bias, int n) -> Tensor",
    "dequantize(Tensor head, int n, int k) -> Tensor",
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal) -> Tensor",
    "store_kv(Tensor(a!) keys, Tensor(b!) values, Tensor k, Tensor v, Tensor start) -> ()",
    "embedding(Tensor indices, Tensor head, int n, int k, ScalarType dtype) -> Tensor",
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
    form = _checked_form(data, n, k)
    return _values(form, layout.sections(data), layout.codes(data))


def embedding(indices: Tensor, head: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of the weight a packed buffer stands for, in plain PyTorch. There is no gradient.

    Args:
        indices: int64 or int32, of any shape, each in [0, N).
        head: uint8 [128], a view of the packed weight's first bytes.
        n: rows, as in the header.
        k: numbers in a row, as in the header.
        dtype: of the result: float32, bfloat16 or float16, to which the float32 values are rounded.

    Returns:
        [..., K]; elsewhere than on the CPU indices are checked as PyTorch's own indexing does.

    Raises:
        IndexError: an index outside the weight.
        TypeError: indices of another type.
        layout.LayoutError: not a packed weight, or not of this shape.
    """
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"autoq: indices must be int64 or int32; got {indices.dtype}")
    data = layout.buffer(head)
    form = _checked_form(data, n, k)
    rows = indices.reshape(-1).long()
    if rows.device.type == "cpu" and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < n:
        raise IndexError(f"autoq: indices must be in [0, {n}); got {int(rows.min())} to {int(rows.max())}")
    parts = {name: part if name == "column_scale" else part[rows] for name, part in layout.sections(data).items()}
    codes = parts.get("codes")
    if codes is None:
        shift, codes = 0, torch.zeros((), dtype=torch.uint8, device=data.device)
        for bits in layout.PLANES[form.bits]:
            codes = codes | (layout.unpack_plane(parts[f"codes_{bits}"], bits) << shift)
            shift += bits
        codes = codes[:, :k]
    return _values(form, parts, codes).to(dtype).reshape(*indices.shape, k)


def _checked_form(data: Tensor, n: int, k: int) -> layout.Header:
    form = layout.header(data)
    if (form.n, form.k) != (n, k):
        raise layout.LayoutError(f"the packed weight is [{form.n}, {form.k}]; the call says [{n}, {k}]")
    return form


def _values(form: layout.Header, parts: Mapping[str, Tensor], codes_NK: Tensor) -> Tensor:
    """The float32 [N, K] that codes [N, K] and their rows' scales stand for."""
    w_NK: Tensor
    if form.kind is Kind.DENSE:
        w_NK = codes_NK.to(torch.float32, copy=True)
    elif form.kind is Kind.INT8:
        w_NK = codes_NK.float() * parts["scale"][:, None]
    elif form.kind is not Kind.AFFINE:
        w_NK = layout.fp6_values(form.kind).to(codes_NK.device)[codes_NK.int()] * parts["scale"][:, None]
    else:
        group = torch.arange(form.k, device=codes_NK.device) // form.group_size
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
    k = x.shape[-1]
    form = _checked_form(data, n, k)
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


def attention(  # noqa: PLR0917 (the operator's arguments)
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """Softmax attention, in plain PyTorch. There is no gradient.

    Args:
        q: float [B, H, Q, D].
        k: float [B, G, L, D], or uint8 [B, G, L, R] rows of `kv_rows`; H is a multiple of G, and neighbouring query
            heads share one of k and v.
        v: float [B, G, L, E], or rows of the same precision.
        mask: bool [B or 1, H or 1, Q, L], True where a query may see a key; None for all.
        scale: on the scores.
        causal: each query sees the keys up to its own place, the last query all; without a mask only.

    Returns:
        [B, Q, H, E] in the dtype of `q`, computed in float32; 0 for a query that may see no key.

    Raises:
        ValueError: a mask and causal.
    """
    if causal and mask is not None:
        raise ValueError("autoq: attention takes a mask or causal, not both")
    if k.dtype == torch.uint8:
        precision = kv_rows.precision_of(k, q.shape[3])
        k, v = kv_rows.unpack(k, precision, keys=True), kv_rows.unpack(v, precision, keys=False)
    sharing = q.shape[1] // k.shape[1]
    k, v = (one.float().repeat_interleave(sharing, dim=1) for one in (k, v))
    scores = q.float() @ k.transpose(2, 3) * scale
    if causal:
        queries, keys = scores.shape[2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return (weights @ v).to(q.dtype).transpose(1, 2).contiguous()


def _attention_fake(  # noqa: PLR0917 (the operator's arguments)
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    e = v.shape[3] if v.dtype != torch.uint8 else kv_rows.numbers(v, kv_rows.precision_of(k, q.shape[3]))
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], e))


def store_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, start: Tensor) -> None:
    """Write the keys and values of new tokens to their places in a cache.

    Args:
        keys: [B, G, L, D] in the dtype of `k`, or uint8 [B, G, L, R] rows of `kv_rows`.
        values: [B, G, L, E], or rows.
        k: float [B, G, Q, D].
        v: float [B, G, Q, E].
        start: int64, one number: the place of the first new token.

    Raises:
        IndexError: the cache has no such places.
    """
    for cache, new, is_key in ((keys, k, True), (values, v, False)):
        rows = new
        if cache.dtype == torch.uint8:
            rows = kv_rows.pack(new, kv_rows.precision_of(cache, new.shape[3]), keys=is_key)
        cache.index_copy_(2, start + torch.arange(new.shape[2], device=new.device), rows)


def _linear_fake(x: Tensor, head: Tensor, bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def _dequantize_fake(head: Tensor, n: int, k: int) -> Tensor:
    return head.new_empty((n, k), dtype=torch.float32)


def _embedding_fake(indices: Tensor, head: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return head.new_empty((*indices.shape, k), dtype=dtype)


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
    defaults = {
        "linear": linear,
        "dequantize": dequantize,
        "embedding": embedding,
        "attention": attention,
        "store_kv": store_kv,
    }
    for name, default in defaults.items():
        library.impl(name, default, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    for device, key in _AUTOCAST.items():
        library.impl("linear", _autocast(device), key.name)  # type: ignore[no-untyped-call]
    torch.library.register_fake("autoq::linear", _linear_fake, lib=library)
    torch.library.register_fake("autoq::dequantize", _dequantize_fake, lib=library)
    torch.library.register_fake("autoq::attention", _attention_fake, lib=library)
    torch.library.register_fake("autoq::store_kv", lambda keys, values, k, v, start: None, lib=library)
    torch.library.register_fake("autoq::embedding", _embedding_fake, lib=library)
    torch.library.register_autograd("autoq::linear", _linear_backward, setup_context=_save_head, lib=library)
    return library


# A Library object undoes its registrations when collected, and a reload of this module keeps its globals.
_LIBRARY = globals().get("_LIBRARY") or _register()
