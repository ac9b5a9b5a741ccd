"""int4 groups with half-quadratic quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from autoq.candidates.affine import AffineCandidate
from autoq.candidates.base import check_field
from autoq.scheme import GROUP_SIZES


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Hqq(AffineCandidate):
    """4-bit codes whose zero point minimises an l_p error (HQQ); see :func:`autoq.numerics.hqq`.

    Attributes:
        group_size: weights of a row that share a scale and a minimum; 32, 64 or 128.
    """

    key: ClassVar[str] = "int4wo-hqq"

    def __post_init__(self) -> None:
        check_field(self, "group_size", GROUP_SIZES)

    @property
    def _code_bits(self) -> int:
        return 4

    @property
    def _method(self) -> Literal["rtn", "hqq"]:
        return "hqq"
