"""6-bit floats, one scale a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from autoq import numerics
from autoq.candidates.base import (
    BLOCK,
    Candidate,
    Packed,
    compiled,
    for_row_chunks,
    padded,
    plus_bias,
    section,
)
from autoq.scheme import FIELDS, Choices
from autoq_kernels import layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp6(Candidate):
    """W = decode(q)·scale[n], rounded to the nearest 6-bit float (ties to even), −0 kept.

    e2m3 has the smaller error on weights that look Gaussian, e3m2 on heavier tails.

    Attributes:
        format: ``"e3m2"`` (largest value 28) or ``"e2m3"`` (7.5).
    """

    key: ClassVar[str] = "fp6"
    choices: ClassVar[Choices] = FIELDS[key]
    format: str = "e3m2"

    @property
    def _form(self) -> numerics.FloatFormat:
        return numerics.E3M2 if self.format == "e3m2" else numerics.E2M3

    @property
    def _header(self) -> dict[str, Any]:
        return {"kind": self._kind, "bits": 6}

    @property
    def _kind(self) -> layout.Kind:
        return layout.Kind.FP6_E3M2 if self.format == "e3m2" else layout.Kind.FP6_E2M3

    def _pack(self, w_NK: Tensor) -> Tensor:
        data = compiled(w_NK, self._header)
        return self._pack_by_chunks(w_NK) if data is None else data

    def _pack_by_chunks(self, w_NK: Tensor) -> Tensor:
        """:meth:`_pack` with torch alone."""
        n, k = w_NK.shape
        codes = torch.zeros(n, padded(k, BLOCK), dtype=torch.uint8, device=w_NK.device)
        scale_N = torch.empty(n, device=w_NK.device)

        def pack_rows(rows: slice, w_RK: Tensor) -> None:
            codes[rows, :k], scale_N[rows] = numerics.fp6_rows(w_RK, self._form)

        for_row_chunks(w_NK, pack_rows)
        data: Tensor = layout.build(n=n, k=k, codes=codes, scale=scale_N, **self._header)
        return data

    def unpack(self, p: Packed) -> Tensor:
        """decode(q)·scale in float32."""
        return numerics.decode_fp6(p.codes, self._form) * section(p, "scale").unsqueeze(1)

    def reference(self, x: Tensor, p: Packed, bias: Tensor | None = None) -> Tensor:
        """``x @ (decode(q)·scale).T`` in float64."""
        w_NK = numerics.decode_fp6(p.codes, self._form).double() * section(p, "scale").double().unsqueeze(1)
        return plus_bias(x.double() @ w_NK.T, bias)

    def weight_bytes_for(self, n: int, k: int) -> int:
        """Six bits a weight, K rounded up to whole blocks, and a float32 a row."""
        return n * padded(k, BLOCK) * 6 // 8 + 4 * n
