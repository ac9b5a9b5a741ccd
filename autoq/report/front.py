"""The measured trade-off as a picture: a mark per plan, with what is behind it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from autoq.explaining_text import weight
from autoq.figures import LossAxis, far_edge, front_points, loss_axis
from autoq.placement import Box, Label, around, placed
from autoq.pricing import assignment_of
from autoq.report.svg import Frame, figure, picture, tag, text, wide
from autoq.summary import FAMILIES, family

if TYPE_CHECKING:
    import pandas as pd

_SIZES = (("wide", 720.0, 430.0, 12.0), ("narrow", 358.0, 400.0, 11.0))  # class, width, height, font size
_KINDS = {
    "uniform": "uniform plan",
    "frontier": "from the knapsack",
    "optuna": "from Optuna",
    "local": "one or two changes away",
}
_SHAPES = {"uniform": "square", "frontier": "circle", "optuna": "up", "local": "down"}
_RADIUS, _RING = 5.0, 10.0
_FAR = 2.5  # times as far from the fastest as the second slowest: the slowest is drawn at the edge
_MARGIN = 0.06  # of the axes, beyond the outermost points


def front_picture(front: pd.DataFrame, budget: Mapping[str, Any]) -> str:
    """The front for wide and for narrow screens, with its legend.

    Args:
        front: columns of ``tables.FRONT``.
        budget: the plan's ``provenance["budget"]``.

    Raises:
        InputError: if no plan's loss and latency are known, or the unquantized model is not among them.
    """
    axis = loss_axis(budget)
    points = front_points(front, axis)
    limit = budget.get("max_increase")
    shown = None if limit is None else float(axis.values(limit))
    made = [_drawn(points, axis, shown, *size) for size in _SIZES]
    caption = (
        "Each mark is a plan whose loss was measured on all samples; touch it for what it is. Filled marks were timed "
        "end to end, hollow ones are predicted. Bars: 95 % interval of the loss, 10 to 90 % quantiles of the time. "
        "The ring is the plan that was chosen, the dashed line the budget. Marks with an arrow lie beyond the edge."
    )
    return figure([_legend(points), *made], caption)


def _legend(points: pd.DataFrame) -> str:
    names = [one for one in dict.fromkeys(points["source"]) if one]
    items = [
        tag("span", [picture(14, 14, [_mark(str(one), 7, 7, filled=True)], "", "key"), text(_KINDS.get(one, one))])
        for one in names
    ]
    return tag("p", items, class_="legend")


def _drawn(points: pd.DataFrame, axis: LossAxis, limit: float | None, class_: str, *size: float) -> str:
    width, height, font = size
    edge = far_edge(points, limit)
    left = min(0.0, float(points["x"].min()))
    points, low, high = _within(points)
    room_x, room_y = _MARGIN * (edge - left), _MARGIN * (high - low or 1.0)
    frame = Frame(
        width=width, height=height, x=(left - room_x, edge + room_x), y=(max(0.0, low - 2 * room_y), high + 2 * room_y)
    )
    rows: list[dict[str, Any]] = points.to_dict("records")  # type: ignore[assignment]  # columns have names
    content = [frame.axes(axis.label, "request time / unquantized (lower is faster)")]
    if limit is not None:
        at, (_, top, _, bottom) = frame.across(limit), frame.area
        content.append(tag("line", x1=at, x2=at, y1=top, y2=bottom, class_="budget"))
    content.append(_front_line(points, frame, edge))
    content += [_bars(row, frame, edge) for row in rows]
    content += [_plan(row, frame, edge, axis) for row in rows]
    content += _names(rows, frame, edge, axis, font)
    return picture(width, height, content, "request time against loss increase", f"chart {class_}")


def _within(points: pd.DataFrame) -> tuple[pd.DataFrame, float, float]:
    """The points with the slowest at the upper edge where they would squeeze all others together, and both ends."""
    times = points["y"].sort_values(ascending=False)
    low, high = (float(np.nanmin(points[["y", "y_low"]])), float(np.nanmax(points[["y", "y_high"]])))
    second = float(times.iloc[1]) if len(times) > 1 else high
    if high - low > _FAR * (second - low) > 0:
        high = low + 1.25 * (second - low)
    late = points["y"] > high
    cut = {name: points[name].where(~late) for name in ("y_low", "y_high")}
    return points.assign(time=points["y"], y=points["y"].clip(upper=high), late=late, **cut), low, high


def _place(row: Mapping[str, Any], frame: Frame, edge: float) -> tuple[float, float]:
    return frame.across(min(row["x"], edge)), frame.up(row["y"])


def _front_line(points: pd.DataFrame, frame: Frame, edge: float) -> str:
    line = points[points["pareto"].fillna(False).astype(bool) & (points["x"] <= edge)].sort_values("x")
    steps: list[str] = []
    before: float | None = None
    for x, y in zip(line["x"], line["y"], strict=True):
        at = f"{frame.across(x):.1f}"
        steps += [f"{at},{before:.1f}"] if before is not None else []
        before = frame.up(y)
        steps.append(f"{at},{before:.1f}")
    return tag("polyline", points=" ".join(steps), class_="pareto") if steps else ""


def _bars(row: Mapping[str, Any], frame: Frame, edge: float) -> str:
    if row["x"] > edge:
        return ""
    x, y = _place(row, frame, edge)
    parts = []
    low, high = row["x_low"], min(row["x_high"], edge)
    if math.isfinite(low) and math.isfinite(high):
        parts.append(tag("line", x1=frame.across(max(low, frame.x[0])), x2=frame.across(high), y1=y, y2=y))
    if math.isfinite(row["y_low"]) and math.isfinite(row["y_high"]):
        parts.append(tag("line", x1=x, x2=x, y1=frame.up(row["y_low"]), y2=frame.up(row["y_high"])))
    return tag("g", parts, class_=f"bar {_SHAPES.get(row['source'], 'other')}") if parts else ""


def _plan(row: Mapping[str, Any], frame: Frame, edge: float, axis: LossAxis) -> str:
    x, y = _place(row, frame, edge)
    parts = [_mark(str(row["source"]), x, y, filled=bool(row["timed"]))]
    if row["x"] > edge:
        parts.append(tag("path", d=f"M{x + 7:.1f} {y - 4:.1f}l5 4l-5 4z", class_="beyond"))
    if row["late"]:
        parts.append(tag("path", d=f"M{x - 4:.1f} {y - 7:.1f}l4 -5l4 5z", class_="beyond"))
    if row["chosen"] is True:
        parts.append(tag("circle", cx=x, cy=y, r=_RING, class_="ring"))
    # What the finger has to meet is larger than the mark.
    parts.append(tag("circle", cx=x, cy=y, r=12, class_="touch"))
    return tag("g", parts, data_tip="\n".join(_facts(row, axis)), tabindex=0, role="img", aria_label=_name(row))


def _mark(source: str, x: float, y: float, *, filled: bool) -> str:
    """Shapes differ as well as colours."""
    shape, r = _SHAPES.get(source, "other"), _RADIUS
    class_ = f"mark {shape}" + ("" if filled else " hollow")
    if shape == "circle":
        return tag("circle", cx=x, cy=y, r=r, class_=class_)
    paths = {
        "square": f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        "up": f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {2 * r}h{-2 * r - 2}z",
        "down": f"M{x:.1f} {y + r + 1:.1f}l{r + 1} {-2 * r}h{-2 * r - 2}z",
        "other": f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l{-r - 1} {r + 1}l{-r - 1} {-r - 1}z",
    }
    return tag("path", d=paths[shape], class_=class_)


def _name(row: Mapping[str, Any]) -> str:
    label = row["label"] or ""
    kind = _KINDS.get(row["source"], str(row["source"])) or "a plan"
    chosen = "chosen plan, " if row["chosen"] is True else ""
    return f"{chosen}{f'{label} on every layer' if label and label != 'unquantized' else label or kind}"


def _label(row: Mapping[str, Any], edge: float, axis: LossAxis) -> str:
    """A uniform plan's name, with what the edge cuts off."""
    cut = [axis.text(row["loss_delta"])] if row["x"] > edge else []
    cut += [f"{row['time']:.2f} ×"] if row["late"] else []
    return f"{row['label']} ({', '.join(cut)})" if cut else str(row["label"])


def _facts(row: Mapping[str, Any], axis: LossAxis) -> Iterator[str]:
    """What is behind a mark, line by line."""
    yield _name(row)
    ends = [row[name] for name in ("loss_low", "loss_high")]
    spread = f" [{', '.join(map(axis.text, ends))}]" if all(map(math.isfinite, ends)) else ""
    what = "perplexity" if axis.percent else "loss"
    yield f"{what} {axis.text(row['loss_delta'])}{spread}"
    yield f"request {row['time']:.3f} × the unquantized model's time ({'measured' if row['timed'] else 'predicted'})"
    if row["weight_bytes"] is not None and math.isfinite(row["weight_bytes"]):
        yield f"weights {weight(row['weight_bytes'])}"
    yield "within the budget" if row["in_budget"] else "over the budget"
    schemes = assignment_of(row)
    for part in FAMILIES:
        counts = Counter(scheme for layer, scheme in schemes.items() if family(layer) == part)
        if counts and not row["label"]:
            yield f"{part}: {', '.join(f'{scheme} ×{count}' for scheme, count in counts.most_common())}"


def _names(rows: list[dict[str, Any]], frame: Frame, edge: float, axis: LossAxis, font: float) -> Iterator[str]:
    """Names of the uniform plans, clear of each other and of the marks."""
    marks = [around(*_place(row, frame, edge), _RING if row["chosen"] is True else _RADIUS) for row in rows]
    named = [row for row in rows if row["label"]]
    texts = [_label(row, edge, axis) for row in named]
    labels = []
    for row, name in zip(named, texts, strict=True):
        free = (_RING if row["chosen"] is True else _RADIUS) + 5
        labels.append(Label(*_place(row, frame, edge), wide(name, font), font, free + (8 if row["x"] > edge else 0)))
    left, top, right, bottom = frame.area
    for box, name in zip(placed(labels, marks, Box(left, top, right, bottom)), texts, strict=True):
        yield tag("text", text(name), x=box.left, y=box.high - 0.2 * font, class_="name", font_size=font)
