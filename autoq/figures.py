"""Pictures of a tuning: the measured trade-off, and where in the model each scheme hurts.

Figures are drawn with matplotlib's object interface, so no display, backend or global state is involved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from autoq.errors import InputError
from autoq.placement import Box, Label, around, placed
from autoq.summary import perplexity_change
from autoq.tables import UNQUANTIZED_LABEL

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: distinguishable with every common colour blindness. Markers differ as well.
_BLUE, _ORANGE, _GREEN, _VERMILION, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8C8C8C"
_STYLES = {"uniform": ("s", _ORANGE), "frontier": ("o", _BLUE), "optuna": ("^", _GREEN), "local": ("v", _BLUE)}
_OTHER_STYLE = ("D", _GREY)
_RING, _MARK, _NAME_FONT = 9.0, 4.0, 8.0  # points: radii of the chosen plan's ring and of a mark, and a font size
_LARGEST = 1e9  # that is drawn, in percent, units of loss, or times the unquantized model's time
_OVERFLOW = 700.0  # nats; the exponential of more is no float
_BEYOND_BUDGET = 3.0  # the loss axis ends at this many budgets; what lies beyond is drawn at the edge with its value


class LossAxis(NamedTuple):
    """How loss increases are shown: their values, label and number format.

    Attributes:
        label: of the axis, with its unit.
        percent: whether they are shown as changes of perplexity.
    """

    label: str
    percent: bool

    def values(self, increase: Any) -> Any:
        """Loss increases in the metric's unit → what the axis shows."""
        numbers = np.asarray(increase, dtype=float)
        return 100 * np.expm1(np.minimum(numbers, _OVERFLOW)) if self.percent else numbers

    def text(self, increase: float) -> str:
        """One loss increase for a label."""
        return perplexity_change(increase) if self.percent else f"{increase:+.3g}"


def loss_axis(budget: Mapping[str, Any]) -> LossAxis:
    """How the losses of a plan with this budget are shown."""
    if budget.get("metric") == "nll":
        return LossAxis("perplexity increase over the unquantized model (%)", True)
    unit = f" ({budget['unit']})" if budget.get("unit") else ""
    return LossAxis(f"loss increase over the unquantized model{unit}", False)


def relative_latency(front: pd.DataFrame) -> pd.DataFrame:
    """Each plan's request latency over the unquantized model's, measured where it was timed and else predicted.

    Args:
        front: columns of ``tables.FRONT``; the unquantized model is the row labelled ``unquantized``, or where there is
            none the one labelled ``none``.

    Returns:
        Columns ``latency``, ``low`` and ``high`` (relative; NaN where unknown) and ``timed`` (bool), in front's order.

    Raises:
        InputError: if the unquantized model is not among the rows.
    """
    import pandas as pd

    labels = set(front["label"].dropna())
    base = front[front["label"] == (UNQUANTIZED_LABEL if UNQUANTIZED_LABEL in labels else "none")]
    if base.empty:
        raise InputError(
            "a front holds the unquantized model, labelled unquantized or none", got=f"labels {sorted(labels)}"
        )
    timed = front["latency_measured_us"].notna() & bool(base["latency_measured_us"].notna().iloc[0])
    measured = base["latency_measured_us"].iloc[0]
    predicted = base["latency_predicted_us"].iloc[0]
    return pd.DataFrame(
        {
            "latency": (front["latency_measured_us"] / measured).where(
                timed, front["latency_predicted_us"] / predicted
            ),
            "low": (front["latency_low_us"] / measured).where(timed),
            "high": (front["latency_high_us"] / measured).where(timed),
            "timed": timed,
        }
    )


def front_figure(front: pd.DataFrame, budget: Mapping[str, Any]) -> Figure:
    """The measured trade-off: request latency against the increase in loss, one point per plan.

    Only plans whose loss was measured on all samples are drawn. Filled points were timed end to end, hollow ones are
    predicted. Error bars are the 95 % interval of the loss and the 10 to 90 % quantiles of the time.

    Args:
        front: columns of ``tables.FRONT``, with the row of the unquantized plan (label ``none``).
        budget: the plan's ``provenance["budget"]``: ``metric``, ``unit``, ``max_increase``, ``text``.

    Raises:
        InputError: if no plan's loss was measured, or the unquantized plan is not among the rows.
    """
    from autoq.pictures import Picture

    axis = loss_axis(budget)
    points = front_points(front, axis)
    figure = Picture(8.0, 5.2, dpi=120)
    axes = figure.add_subplot()
    limit = budget.get("max_increase")
    edge = far_edge(points, None if limit is None else float(axis.values(limit)))
    for source, group in points.groupby("source", sort=False):
        _draw(axes, str(source), group, edge)
    _draw_pareto(axes, points, edge)
    chosen = points[points["chosen"].fillna(False).astype(bool)]
    axes.scatter(
        chosen["x"],
        chosen["y"],
        s=(2 * _RING) ** 2 * 0.8,
        facecolors="none",
        edgecolors=_VERMILION,
        linewidths=2,
        label="chosen",
    )
    if limit is not None:
        axes.axvline(float(axis.values(limit)), color=_VERMILION, linestyle="--", linewidth=1, label="budget")
    axes.axhline(1.0, color=_GREY, linewidth=0.8)
    left = min(0.0, float(points["x"].min()))
    margin = 0.06 * (edge - left)
    axes.set_xlim(left - margin, edge + margin)
    axes.set_xlabel(axis.label)
    axes.set_ylabel("request latency / unquantized (lower is faster)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, title="filled: timed end to end; hollow: predicted", title_fontsize=8, markerscale=0.7)
    if budget.get("text"):
        axes.set_title(str(budget["text"]), fontsize=10)
    _name_uniform(figure, axes, points, edge, axis)
    return figure


def _name_uniform(figure: Figure, axes: Axes, points: pd.DataFrame, edge: float, axis: LossAxis) -> None:
    """Name the uniform plans beside their marks, clear of each other, of the marks and of the chosen plan's ring."""
    figure.draw_without_rendering()  # places are known after the layout
    scale = figure.dpi / 72.0
    rows = points.assign(x=np.minimum(points["x"], edge), beyond=points["x"] > edge).to_dict("records")
    ends = axes.transData.transform([(row["x"], row["y"]) for row in rows])
    reach = [scale * (_RING if row["chosen"] is True else _MARK) for row in rows]
    marks = [around(x, y, radius) for (x, y), radius in zip(ends, reach, strict=True)]
    labels, texts = [], []
    for row, (x, y), radius in zip(rows, ends, reach, strict=True):
        if row["label"]:
            name = f"{row['label']} ({axis.text(row['loss_delta'])})" if row["beyond"] else str(row["label"])
            width = 0.56 * _NAME_FONT * scale * len(name)
            labels.append(Label(x, y, width, 1.2 * _NAME_FONT * scale, radius + 2 * scale))
            texts.append(name)
    inside = axes.get_window_extent()
    for box, name in zip(placed(labels, marks, Box(*inside.extents)), texts, strict=True):
        place = ((box.left + box.right) / 2, (box.low + box.high) / 2)
        axes.annotate(
            name,
            tuple(axes.transData.inverted().transform(place)),
            fontsize=_NAME_FONT,
            ha="center",
            va="center",
            zorder=5,
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5},
        )


def front_points(front: pd.DataFrame, axis: LossAxis) -> pd.DataFrame:
    """The plans to draw, with columns x, x_low, x_high, y, y_low, y_high and timed."""
    latency = relative_latency(front)
    points: pd.DataFrame = front.assign(
        **{name: front[name].fillna("").astype(object) for name in ("label", "source", "assignment")},
        x=axis.values(front["loss_delta"]),
        x_low=axis.values(front["loss_low"]),
        x_high=axis.values(front["loss_high"]),
        y=latency["latency"],
        y_low=latency["low"],
        y_high=latency["high"],
        timed=latency["timed"],
    )
    # A plan that was given up after a part of the samples has a loss of another text than the rest.
    whole = points["samples"].isna() | (points["samples"] == points["samples"].max())
    drawable = points["x"].ge(-_LARGEST) & points["y"].between(0.0, _LARGEST, inclusive="right")
    points = points[drawable & whole]
    ends = {name: points[name].where(points[name].abs() <= _LARGEST) for name in ("x_low", "x_high", "y_low", "y_high")}
    points = points.assign(x=points["x"].where(points["x"] <= _LARGEST, np.inf), **ends)
    if points.empty:
        raise InputError("a front has at least one plan whose loss and latency are known", got=f"{len(front)} rows")
    return points


def far_edge(points: pd.DataFrame, limit: float | None) -> float:
    """Where the loss axis ends, so that one hopeless scheme does not squeeze all others into a corner."""
    farthest = float(points.loc[np.isfinite(points["x"]), "x"].max())
    if limit is None or limit <= 0:
        return farthest if farthest > 0 else 1.0  # all of them may be at zero
    return max(min(farthest, _BEYOND_BUDGET * limit), 1.2 * limit)


def _draw(axes: Axes, source: str, group: pd.DataFrame, edge: float) -> None:
    marker, colour = _STYLES.get(source, _OTHER_STYLE)
    inside = group[group["x"] <= edge]
    axes.errorbar(
        inside["x"],
        inside["y"],
        xerr=_spread(inside, "x"),
        yerr=_spread(inside, "y"),
        fmt="none",
        ecolor=colour,
        alpha=0.35,
        linewidth=1,
    )
    faces = [colour if timed else "none" for timed in group["timed"]]
    x = np.minimum(group["x"], edge)
    axes.scatter(x, group["y"], marker=marker, s=36, c=faces, edgecolors=colour, label=source)
    beyond = group[group["x"] > edge]
    axes.scatter([edge] * len(beyond), beyond["y"], marker=">", s=18, color="black")


def _spread(group: pd.DataFrame, name: str) -> Any:
    """Error bars [2, points]: distances to the interval's ends, zero where there is none."""
    middle = group[name]
    ends = [(middle - group[f"{name}_low"]), (group[f"{name}_high"] - middle)]
    return np.stack([end.replace(np.inf, 0.0).fillna(0.0).clip(lower=0.0).to_numpy(dtype=float) for end in ends])


def _draw_pareto(axes: Axes, points: pd.DataFrame, edge: float) -> None:
    line = points[points["pareto"].fillna(False).astype(bool) & (points["x"] <= edge)].sort_values("x")
    axes.step(line["x"], line["y"], where="post", color="black", linewidth=1, alpha=0.6, label="Pareto front")


def heatmap(sensitivity: pd.DataFrame, *, unit: str = "") -> Figure:
    """Where each scheme hurts: one panel per scheme, a row per kind of layer, a column per block.

    Args:
        sensitivity: columns of ``tables.SENSITIVITY``; the column ``score`` is shown on a logarithmic scale.
        unit: of the score, such as ``nats per token``.

    Raises:
        InputError: if the table is empty.
    """
    from matplotlib.colors import LogNorm

    from autoq.pictures import Picture

    scores = sensitivity[sensitivity["scheme"] != "none"]
    if scores.empty:
        raise InputError("a heatmap needs the score of at least one layer under one scheme", got="an empty table")
    places = {name: layer_place(name) for name in scores["layer"].unique()}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    depths = sorted({depth for _, depth in places.values()})
    schemes = list(dict.fromkeys(scores["scheme"]))
    positive = scores.loc[scores["score"] > 0, "score"]
    high = float(positive.max()) if not positive.empty else 1.0
    norm = LogNorm(vmin=max(float(positive.min()) if not positive.empty else high, 1e-5 * high), vmax=1.0001 * high)
    height = 0.9 + len(schemes) * (0.35 + 0.17 * len(kinds))
    figure = Picture(8.0, height, dpi=110)
    panels = figure.subplots(len(schemes), 1, sharex=True, squeeze=False)[:, 0]
    image = None
    for axes, scheme in zip(panels, schemes, strict=True):
        grid = np.full((len(kinds), len(depths)), np.nan)
        rows = scores[scores["scheme"] == scheme]
        for layer, score in zip(rows["layer"], rows["score"], strict=True):
            kind, depth = places[layer]
            grid[kinds.index(kind), depths.index(depth)] = max(score, norm.vmin or 0.0)
        image = axes.imshow(np.ma.masked_invalid(grid), aspect="auto", cmap="cividis", norm=norm)
        axes.set_facecolor("#dddddd")
        axes.set_title(scheme, fontsize=9, loc="left")
        axes.set_yticks(range(len(kinds)), short_kinds(kinds), fontsize=7)
    step = max(1, len(depths) // 16)
    panels[-1].set_xticks(range(0, len(depths), step), [str(depth) for depth in depths[::step]], fontsize=7)
    panels[-1].set_xlabel("block")
    if image is not None:
        label = f"estimated loss increase ({unit})" if unit else "estimated loss increase"
        figure.colorbar(image, ax=list(panels), label=label, shrink=min(1.0, 4.0 / height))
    return figure


def layer_place(name: str) -> tuple[str, int]:
    """A layer's kind and block: ``layers.3.mlp.up`` → (``layers.*.mlp.up``, 3); block 0 where there is no number."""
    match = re.search(r"(?:^|(?<=\.))\d+(?=\.|$)", name)
    if match is None:
        return name, 0
    return f"{name[: match.start()]}*{name[match.end() :]}", int(match[0])


def short_kinds(kinds: Sequence[str]) -> list[str]:
    """Kinds without what precedes the block's number, where that leaves them distinct."""
    ends = [kind.split("*.", 1)[-1] for kind in kinds]
    return [end if ends.count(end) == 1 else kind for kind, end in zip(kinds, ends, strict=True)]
