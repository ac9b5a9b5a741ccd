"""int4 groups with half-quadratic quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from autoq.candidates.affine import AffineCandidate
from autoq.scheme import FIELDS, Choices


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Hqq(AffineCandidate):
    """4-bit codes whose zero point minimises an l_p error (HQQ); see :func:`autoq.numerics.hqq`.

    Attributes:
        group_size: weights of a row that share a scale and a minimum; 32, 64 or 128.
    """

    key: ClassVar[str] = "int4wo-hqq"
    choices: ClassVar[Choices] = FIELDS[key]

    @property
    def code_bits(self) -> int:
        """4."""
        return 4

    @property
    def _method(self) -> Literal["rtn", "hqq"]:
        return "hqq"
