"""What HQQ and SINQ share: unsigned codes in groups of a row, with a scale and a minimum each.

W[n, k] = (q·scale[n, g] + minimum[n, g])·row[n]·column[k], g = k // group_size.

``row`` is a power of two, so that float16 scales and minima neither overflow nor underflow whatever the
weights' magnitude. Groups never straddle rows: where group_size does not divide K, the last group of each
row is shorter and chosen from its own members only; its codes are padded with zeros afterwards, which the
kernels multiply with zero activations.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from autoq import numerics
from autoq.candidates.base import Candidate, Packed, compiled, for_row_chunks, padded, plus_bias, section
from autoq_kernels import layout


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineCandidate(Candidate):
    """A scheme in the affine group format; subclasses choose the grid of a group and column factors.

    A subclass says ``code_bits`` and overrides ``quantize_groups``, ``column_scale`` or both.

    Attributes:
        group_size: weights of a row that share a scale and a minimum; a multiple of 32.
    """

    group_size: int = 64

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits of a code: 3, 4, 5, 6 or 8."""

    def quantize_groups(self, w: Tensor) -> numerics.Grid:
        """The grid of each group, and the codes on it.

        Args:
            w: float32 ``[rows, G, g]`` below 2¹³ in magnitude: some rows of the weight, divided by their powers of two
                and by the column factors. g is ``group_size``, or less in a row's last group.

        Returns:
            Codes uint8 ``[rows, G, g]`` below 2^``code_bits``; scale and minimum float16 ``[rows, G]``.
        """
        quantize = numerics.hqq if self._method == "hqq" else numerics.rtn
        return quantize(w, self.code_bits)

    def column_scale(self, w_NK: Tensor) -> Tensor | None:
        """Factors of the columns, by which the weight is divided before it is quantized.

        Args:
            w_NK: the weight ``[N, K]``, float32, bfloat16 or float16.

        Returns:
            Positive float32 ``[K]``, which the kernels multiply into the activation; None for none.
        """
        return None

    @property
    def _method(self) -> Literal["rtn", "hqq"]:
        """How ``quantize_groups`` chooses, unless it is overridden: the compiled kernels know both."""
        return "rtn"

    def _pack(self, w_NK: Tensor) -> Tensor:
        column_K = self.column_scale(w_NK)
        if type(self).quantize_groups is not AffineCandidate.quantize_groups:
            return self._pack_by_chunks(w_NK, column_K)
        data = compiled(
            w_NK,
            self._header | {"has_column_scale": column_K is not None},
            method=self._method,
            column_scale=column_K,
            beta=numerics.HQQ_BETA,
            kappa=numerics.HQQ_KAPPA,
            iterations=numerics.HQQ_ITERATIONS,
        )
        return self._pack_by_chunks(w_NK, column_K) if data is None else data

    @property
    def _header(self) -> dict[str, Any]:
        """What the header says besides the shape."""
        return {
            "kind": layout.Kind.AFFINE,
            "bits": self.code_bits,
            "group_size": self.group_size,
            "activation_bits": self.activation_bits,
            "m_switch": self.m_switch,
        }

    def _pack_by_chunks(self, w_NK: Tensor, column_K: Tensor | None) -> Tensor:
        """:meth:`_pack` with torch alone."""
        n, k = w_NK.shape
        group_count, device = -(-k // self.group_size), w_NK.device
        codes = torch.zeros(n, group_count * self.group_size, dtype=torch.uint8, device=device)
        scale = torch.empty(n, group_count, dtype=torch.float16, device=device)
        minimum, row_N = torch.empty_like(scale), torch.empty(n, device=device)

        def pack_rows(rows: slice, w_RK: Tensor) -> None:
            if column_K is not None:
                w_RK = w_RK / column_K
            row_N[rows] = row_R = numerics.power_of_two_rows(w_RK)
            self._pack_rows(w_RK / row_R.unsqueeze(1), codes[rows], scale[rows], minimum[rows])

        for_row_chunks(w_NK, pack_rows)
        data: Tensor = layout.build(
            n=n,
            k=k,
            codes=codes,
            scale=scale,
            minimum=minimum,
            row_scale=row_N,
            column_scale=column_K,
            **self._header,
        )
        return data

    def _pack_rows(self, w_RK: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor) -> None:
        """Fill the codes, scales and minima of some rows: the whole groups, then the short last one."""
        r, k = w_RK.shape
        whole = k - k % self.group_size
        for part, size in ((slice(0, whole), self.group_size), (slice(whole, k), k - whole)):
            if part.start == part.stop:
                continue
            grid = self.quantize_groups(w_RK[:, part].reshape(r, -1, size))
            groups = slice(part.start // self.group_size, -(-part.stop // self.group_size))
            codes[:, part] = grid.codes.reshape(r, -1)
            scale[:, groups], minimum[:, groups] = grid.scale, grid.minimum

    def unpack(self, p: Packed) -> Tensor:
        """(q·scale + minimum)·row·column in float32."""
        return self._weight(p, torch.float32)

    def reference(self, x: Tensor, p: Packed, bias: Tensor | None = None) -> Tensor:
        """``x @ ((q·scale + minimum)·row·column).T`` in float64."""
        return plus_bias(x.double() @ self._weight(p, torch.float64).T, bias)

    def _weight(self, p: Packed, dtype: torch.dtype) -> Tensor:
        group_K = torch.arange(p.shape[1], device=p.data.device) // self.group_size
        scale, minimum = section(p, "scale").to(dtype), section(p, "minimum").to(dtype)
        w_NK = p.codes.to(dtype) * scale[:, group_K] + minimum[:, group_K]
        w_NK = w_NK * section(p, "row_scale").to(dtype).unsqueeze(1)
        return w_NK if p.column_scale is None else w_NK * p.column_scale.to(dtype)

    def weight_bytes_for(self, n: int, k: int) -> int:
        """Codes of padded groups, two float16 a group and a float32 a row."""
        k_padded = padded(k, self.group_size)
        return n * k_padded * self.code_bits // 8 + 4 * n * (k_padded // self.group_size) + 4 * n
