"""autoq::linear and autoq::dequantize on CUDA devices, by the Triton kernels.

At run time a product is computed as it was tuned, or where it was not, as `products.default_choice` says; nothing is
ever timed inside the operator. A weight's header is read from the device at its first use.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from autoq_kernels import layout, ops
from autoq_kernels.triton import configs, library_kernels, products, store
from autoq_kernels.triton import dequantize as dequantizing
from autoq_kernels.triton.device import Device
from autoq_kernels.triton.launching import run
from autoq_kernels.triton.library_kernels import INT4PACKED
from autoq_kernels.triton.products import Choice
from autoq_kernels.triton.tuning import Tuner
from autoq_kernels.triton.weight import Weight, Weights

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Status(NamedTuple):
    """Whether the kernels are registered.

    Attributes:
        registered: True from the first `load` on.
        reason: why not; None where they are.
    """

    registered: bool
    reason: str | None = None


@functools.cache
def load() -> Status:
    """Register the kernels over the operators' default for CUDA devices; needs no device."""
    library = _library()
    library.impl("linear", linear, "CUDA")  # type: ignore[no-untyped-call]
    library.impl("dequantize", dequantize, "CUDA")  # type: ignore[no-untyped-call]
    return Status(registered=True)


@functools.cache
def _library() -> torch.library.Library:
    """Kept for good: collected, it would undo its registrations."""
    return torch.library.Library(ops.NAMESPACE, "IMPL")  # type: ignore[no-untyped-call]


@functools.cache
def weights() -> Weights:
    """The packed weights seen in this process."""
    return Weights()


def tuner(device: torch.device | None = None) -> Tuner:
    """The tuned choices of a GPU, kept in `store.default_folder`.

    Args:
        device: of type cuda; None or one without an index is the current one.
    """
    index = None if device is None else device.index
    return _tuner(torch.cuda.current_device() if index is None else index)


@functools.cache
def _tuner(index: int) -> Tuner:
    return Tuner(store.Store(store.default_folder(), Device.current(index)))


def linear(x: Tensor, head: Tensor, bias: Tensor | None, n: int) -> Tensor:
    """Multiply by a packed weight; arguments and result as of `ops.linear`.

    Raises:
        layout.LayoutError: not a packed weight, or not of this shape.
        ValueError: x, weight and bias are on several devices.
    """
    devices = {one.device for one in (x, head, bias) if one is not None}
    if len(devices) > 1:
        raise ValueError(f"autoq: x, weight and bias must be on one device; got {', '.join(sorted(map(str, devices)))}")
    weight = weights().of(head)
    k = x.shape[-1]
    _check_shape(weight, n, k)
    if x.dtype not in _DTYPES:
        return ops.linear(x, head, bias, n)
    x_MK = x.reshape(-1, k).contiguous()
    if x_MK.data_ptr() % 16:  # kernels load 16 bytes at a time
        x_MK = x_MK.clone()
    if len(x_MK) == 0:
        return x.new_empty((*x.shape[:-1], n))
    if bias is not None:
        bias = bias.expand(n).contiguous()
    choice = _choice(weight, len(x_MK), x.dtype)
    with _on(x.device):
        y_MN = products.multiply(choice, x_MK, weight, bias)
    return y_MN.reshape(*x.shape[:-1], n)


def dequantize(head: Tensor, n: int, k: int) -> Tensor:
    """The weight a packed buffer stands for; arguments and result as of `ops.dequantize`.

    Raises:
        layout.LayoutError: not a packed weight, or not of this shape.
    """
    weight = weights().of(head)
    _check_shape(weight, n, k)
    if not products.decodable(weight.form):
        return ops.dequantize(head, n, k)
    w_NK = torch.empty(n, k, dtype=torch.float32, device=head.device)
    with _on(head.device):
        run(dequantizing.launches(weight, w_NK))
    return w_NK


def settle(head: Tensor) -> None:
    """Read a new weight's header, and make the copies that its tuned choices need.

    Called when a layer gets its weight: at its first product, a CUDA graph's memory pool could be in use, which may not
    keep anything. A choice whose copy was not made is not taken.

    Args:
        head: uint8 [128], a view of a packed weight on a GPU. One that is still empty is left alone.
    """
    try:
        weight = weights().of(head)
    except layout.LayoutError:  # to be filled later; its first product would say so
        return
    has_column_scale = weight.form.column_scale_offset > 0
    if library_kernels.int4pack_why_not(weight.form, torch.bfloat16) is not None:
        return
    known = (tuner(head.device).tuned(weight.form, m, torch.bfloat16, has_column_scale) for m in configs.BUCKETS)
    if any(one is not None and one.method == products.INT4PACK for one in known):
        with _on(head.device):
            library_kernels.prepare_int4pack(weight)


def kernel_name(head: Tensor, m: int, dtype: torch.dtype) -> str:
    """What multiplies m rows of x by a packed weight: a choice's label, such as ``triton.gemv m1 n8 k4096 s1 w2 p1``.

    Args:
        head: of the packed weight.
        m: rows of x.
        dtype: of x.
    """
    return _choice(weights().of(head), m, dtype).label


def _choice(weight: Weight, m: int, dtype: torch.dtype) -> Choice:
    """As tuned on the weight's device, or the default."""
    tuned = _tuned(weight, m, dtype)
    if tuned is None or (tuned.method == products.INT4PACK and INT4PACKED not in weight.prepared):
        return products.default_choice(weight.form, m, dtype)
    return tuned


def _tuned(weight: Weight, m: int, dtype: torch.dtype) -> Choice | None:
    device = weight.head.device
    if device.type != "cuda":
        return None
    return tuner(device).tuned(weight.form, m, dtype, weight.form.column_scale_offset > 0)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check_shape(weight: Weight, n: int, k: int) -> None:
    if (weight.form.n, weight.form.k) != (n, k):
        got = f"[{weight.form.n}, {weight.form.k}]"
        raise layout.LayoutError(f"the packed weight is {got}; the call says [{n}, {k}]")
