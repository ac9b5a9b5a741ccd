"""int8 weights, one scale a row; activations in float (int8wo) or in int8, one scale a token (int8dq)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from autoq import numerics
from autoq.candidates.base import (
    Candidate,
    LinearOp,
    Packed,
    compiled,
    for_row_chunks,
    plus_bias,
    rounded_rows,
    section,
)
from autoq_kernels import layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8WeightOnly(Candidate):
    """W = q·scale[n], q in [−128, 127], scale = max|row|/127.5; the activation stays in float."""

    key: ClassVar[str] = "int8wo"

    def _pack(self, w_NK: Tensor) -> Tensor:
        data = compiled(w_NK, self._header)
        return self._pack_by_chunks(w_NK) if data is None else data

    @property
    def _header(self) -> dict[str, Any]:
        """What the header says besides the shape."""
        return {
            "kind": layout.Kind.INT8,
            "bits": 8,
            "activation_bits": self.activation_bits,
            "m_switch": self.m_switch,
        }

    def _pack_by_chunks(self, w_NK: Tensor) -> Tensor:
        """:meth:`_pack` with torch alone."""
        n, k = w_NK.shape
        codes_NK = torch.empty(n, k, dtype=torch.int8, device=w_NK.device)
        scale_N = torch.empty(n, device=w_NK.device)

        def pack_rows(rows: slice, w_RK: Tensor) -> None:
            codes_NK[rows], scale_N[rows] = numerics.int8_rows(w_RK)

        for_row_chunks(w_NK, pack_rows)
        data: Tensor = layout.build(n=n, k=k, codes=codes_NK, scale=scale_N, **self._header)
        return data

    def unpack(self, p: Packed) -> Tensor:
        """q·scale in float32."""
        return p.codes.float() * section(p, "scale").unsqueeze(1)

    def reference(self, x: Tensor, p: Packed, bias: Tensor | None = None) -> Tensor:
        """``x @ (q·scale).T`` in float64."""
        w_NK = p.codes.double() * section(p, "scale").double().unsqueeze(1)
        return plus_bias(x.double() @ w_NK.T, bias)

    def weight_bytes_for(self, n: int, k: int) -> int:
        """A byte a weight and a float32 a row."""
        return n * k + 4 * n


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Dynamic(Int8WeightOnly):
    """:class:`Int8WeightOnly`'s weights times activations rounded to int8 when they arrive.

    Each token (row) is rounded symmetrically with scale max|row|/127, the products are summed as whole
    numbers and scaled in float32: an int32 sum times a float16 scale could overflow.
    """

    key: ClassVar[str] = "int8dq"

    @property
    def activation_bits(self) -> int:
        """8."""
        return 8

    def _why_not_shape(self, op: LinearOp) -> str | None:
        if op.k > layout.MAX_INT8_K:
            return f"K={op.k} exceeds {layout.MAX_INT8_K}: the int32 sum could overflow"
        return Int8WeightOnly._why_not_shape(self, op)

    def reference(self, x: Tensor, p: Packed, bias: Tensor | None = None) -> Tensor:
        """The whole-number product, exact in float64, scaled there."""
        x_q, s = rounded_rows(x)
        return plus_bias((x_q @ p.codes.double().T) * s * section(p, "scale").double(), bias)
