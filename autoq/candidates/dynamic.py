"""Schemes with int8 activations on 4-bit weights (int4dq), or on 8- and 4-bit ones from some rows on (the mixes).

A mix has one set of codes and two arithmetics: below ``m_switch`` rows, where a product is bound by reading the
weight, activations stay as they are; from there on, where it is bound by multiplying, they are rounded to int8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from autoq.candidates.affine import AffineCandidate
from autoq.candidates.base import Candidate, Packed, plus_bias, rounded_rows, section
from autoq.candidates.int4_hqq import Int4Hqq
from autoq.candidates.int8 import Int8Dynamic, Int8WeightOnly
from autoq.candidates.sinq import Sinq
from autoq.scheme import FIELDS, Choices


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Dynamic(AffineCandidate):
    """4-bit codes of ``int4wo-hqq`` or ``sinq`` times activations rounded to int8 when they arrive.

    Each row of x·column is rounded symmetrically with scale s = max|row|/127 to x_q, and
    y[n] = s·row[n]·Σ_g (scale[n, g]·Σ_{k∈g} q·x_q + minimum[n, g]·Σ_{k∈g} x_q): the sums in a group are whole numbers.

    Attributes:
        group_size: weights of a row that share a scale and a minimum; 32, 64 or 128.
        method: ``hqq`` for the codes of ``int4wo-hqq``, ``sinq`` for those of ``sinq(bits=4)``.
    """

    key: ClassVar[str] = "int4dq"
    choices: ClassVar[Choices] = FIELDS[key]
    method: str = "hqq"

    @property
    def activation_bits(self) -> int:
        """8."""
        return 8

    @property
    def _weight_only(self) -> AffineCandidate:
        """The scheme whose weights these are."""
        return Int4Hqq(group_size=self.group_size) if self.method == "hqq" else Sinq(bits=4, group_size=self.group_size)

    @property
    def code_bits(self) -> int:
        """4."""
        return 4

    @property
    def _method(self) -> Literal["rtn", "hqq"]:
        return self._weight_only._method

    def column_scale(self, w_NK: Tensor) -> Tensor | None:
        """That of the scheme whose weights these are."""
        return self._weight_only.column_scale(w_NK)

    def reference(self, x: Tensor, p: Packed, bias: Tensor | None = None) -> Tensor:
        """The sums over groups of whole-number products, scaled in float64."""
        x_q, s = rounded_rows(x.float() if p.column_scale is None else x.float() * p.column_scale)
        codes_NK = p.codes.double()
        scale_NG, minimum_NG = section(p, "scale").double(), section(p, "minimum").double()
        y = x_q.new_zeros(*x.shape[:-1], len(codes_NK))
        for group in range(scale_NG.shape[1]):
            inputs = slice(group * self.group_size, (group + 1) * self.group_size)
            y += (x_q[..., inputs] @ codes_NK[:, inputs].T) * scale_NG[:, group]
            y += x_q[..., inputs].sum(dim=-1, keepdim=True) * minimum_NG[:, group]
        return plus_bias(y * s * section(p, "row_scale").double(), bias)

    def weight_bytes_for(self, n: int, k: int) -> int:
        """Those of the scheme whose weights these are."""
        return self._weight_only.weight_bytes_for(n, k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Mix(Int8Dynamic):
    """``int8wo`` below ``m_switch`` rows of the activation, ``int8dq`` from there on.

    Attributes:
        m_switch: 8, 16, 32, 64 or 128.
    """

    key: ClassVar[str] = "int8mix"
    choices: ClassVar[Choices] = FIELDS[key]
    m_switch: int = 32

    def at_rows(self, m: int) -> Candidate:
        """``int8dq`` or ``int8wo``."""
        return Int8Dynamic() if m >= self.m_switch else Int8WeightOnly()

    def reference(self, x: Tensor, p: Packed, bias: Tensor | None = None) -> Tensor:
        """That of :meth:`at_rows`."""
        return self.at_rows(x.shape[:-1].numel()).reference(x, p, bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Mix(Int4Dynamic):
    """``int4wo-hqq`` or ``sinq(bits=4)`` below ``m_switch`` rows of the activation, ``int4dq`` from there on.

    Attributes:
        group_size: weights of a row that share a scale and a minimum; 32, 64 or 128.
        method: ``hqq`` for the codes of ``int4wo-hqq``, ``sinq`` for those of ``sinq(bits=4)``.
        m_switch: 8, 16, 32, 64 or 128.
    """

    key: ClassVar[str] = "int4mix"
    choices: ClassVar[Choices] = FIELDS[key]
    m_switch: int = 32

    def at_rows(self, m: int) -> Candidate:
        """``int4dq`` of the same fields, or the scheme whose weights these are."""
        if m >= self.m_switch:
            return Int4Dynamic(group_size=self.group_size, method=self.method)
        return self._weight_only

    def reference(self, x: Tensor, p: Packed, bias: Tensor | None = None) -> Tensor:
        """That of :meth:`at_rows`."""
        return self.at_rows(x.shape[:-1].numel()).reference(x, p, bias)
