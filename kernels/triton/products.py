"""Every way to compute one product on a GPU, and which are worth timing.

Legend: M rows of x, K inputs, N outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoq_kernels import layout, ops
from autoq_kernels.layout import Header, Kind
from autoq_kernels.triton import configs, gemm, gemv, library_kernels
from autoq_kernels.triton.configs import Config
from autoq_kernels.triton.launching import Launch, run
from autoq_kernels.triton.weight import Weight

GEMV = "triton.gemv"
GEMM = "triton.gemm"
DEQUANTIZE = "triton.dequantize+aten"
INT4PACK = "aten.int4pack"
INT_MM = "aten.int_mm"
LINEAR = "aten.linear"
PLAIN = "default"
_FAMILIES = {GEMV: "gemv", GEMM: "gemm"}
_LARGEST_GROUP = 1024
_DEQUANTIZED_ROWS = 1024  # from here on the default is a float weight: decoded once, not once for each tile of rows
_DEQUANTIZE_ROWS = 64  # fewer rows cannot pay for writing a float weight and reading it again


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to compute a product.

    Attributes:
        method: ``triton.gemv``, ``triton.gemm``, ``triton.dequantize+aten`` (a float weight, then cuBLAS),
            ``aten.int4pack`` (tinygemm), ``aten.int_mm``, ``aten.linear`` or ``default`` (plain PyTorch).
        config: of the first two; None of the others.
    """

    method: str
    config: Config | None = None

    @property
    def label(self) -> str:
        """The method and its configuration, for people: ``triton.gemv m1 n8 k4096 s1 w2 p1``."""
        return self.method if self.config is None else f"triton.{self.config}"

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return {"method": self.method, "config": None if self.config is None else self.config.to_json()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Choice:
        """From `to_json`'s fields.

        Raises:
            ValueError: there is no such method, or its configuration is missing or impossible.
        """
        method, config = fields.get("method"), fields.get("config")
        if method not in _MULTIPLY or set(fields) != {"method", "config"}:
            raise ValueError(f"not a choice: {dict(fields)}")
        found = None if config is None else Config.from_json(config)
        if (found.family if found else None) != _FAMILIES.get(method):
            raise ValueError(f"{method} with a configuration of another family: {config}")
        return cls(method=method, config=found)


def decodable(form: Header) -> bool:
    """Whether the Triton kernels decode such a weight."""
    group = form.group_size
    return form.kind is not Kind.DENSE and group & (group - 1) == 0 and group <= _LARGEST_GROUP


def why_not(method: str, form: Header, m: int, dtype: torch.dtype) -> str | None:
    """Why a method cannot compute a product: a sentence, or None if it can.

    Args:
        method: see `Choice`.
        form: of the weight.
        m: rows of x.
        dtype: of x.
    """
    dense, whole = form.kind is Kind.DENSE, configs.dynamic(form, m)
    reason: str | None = None
    if method == PLAIN:
        return None
    if dense != (method == LINEAR):
        reason = f"it is for {'quantized' if dense else 'dense'} weights"
    elif method == LINEAR and layout.DENSE_BITS.get(dtype) != form.bits:
        reason = "x and the weight have different dtypes"
    elif method in (GEMV, GEMM, DEQUANTIZE) and not decodable(form):
        reason = f"groups of {form.group_size} inputs: the kernels take powers of two up to {_LARGEST_GROUP}"
    elif method == GEMV and m > configs.GEMV_ROWS:
        reason = f"it takes at most {configs.GEMV_ROWS} rows, not {m}"
    elif method == GEMM and dtype is torch.float32 and not whole:
        reason = "matrix instructions would round float32"
    elif method == GEMM and whole and form.kind is Kind.AFFINE and form.bits == 8:
        reason = "unsigned codes of 8 bits are no int8 operand"
    elif method in (DEQUANTIZE, INT4PACK) and whole:
        reason = "x is rounded to int8"
    elif method == DEQUANTIZE and dtype is not torch.float32 and configs.m_bucket(m) < _DEQUANTIZE_ROWS:
        reason = f"writing a float weight does not pay below {_DEQUANTIZE_ROWS} rows, there are {m}"
    elif method == INT_MM:
        reason = library_kernels.int_mm_why_not(form, m) if whole else "x is not rounded to int8"
    elif method == INT4PACK:
        reason = library_kernels.int4pack_why_not(form, dtype)
    return reason


def choices(form: Header, m: int, dtype: torch.dtype, *, has_column_scale: bool) -> tuple[Choice, ...]:
    """Everything that may be timed for a product, the default first.

    Args:
        form: of the weight.
        m: rows of x.
        dtype: of x.
        has_column_scale: whether the weight has one; ``form`` says so too.
    """
    found = [default_choice(form, m, dtype), *_configured(form, m, dtype)]
    found += [
        Choice(method=method)
        for method in (DEQUANTIZE, INT4PACK, INT_MM, LINEAR)
        if why_not(method, form, m, dtype) is None
    ]
    return tuple(dict.fromkeys(found))


@functools.lru_cache(maxsize=4096)
def default_choice(form: Header, m: int, dtype: torch.dtype) -> Choice:
    """What runs where nothing was tuned."""
    if m >= _DEQUANTIZED_ROWS and why_not(DEQUANTIZE, form, m, dtype) is None:
        return Choice(method=DEQUANTIZE)
    configured = _configured(form, m, dtype)
    if configured:
        return configured[0]
    others = (LINEAR, DEQUANTIZE, PLAIN)
    return next(Choice(method=method) for method in others if why_not(method, form, m, dtype) is None)


def _configured(form: Header, m: int, dtype: torch.dtype) -> list[Choice]:
    """The choices of the tuning space that can compute a product, in its order."""
    found = (Choice(method=f"triton.{config.family}", config=config) for config in configs.space(form, m))
    return [choice for choice in found if why_not(choice.method, form, m, dtype) is None]


def multiply(choice: Choice, x_MK: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` as a choice says.

    Args:
        choice: one that `why_not` does not refuse.
        x_MK: contiguous float [M, K], M at least 1, on the weight's device.
        weight: of K inputs and N outputs.
        bias: float [N] or None.

    Returns:
        [M, N] in x's dtype.
    """
    return _MULTIPLY[choice.method](x_MK, weight, bias, choice.config)


def _launched(
    launches: Callable[..., list[Launch]], x_MK: Tensor, weight: Weight, bias: Tensor | None, config: Config
) -> Tensor:
    y_MN = x_MK.new_empty(len(x_MK), weight.form.n)
    run(launches(x_MK, weight, bias, y_MN, config))
    return y_MN


def _plain(x_MK: Tensor, weight: Weight, bias: Tensor | None, config: None) -> Tensor:
    return ops.linear(x_MK, weight.head, bias, weight.form.n)


_MULTIPLY: dict[str, Callable[..., Tensor]] = {
    GEMV: functools.partial(_launched, gemv.launches),
    GEMM: functools.partial(_launched, gemm.launches),
    DEQUANTIZE: lambda x_MK, weight, bias, config: library_kernels.aten_linear(x_MK, weight, bias),
    INT4PACK: lambda x_MK, weight, bias, config: library_kernels.int4pack(x_MK, weight, bias),
    INT_MM: lambda x_MK, weight, bias, config: library_kernels.int_mm(x_MK, weight, bias),
    LINEAR: lambda x_MK, weight, bias, config: library_kernels.aten_linear(x_MK, weight, bias),
    PLAIN: _plain,
}
