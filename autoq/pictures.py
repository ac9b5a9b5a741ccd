"""A matplotlib figure that notebooks show by themselves."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class Picture(Figure):
    """An empty figure, drawn without pyplot; a notebook shows it as PNG, whichever backend is set up.

    Args:
        width: in inches.
        height: in inches.
        dpi: pixels an inch.
    """

    def __init__(self, width: float, height: float, *, dpi: float) -> None:
        super().__init__(figsize=(width, height), dpi=dpi, layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()
