"""Products of other libraries on a GPU, each with a check of its result, and why those that are not there are not.

Legend: N output features, K input features, M rows of the activation, R rows of the weight that are made and then
repeated up to N (times do not depend on values), G groups in a row.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autoq.numerics import int8_rows

_EXACT, _KNOWN, _INT8, _INT4 = 6e-3, 1e-2, 2e-2, 0.2  # relative RMS: see `Engine.tolerance`
CHECKED_ROWS = 64  # of x; float64 is slow on many GPUs
_INNER_K_TILES = 8
_GROUPS = (64, 128)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One way to multiply x [M, K] by a weight [N, K].

    Attributes:
        name: of the library's operator.
        scheme: what it is compared with, named as autoq does.
        kernel: what runs behind the operator, where that is known.
        weight_bytes: codes and scales.
        call: the product.
        expected: the right result in float64 for the first `CHECKED_ROWS` of x and R outputs, which repeat up to N.
        tolerance: relative RMS allowed against it. Where a library keeps its codes to itself it is held against the
            float product, and allowed what rounding to its bits costs.
    """

    name: str
    scheme: str
    weight_bytes: int
    call: Callable[[], Tensor]
    expected: Tensor
    tolerance: float
    kernel: str = ""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is multiplied.

    Attributes:
        x: [M, K].
        part: [R, K] in x's dtype.
        times: how often the part's rows are repeated.
    """

    x: Tensor
    part: Tensor
    times: int

    @property
    def n(self) -> int:
        """Outputs."""
        return self.times * len(self.part)

    @property
    def k(self) -> int:
        """Inputs."""
        return self.part.shape[1]

    def whole(self) -> Tensor:
        """The weight [N, K]."""
        return self.part.repeat(self.times, 1)

    def product(self, w_RK: Tensor) -> Tensor:
        """The first rows of x times a float64 weight."""
        return self.x[:CHECKED_ROWS].double() @ w_RK.double().T


def engines(problem: Problem) -> Iterator[tuple[str, str, Callable[[], Engine]]]:
    """(engine, scheme, how to make it) of all rivals; making one raises where it is absent or refuses the product."""
    yield "cuBLAS", "none", lambda: _cublas(problem)
    for size in _GROUPS:
        yield "aten._weight_int4pack_mm", f"int4wo(group_size={size})", lambda size=size: _tinygemm(problem, size)
    yield "aten._int_mm", "int8dq", lambda: _int_mm(problem)
    for size in _GROUPS:
        yield "gemlite.A16W4_HQQ_INT", f"int4wo(group_size={size})", lambda size=size: _gemlite4(problem, size)
    yield "gemlite.A16W8_INT8", "int8wo", lambda: _gemlite8(problem, "A16W8_INT8", "int8wo")
    yield "gemlite.A8W8_INT8_dynamic", "int8dq", lambda: _gemlite8(problem, "A8W8_INT8_dynamic", "int8dq")
    yield "torchao.Int8WeightOnlyConfig", "int8wo", lambda: _torchao(problem, "int8wo")
    yield "torchao.Int8DynamicActivationInt8WeightConfig", "int8dq", lambda: _torchao(problem, "int8dq")
    for size in _GROUPS:
        name = f"int4wo(group_size={size})"
        yield "torchao.Int4WeightOnlyConfig", name, lambda size=size: _torchao(problem, "int4wo", size)


def need(module: str) -> Any:
    """A module of a rival.

    Raises:
        NotImplementedError: with the reason, if it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except Exception as problem:  # a library may fail at import in any way, such as asking for a device
        raise NotImplementedError(f"import {module}: {type(problem).__name__}: {problem}") from problem


def _cublas(problem: Problem) -> Engine:
    whole = problem.whole()
    return Engine(
        name="cuBLAS",
        scheme="none",
        kernel="F.linear",
        weight_bytes=whole.nbytes,
        call=lambda: functional.linear(problem.x, whole),
        expected=problem.product(problem.part),
        tolerance=_EXACT,
    )


@dataclass(frozen=True)
class _Codes:
    """4-bit codes rounded to nearest between each group's ends: W = (q − 8)·scale + zero.

    Attributes:
        q: uint8 [R, K].
        scale: [R, G] in x's dtype.
        zero: [R, G] in x's dtype.
        w: float64 [R, K].
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    w: Tensor


def _codes(problem: Problem, size: int) -> _Codes:
    if problem.k % size:
        raise ValueError(f"K={problem.k} is no multiple of {size}")
    w_RGg = problem.part.float().unflatten(1, (-1, size))
    low, high = w_RGg.amin(2), w_RGg.amax(2)
    scale = ((high - low) / 15).clamp_min(1e-9)
    q_RGg = ((w_RGg - low[..., None]) / scale[..., None]).round().clamp(0, 15)
    dtype = problem.x.dtype
    scale, zero = scale.to(dtype), (low + 8 * scale).to(dtype)
    w = (q_RGg.double() - 8) * scale.double()[..., None] + zero.double()[..., None]
    return _Codes(q_RGg.flatten(1).to(torch.uint8), scale, zero, w.flatten(1))


def _tinygemm(problem: Problem, size: int) -> Engine:
    """PyTorch's 4-bit product: bfloat16 only, K a multiple of 128 and N of 8."""
    if problem.x.dtype != torch.bfloat16:
        raise ValueError("bfloat16 only")
    if problem.k % (16 * _INNER_K_TILES) or problem.n % 8:
        raise ValueError(f"K must be a multiple of {16 * _INNER_K_TILES} and N of 8")
    codes = _codes(problem, size)
    pairs = codes.q[:, ::2] << 4 | codes.q[:, 1::2]
    packed = torch._convert_weight_to_int4pack(pairs.repeat(problem.times, 1), _INNER_K_TILES)
    grid = torch.stack([codes.scale, codes.zero], -1).repeat(problem.times, 1, 1).transpose(0, 1).contiguous()
    return Engine(
        name="aten._weight_int4pack_mm",
        scheme=f"int4wo(group_size={size})",
        kernel="tinygemm",
        weight_bytes=packed.nbytes + grid.nbytes,
        call=lambda: torch._weight_int4pack_mm(problem.x, packed, size, grid),
        expected=problem.product(codes.w),
        tolerance=_KNOWN,
    )


def _int_mm(problem: Problem) -> Engine:
    """The bare int8 product: activations rounded beforehand, sums left in int32."""
    codes_RK, _ = int8_rows(problem.part)
    x_q, whole = int8_rows(problem.x)[0], codes_RK.repeat(problem.times, 1)
    return Engine(
        name="aten._int_mm",
        scheme="int8dq",
        kernel="cuBLASLt, int32 sums, without rounding x",
        weight_bytes=whole.nbytes,
        call=lambda: torch._int_mm(x_q, whole.T),
        expected=x_q[:CHECKED_ROWS].double() @ codes_RK.double().T,
        tolerance=0.0,
    )


def _gemlite4(problem: Problem, size: int) -> Engine:
    """gemlite's 4-bit weight-only product with zero points; its form is (q − zero)·scale."""
    helper = need("gemlite.helper")
    codes = _codes(problem, size)
    scale = codes.scale.repeat(problem.times, 1)
    zero = (8 - codes.zero.float() / codes.scale.float()).to(scale.dtype).repeat(problem.times, 1)
    maker = helper.A16W4_HQQ_INT(device=problem.x.device, dtype=problem.x.dtype)
    layer = maker.from_weights(codes.q.repeat(problem.times, 1), scale, zero)
    return Engine(
        name="gemlite.A16W4_HQQ_INT",
        scheme=f"int4wo(group_size={size})",
        weight_bytes=layer.W_q.nbytes + layer.scales.nbytes + layer.zeros.nbytes,
        call=lambda: layer(problem.x),
        expected=problem.product(codes.w),
        tolerance=_INT8,  # its zeros are rounded once more, to 16 bits at up to 15 steps from 0
    )


def _gemlite8(problem: Problem, maker: str, scheme: str) -> Engine:
    helper = need("gemlite.helper")
    layer = getattr(helper, maker)(device=problem.x.device, dtype=problem.x.dtype).from_weights(problem.whole())
    return Engine(
        name=f"gemlite.{maker}",
        scheme=scheme,
        weight_bytes=layer.W_q.nbytes + layer.scales.nbytes,
        call=lambda: layer(problem.x),
        expected=problem.product(problem.part),
        tolerance=_INT8,
    )


def _torchao(problem: Problem, scheme: str, size: int = 0) -> Engine:
    """A linear module quantized and compiled as torchao's documentation says."""
    library = need("torchao.quantization")
    if scheme == "int4wo":
        if problem.x.dtype != torch.bfloat16:
            raise ValueError("bfloat16 only")
        config = library.Int4WeightOnlyConfig(group_size=size, int4_packing_format="tile_packed_to_4d")
    elif scheme == "int8wo":
        config = library.Int8WeightOnlyConfig()
    else:
        config = library.Int8DynamicActivationInt8WeightConfig()
    layer = torch.nn.Linear(problem.k, problem.n, bias=False, device="meta", dtype=problem.x.dtype)
    layer.weight = torch.nn.Parameter(problem.whole(), requires_grad=False)
    library.quantize_(layer, config)
    compiled = torch.compile(layer, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
    bits = 4 + 32 / size if size else 8 + 16 / problem.k
    return Engine(
        name=f"torchao.{type(config).__name__}",
        scheme=f"int4wo(group_size={size})" if size else scheme,
        kernel="torch.compile, max-autotune",
        weight_bytes=round(problem.n * problem.k * bits / 8),
        call=lambda: compiled(problem.x),
        expected=problem.product(problem.part),
        tolerance=_INT4 if size else _INT8,
    )
