"""A picture of what schemes cost each kind of layer in time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from autoq.errors import InputError
from autoq.figures import layer_place, short_kinds

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_DARK = 0.5  # of the colour scale; on what is darker, numbers are white


def times_figure(costs: pd.DataFrame) -> Figure:
    """How long each kind of layer takes of a request under each scheme, over its time unquantized.

    Layers of one kind in different blocks are summed; × where none of them can have the scheme.

    Args:
        costs: columns of ``tables.COSTS``.

    Raises:
        InputError: if no layer has a time without quantization.
    """
    from autoq.pictures import Picture

    timed = costs[costs["reason"] == ""]
    timed = timed.assign(kind=[layer_place(name)[0] for name in timed["layer"]])
    none = timed[timed["scheme"] == "none"].set_index("layer")["time_us"]
    if none.empty or not none.gt(0).any():
        raise InputError("a picture of times needs layers timed unquantized", got=f"{len(costs)} rows")
    kinds = list(dict.fromkeys(timed["kind"]))
    schemes = [one for one in dict.fromkeys(costs["scheme"]) if one != "none"]
    grid = np.full((len(kinds), len(schemes)), np.nan)
    for (kind, scheme), rows in timed[timed["scheme"] != "none"].groupby(["kind", "scheme"], sort=False):
        base = float(none[rows["layer"]].sum())
        grid[kinds.index(kind), schemes.index(scheme)] = rows["time_us"].sum() / base if base > 0 else np.nan
    figure = Picture(2.6 + 0.9 * len(schemes), 1.6 + 0.32 * len(kinds), dpi=110)
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(grid), aspect="auto", cmap="viridis")
    axes.set_facecolor("#dddddd")
    low, high = (float(end) for end in image.get_clim())
    for (row, column), ratio in np.ndenumerate(grid):
        known = bool(np.isfinite(ratio))
        dark = known and ratio < low + _DARK * (high - low)
        text = f"{ratio:.2f}" if known else "×"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    names = [scheme.replace("(", "\n(").replace(",", ",\n") for scheme in schemes]
    axes.set_xticks(range(len(schemes)), names, fontsize=7)
    axes.set_yticks(range(len(kinds)), short_kinds(kinds), fontsize=8)
    figure.colorbar(image, ax=axes, label="time of a request / unquantized")
    return figure
