"""On which scale the losses of single layers add up to a plan's."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Additive:
    """The scale on which losses of different layers add up, which is the one the search works on.

    It does not depend on the budget, so that measured losses serve every budget.

    Attributes:
        squares: whether it is the squares that add up, as those of a relative RMS do; other losses do as they are.
    """

    squares: bool = False

    @classmethod
    def of(cls, metric: str) -> Additive:
        """The scale of a metric, by its name in a plan's budget."""
        return cls(squares=metric == "relative_rms")

    def to(self, loss: float) -> float:
        """A measured loss on the additive scale."""
        return math.copysign(loss * loss, loss) if self.squares else loss

    def slope(self, loss: float) -> float:
        """Derivative of ``to``."""
        return 2.0 * abs(loss) if self.squares else 1.0

    def back(self, value: float) -> float:
        """A value on the additive scale as a loss."""
        return math.copysign(math.sqrt(abs(value)), value) if self.squares else value
