"""4-bit groups whose outliers are clipped where that lowers the squared error of the group."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autoq.candidates import AffineCandidate
from autoq.numerics import Grid, rtn

KEPT = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # shares of a group's range that are tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Clip(AffineCandidate):
    """W[n, k] = q·scale[n, g] + minimum[n, g], over the part of the group's range that has the least squared error.

    Attributes:
        group_size: weights of a row that share a scale and a minimum; 32, 64 or 128.
    """

    key: ClassVar[str] = "int4wo-clip"
    choices: ClassVar = {"group_size": (32, 64, 128)}

    @property
    def code_bits(self) -> int:
        """4."""
        return 4

    def quantize_groups(self, w: Tensor) -> Grid:
        """Of each group the best of several narrower grids, and the whole one."""
        low, high = w.amin(dim=-1, keepdim=True), w.amax(dim=-1, keepdim=True)
        middle, reach = (low + high) / 2, (high - low) / 2
        best = rtn(w, self.code_bits)
        least = (best.dequantize() - w).square().sum(dim=-1)
        for kept in KEPT:
            grid = rtn(w.clamp(middle - kept * reach, middle + kept * reach), self.code_bits)
            error = (grid.dequantize() - w).square().sum(dim=-1)
            better = error < least
            least = torch.where(better, error, least)
            best = Grid(
                torch.where(better.unsqueeze(-1), grid.codes, best.codes),
                torch.where(better, grid.scale, best.scale),
                torch.where(better, grid.minimum, best.minimum),
            )
        return best
