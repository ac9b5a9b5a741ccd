"""SINQ: Sinkhorn-normalised quantization (arXiv 2509.22944), 1-D tiles, uniform codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autoq import numerics
from autoq.candidates.affine import AffineCandidate
from autoq.scheme import FIELDS, Choices
from autoq_kernels.cpu import build

ITERATIONS = 16  # the published default


@dataclass(frozen=True, slots=True, kw_only=True)
class Sinq(AffineCandidate):
    """Rounds W/t to nearest, with a factor t per column that evens out rows and columns of each tile.

    t is found by :func:`autoq.numerics.sinkhorn` for each tile of all rows × group_size columns, and is
    multiplied into the activation. The row factors found beside it are not used: each (row, group) has
    its own minimum and maximum, so a row factor changes nothing. Below 16 rows t is 1.

    Attributes:
        bits: of a code; 3, 4, 5, 6 or 8.
        group_size: weights of a row that share a scale and a minimum; 32, 64 or 128.
    """

    key: ClassVar[str] = "sinq"
    choices: ClassVar[Choices] = FIELDS[key]
    bits: int = 4

    @property
    def code_bits(self) -> int:
        """``bits``."""
        return self.bits

    def column_scale(self, w_NK: Tensor) -> Tensor:
        """The factors t."""
        if w_NK.device.type == "cpu":
            compiled: Tensor | None = build.sinkhorn(w_NK, self.group_size, ITERATIONS)
            if compiled is not None:
                return compiled
        tiles = torch.split(w_NK, self.group_size, dim=1)
        return torch.cat([numerics.sinkhorn(tile.float().contiguous(), ITERATIONS)[0] for tile in tiles])

    def weight_bytes_for(self, n: int, k: int) -> int:
        """The affine format's bytes and a float32 a column."""
        return AffineCandidate.weight_bytes_for(self, n, k) + 4 * k
