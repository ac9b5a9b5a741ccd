"""Products to be timed: autoq's operator and those of PyTorch, each with a check of its result.

Legend: N output features, K input features, M rows of the activation, R rows of the weight that are made and
then repeated up to N (times do not depend on values), G groups in a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoq.cache.fingerprint import last_level_cache_bytes
from autoq.candidates import Candidate, LinearOp, Packed
from autoq.candidates.base import load_cpu_kernels
from autoq.numerics import int8_rows, relative_rms
from autoq_kernels import layout
from autoq_kernels.cpu import build
from autoq_kernels.cpu.memory import use_large_pages
from autoq_kernels.tolerance import TOLERANCE
from kernel_bench.roofline import Row, rate_name

_PACKED_ROWS = 512
_CHECKED_ROWS = 128  # of x; the references are slow
_RIVAL_TOLERANCE = 1e-2  # against their own codes: some round the dequantized weight once more
MAX_BURST = 32
ONEDNN_U8S8 = "onednn.qlinear_pointwise(u8s8)"
_ZERO_POINT = 64  # of uint8 activations of 7 bits


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One way to multiply x [M, K] by a weight.

    Attributes:
        name: of the library's operator; ``autoq`` for ours.
        scheme: what it is compared with, named as autoq does.
        kernel: what runs behind the operator, where that is known.
        bits: of a weight.
        int8: whether integers are multiplied.
        weight_bytes: codes and scales.
        pack: makes one more copy of the weight in the operator's form.
        call: the product with such a copy.
        expected: rows of x → the right result in float64, for the first R outputs.
        tolerance: relative RMS allowed against ``expected``.
    """

    name: str
    scheme: str
    bits: int
    int8: bool
    weight_bytes: int
    pack: Callable[[], Any]
    call: Callable[[Any], Tensor]
    expected: Callable[[Tensor], Tensor]
    tolerance: float
    kernel: str = ""


class Rotating:
    """Calls an engine on one copy of the weight after the other, so that none is found in the cache."""

    max_burst = MAX_BURST

    def __init__(self, call: Callable[[Any], object], copies: Sequence[Any], first_us: float) -> None:
        self._call, self._copies, self._next = call, copies, 0
        self.first_us = first_us

    def time(self, calls: int) -> float:
        """Microseconds per call, of ``calls`` in a row."""
        call, count = self._call, len(self._copies)
        batch = [self._copies[(self._next + number) % count] for number in range(calls)]
        self._next = (self._next + calls) % count
        begin = time.perf_counter_ns()
        for weight in batch:
            call(weight)
        return (time.perf_counter_ns() - begin) / 1000 / calls


class Weights:
    """A weight [N, K] and its packed copies, kept from one M to the next.

    Attributes:
        part: the R rows that are repeated, in the activation's dtype.
        times: how often.
    """

    def __init__(self, n: int, k: int, dtype: torch.dtype) -> None:
        self.times = -(-n // _PACKED_ROWS)
        while n % self.times:
            self.times += 1
        generator = torch.Generator().manual_seed(n)
        self.part = torch.randn(n // self.times, k, generator=generator).mul_(0.02).to(dtype)
        self.n, self.k, self.dtype = n, k, dtype
        self._packed: dict[str, Packed] = {}
        self._copies: dict[tuple[str, str], list[Any]] = {}

    def packed(self, candidate: Candidate) -> Packed:
        """The R rows under a scheme."""
        name = str(candidate)
        if name not in self._packed:
            self._packed[name] = candidate.pack(self.part)
        return self._packed[name]

    def copies(self, engine: Engine) -> list[Any]:
        """Copies of more than twice the last-level cache together."""
        key = (engine.name, engine.scheme)
        if key not in self._copies or engine.name == ONEDNN_U8S8:  # packed for one M
            count = 2 * last_level_cache_bytes() // engine.weight_bytes + 1
            self._copies[key] = [engine.pack() for _ in range(count)]
        return self._copies[key]


def checked(engine: Engine, weights: Weights, m: int) -> tuple[Row, Rotating | None]:
    """An engine's row without a time, and what can be timed if its result is right."""
    row = _row(engine)
    copies = weights.copies(engine)
    begin = time.perf_counter_ns()
    y = engine.call(copies[0])
    first_us = (time.perf_counter_ns() - begin) / 1000
    rows = torch.linspace(0, m - 1, min(m, _CHECKED_ROWS)).long()
    expected = engine.expected(rows)
    got = y[rows].view(len(rows), -1, expected.shape[1])
    row["error"] = relative_rms(got, expected.unsqueeze(1).expand_as(got))
    if not row["error"] <= engine.tolerance:
        row |= {"status": "wrong", "reason": f"relative RMS {row['error']:.2e} above {engine.tolerance:.0e}"}
        return row, None
    return row | {"status": "ok"}, Rotating(engine.call, copies, first_us)


def _row(engine: Engine) -> Row:
    return {
        "scheme": engine.scheme,
        "engine": engine.name,
        "kernel": engine.kernel,
        "bits": engine.bits,
        "rate": rate_name("float32", int8=True) if engine.int8 else "",
        "weight_bytes": engine.weight_bytes,
        "status": "error",
        "reason": "",
    }


def ours(candidate: Candidate, weights: Weights, x: Tensor) -> Engine:
    """autoq's operator, called as ``QuantLinear`` does.

    Raises:
        ValueError: with the reason, if the candidate refuses the product.
    """
    m, n = x.shape[0], weights.n
    reason = candidate.why_not(LinearOp(m=m, k=weights.k, n=n, dtype=x.dtype))
    if reason is not None:
        raise ValueError(reason)
    load_cpu_kernels()
    packed = weights.packed(candidate)
    whole = layout.repeat_rows(packed.data, weights.times)
    form = layout.header(whole)
    bits = form.bits if form.kind != layout.Kind.DENSE else 8 * x.dtype.itemsize
    at_rows = candidate.at_rows(m)
    linear = torch.ops.autoq.linear
    return Engine(
        name="autoq",
        scheme=str(candidate),
        kernel=build.kernel_name(whole[: layout.HEADER_BYTES], m, x.dtype),
        bits=bits,
        int8=at_rows.activation_bits == 8,
        weight_bytes=candidate.weight_bytes(Packed(whole)),
        pack=lambda: _copied(whole)[: layout.HEADER_BYTES],
        call=lambda head: linear(x, head, None, n),
        expected=lambda rows: at_rows.reference(x[rows], packed),
        tolerance=TOLERANCE[x.dtype],
    )


def _copied(whole: Tensor) -> Tensor:
    """A copy as `pack` would have made it: in large pages."""
    copy = torch.empty_like(whole)
    use_large_pages(copy)
    return copy.copy_(whole)


def torch_rivals(weights: Weights, x: Tensor) -> Iterator[tuple[str, str, Callable[[], Engine]]]:
    """(engine, scheme, how to make it) of PyTorch's own operators: ATen's and oneDNN's."""
    yield "aten.linear", "none", lambda: _linear(weights, x, weights.dtype)
    if weights.dtype != torch.float32:
        yield "aten.linear(float32)", "none", lambda: _linear(weights, x, torch.float32)
    yield "aten._weight_int8pack_mm", "int8wo", lambda: _int8pack(weights, x)
    for size in (32, 64, 128):
        scheme = f"int4wo(group_size={size})"
        yield "aten._weight_int4pack_mm_for_cpu", scheme, lambda size=size: _int4pack(weights, x, size)
    yield "aten._int_mm", "int8dq", lambda: _int_mm(weights, x)
    yield ONEDNN_U8S8, "int8dq", lambda: _u8s8(weights, x)


def _linear(weights: Weights, x: Tensor, dtype: torch.dtype) -> Engine:
    """The float product; in another dtype than x's with the conversions a user would need."""
    linear = torch.nn.functional.linear
    whole = weights.part.to(dtype).repeat(weights.times, 1)
    same = dtype == x.dtype
    return Engine(
        name="aten.linear" if same else "aten.linear(float32)",
        scheme="none",
        bits=8 * dtype.itemsize,
        int8=False,
        weight_bytes=whole.nbytes,
        pack=whole.clone,
        call=(lambda w: linear(x, w)) if same else (lambda w: linear(x.to(dtype), w).to(x.dtype)),
        expected=lambda rows: x[rows].double() @ weights.part.double().T,
        tolerance=TOLERANCE[x.dtype],
    )


def _int8pack(weights: Weights, x: Tensor) -> Engine:
    codes_RK, scale_R = int8_rows(weights.part)
    scale_R = scale_R.to(x.dtype)
    codes, scale = codes_RK.repeat(weights.times, 1), scale_R.repeat(weights.times)
    return Engine(
        name="aten._weight_int8pack_mm",
        scheme="int8wo",
        bits=8,
        int8=False,
        weight_bytes=codes.nbytes + scale.nbytes,
        pack=codes.clone,
        call=lambda w: torch._weight_int8pack_mm(x, w, scale),
        expected=lambda rows: x[rows].double() @ codes_RK.double().T * scale_R.double(),
        tolerance=_RIVAL_TOLERANCE,
    )


def _int4pack(weights: Weights, x: Tensor, size: int) -> Engine:
    """Rounding to nearest between each group's ends; ATen's form is (q − 8)·scale + zero."""
    if weights.k % size:
        raise ValueError(f"K={weights.k} is no multiple of {size}")
    w_RGg = weights.part.float().unflatten(1, (-1, size))
    low_RG, high_RG = w_RGg.amin(2), w_RGg.amax(2)
    scale_RG = ((high_RG - low_RG) / 15).clamp_min(1e-9)
    codes_RGg = ((w_RGg - low_RG[..., None]) / scale_RG[..., None]).round().clamp(0, 15)
    zero_RG = (low_RG + 8 * scale_RG).to(x.dtype)
    scale_RG = scale_RG.to(x.dtype)
    scales_zeros = torch.stack([scale_RG, zero_RG], -1).repeat(weights.times, 1, 1).transpose(0, 1).contiguous()
    codes = codes_RGg.flatten(1).int().repeat(weights.times, 1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    dequantized_RK = ((codes_RGg.double() - 8) * scale_RG.double()[..., None] + zero_RG.double()[..., None]).flatten(1)
    operator = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Engine(
        name="aten._weight_int4pack_mm_for_cpu",
        scheme=f"int4wo(group_size={size})",
        bits=4,
        int8=False,
        weight_bytes=packed.nbytes + scales_zeros.nbytes,
        pack=lambda: (packed.clone(), scales_zeros.clone()),
        call=lambda w: operator(x, w[0], size, w[1]),
        expected=lambda rows: x[rows].double() @ dequantized_RK.T,
        tolerance=_RIVAL_TOLERANCE,
    )


def _int_mm(weights: Weights, x: Tensor) -> Engine:
    """The bare int8 product: activations quantized beforehand, sums left in int32."""
    codes_RK, _ = int8_rows(weights.part)
    codes, x_q = codes_RK.repeat(weights.times, 1), int8_rows(x)[0]
    return Engine(
        name="aten._int_mm",
        scheme="int8dq",
        bits=8,
        int8=True,
        weight_bytes=codes.nbytes,
        pack=codes.clone,
        call=lambda w: torch._int_mm(x_q, w.T),
        expected=lambda rows: x_q[rows].double() @ codes_RK.double().T,
        tolerance=0.0,
    )


def _u8s8(weights: Weights, x: Tensor) -> Engine:
    codes_RK, scale_R = int8_rows(weights.part)
    product = onednn_u8s8(x, codes_RK.repeat(weights.times, 1), scale_R.repeat(weights.times))
    return Engine(
        name=ONEDNN_U8S8,
        scheme="int8dq",
        bits=8,
        int8=True,
        weight_bytes=weights.n * (weights.k + 4),
        pack=product.pack,
        call=product.call,
        expected=lambda rows: product.x_q[rows].double() @ codes_RK.double().T * scale_R.double() * product.x_scale,
        tolerance=_RIVAL_TOLERANCE,
    )


@dataclass(frozen=True, kw_only=True)
class U8S8:
    """oneDNN's bare linear on uint8 activations: quantized beforehand, to 7 bits.

    With 8 bits its sums of two products overflow int16 on processors without VNNI; the time is the same.
    """

    x_q: Tensor
    x_scale: float
    pack: Callable[[], Tensor]
    call: Callable[[Tensor], Tensor]


def onednn_u8s8(x: Tensor, codes_NK: Tensor, scale_N: Tensor) -> U8S8:
    """The product of x, one scale for all of it, with int8 codes.

    The result has x's dtype, or float32 on processors without bfloat16 arithmetic: there oneDNN has no
    optimized kernel with another result.
    """
    result = x.dtype if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    x_scale = float(x.float().abs().amax()) / (_ZERO_POINT - 1)
    x_q = (x.float() / x_scale).round()
    x_u8 = (x_q + _ZERO_POINT).to(torch.uint8)
    zeros_N = torch.zeros(len(codes_NK), dtype=torch.int32)
    operator = torch.ops.onednn.qlinear_pointwise.default

    def call(weight: Tensor) -> Tensor:
        return operator(x_u8, x_scale, _ZERO_POINT, weight, scale_N, zeros_N, None, 1.0, 0, result, "none", [], "")

    return U8S8(
        x_q=x_q,
        x_scale=x_scale,
        pack=lambda: torch.ops.onednn.qlinear_prepack(codes_NK, list(x.shape)),
        call=call,
    )
