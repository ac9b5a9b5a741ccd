"""Predicted against measured, and where the memory goes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from autoq.explaining_text import weight
from autoq.figures import LossAxis, far_edge, loss_axis, relative_latency
from autoq.report.svg import Frame, figure, picture, tag, text
from autoq.scheme import NONE
from autoq.summary import FAMILIES, family

if TYPE_CHECKING:
    import pandas as pd

    from autoq.explaining import Explanation
    from autoq.workload import Workload

_WIDTH, _HEIGHT = 340.0, 300.0
_LARGEST = 1e9  # that is drawn
_DECADES = 5  # of a logarithmic chart, from its largest value down
_BARS_WIDTH, _BAR = 420.0, 22.0


class _Point(NamedTuple):
    predicted: float
    measured: float
    low: float
    high: float
    tip: str


def predicted_charts(front: pd.DataFrame, sensitivity: pd.DataFrame, budget: Mapping[str, Any]) -> str:
    """Three pictures as far as there is something to show: plans' losses, plans' times, and single layers' losses.

    Args:
        front: columns of ``tables.FRONT``.
        sensitivity: columns of ``tables.SENSITIVITY``.
        budget: the plan's ``provenance["budget"]``.
    """
    axis = loss_axis(budget)
    limit = budget.get("max_increase")
    edge = None if limit is None else float(axis.values(limit))
    unit = "%" if axis.percent else str(budget.get("unit", ""))
    drawn = [
        _square(list(_plan_losses(front, axis, edge)), "Loss of plans", f"loss increase, {unit}"),
        _square(list(_plan_times(front)), "Request time of plans", "time / unquantized"),
        _square(list(_pairs(sensitivity)), "Loss of single layers", f"loss, {budget.get('unit', '')}", log=True),
    ]
    caption = (
        "On the line, the prediction was right. Losses of plans: as predicted before each was measured; those far "
        "beyond the budget are left out. Single layers: the score from gradients against the loss measured with that "
        "layer alone quantized, which corrects the scores of all others. Bars: 95 % intervals, of times 10 to 90 %."
    )
    drawn = [one for one in drawn if one]
    return figure([tag("div", drawn, class_="panels")], caption) if drawn else ""


def _plan_losses(front: pd.DataFrame, axis: LossAxis, limit: float | None) -> Iterator[_Point]:
    whole = front["samples"].isna() | (front["samples"] == front["samples"].max())
    rows = front[whole & front["loss_predicted"].notna() & front["loss_delta"].notna()]
    shown = rows.assign(x=axis.values(rows["loss_delta"]))
    edge = far_edge(shown, limit) if len(shown) else 0.0
    for row in shown.to_dict("records"):
        names = ("loss_predicted", "loss_delta", "loss_low", "loss_high")
        predicted, measured, low, high = (float(axis.values(row[one])) for one in names)
        if measured <= edge and predicted <= edge:
            name = row["label"] or row["source"]
            tip = f"{name}\npredicted {axis.text(row['loss_predicted'])}\nmeasured {axis.text(row['loss_delta'])}"
            yield _Point(predicted, measured, low, high, tip)


def _plan_times(front: pd.DataFrame) -> Iterator[_Point]:
    latency = relative_latency(front)
    base = front["label"] == ("unquantized" if "unquantized" in set(front["label"]) else str(NONE))
    predicted = front["latency_predicted_us"] / front.loc[base, "latency_predicted_us"].iloc[0]
    rows = front.assign(y=latency["latency"], low=latency["low"], high=latency["high"], p=predicted)[latency["timed"]]
    for row in rows.to_dict("records"):
        tip = f"{row['label'] or row['source']}\npredicted {row['p']:.3f} ×\nmeasured {row['y']:.3f} ×"
        yield _Point(row["p"], row["y"], row["low"], row["high"], tip)


def _pairs(sensitivity: pd.DataFrame) -> Iterator[_Point]:
    rows = sensitivity[sensitivity["measured"].notna() & (sensitivity["measured"] > 0) & (sensitivity["score"] > 0)]
    for row in rows.to_dict("records"):
        tip = f"{row['layer']}\n{row['scheme']}\nscore {row['score']:.2g}\nmeasured {row['measured']:.2g}"
        yield _Point(row["score"], row["measured"], row["measured_low"], row["measured_high"], tip)


def _square(points: Sequence[_Point], title: str, unit: str, *, log: bool = False) -> str:
    """Measured over predicted, with the line on which they are equal; nothing for fewer than two points."""
    points = [one for one in points if max(abs(one.predicted), abs(one.measured)) < _LARGEST]  # NaN is not
    if len(points) < 2:
        return ""
    values = [value for one in points for value in (one.predicted, one.measured)]
    low, high = min(values), max(values)
    if log:
        low = max(low, high / 10**_DECADES)
        ends = (low / 1.5, high * 1.5)
    else:
        room = 0.06 * (high - low) or 1.0
        ends = (low - room, high + room)
    frame = Frame(width=_WIDTH, height=_HEIGHT, x=ends, y=ends, log=log)
    left, top, right, bottom = frame.area
    content = [frame.axes(f"predicted ({unit})", f"measured ({unit})")]
    content.append(tag("line", x1=left, y1=bottom, x2=right, y2=top, class_="equal"))
    for one in points:
        x, y = frame.across(max(one.predicted, ends[0])), frame.up(max(one.measured, ends[0]))
        parts = []
        if math.isfinite(one.low) and math.isfinite(one.high):
            inside = [min(max(end, ends[0]), ends[1]) for end in (one.low, one.high)]
            parts.append(tag("line", x1=x, x2=x, y1=frame.up(inside[0]), y2=frame.up(inside[1])))
        parts.append(tag("circle", cx=x, cy=y, r=4.0, class_="mark circle"))
        parts.append(tag("circle", cx=x, cy=y, r=9.0, class_="touch"))
        content.append(tag("g", parts, class_="bar circle", data_tip=one.tip, tabindex=0, role="img"))
    return tag("div", tag("h3", text(title)) + picture(_WIDTH, _HEIGHT, content, title), class_="panel")


def memory_chart(found: Explanation, workload: Workload, measured: Mapping[str, Any]) -> str:
    """Bytes of weights by part of the model, before and after.

    Args:
        found: whose layers and schemes.
        workload: the layers as they are without the plan.
        measured: the plan's ``provenance["measured"]``, for the bytes of what no decision changes.
    """
    parts = _parts(found, workload, measured)
    totals = [sum(one) for one in parts.values()]
    before, after = (sum(one[side] for one in parts.values()) for side in (0, 1))
    longest = max(before, after)
    if not totals or longest <= 0:
        return ""
    left, top = 78.0, 4.0
    room = _BARS_WIDTH - left - 56
    content = []
    for row, (name, total) in enumerate((("unquantized", before), ("plan", after))):
        y, x = top + row * (_BAR + 8), left
        content.append(tag("text", text(name), x=left - 6, y=y + _BAR / 2 + 4, text_anchor="end"))
        for index, (part, sizes) in enumerate(parts.items()):
            wide = room * sizes[row] / longest
            share = f"{part}\n{weight(sizes[row])}, {sizes[row] / (total or 1.0):.0%} of {weight(total)}"
            content.append(
                tag("rect", x=x, y=y, width=wide, height=_BAR, class_=f"part p{index}", data_tip=share, tabindex=0)
            )
            x += wide
        content.append(tag("text", text(weight(total)), x=x + 6, y=y + _BAR / 2 + 4))
    items = [tag("span", [tag("i", class_=f"swatch p{i}"), text(part)]) for i, part in enumerate(parts)]
    drawn = picture(_BARS_WIDTH, 2 * _BAR + 16, content, "bytes of weights before and after", "bars")
    rows = [
        tag("tr", [tag("th", text(part), scope="row"), *(tag("td", text(weight(size))) for size in sizes)])
        for part, sizes in parts.items()
    ]
    head = tag("tr", [tag("th", text(one)) for one in ("weights", "unquantized", "plan")])
    table = tag("table", [tag("thead", head), tag("tbody", rows)])
    return figure([tag("p", items, class_="legend"), drawn, tag("div", table, class_="wide-table")], _MEMORY)


_MEMORY = (
    "Bytes of weights as they are held once the plan is applied, scales included. What no decision changes: "
    "embeddings, norms, convolutions and layers left alone. A layer that shares its weight with an embedding takes "
    "none of its own until a scheme packs it."
)


def _parts(found: Explanation, workload: Workload, measured: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Part of the model → bytes before and after, parts without any left out."""
    costs, chosen = found.pricing.costs, found.pricing.chosen
    sums = {name: [0.0, 0.0] for name in FAMILIES}
    for layer in workload.layers:
        if layer.name not in costs:
            continue
        mine = sums[family(layer.name)]
        stock = 0 if layer.tied_to else layer.n * layer.k * _bits(layer.dtype) // 8
        mine[0] += stock
        # A plan without layers is the unquantized model itself, not none on every layer in autoq's kernels.
        mine[1] += costs[layer.name][chosen[layer.name]].weight_bytes if found.plan.layers else stock
    names = ("baseline_weight_bytes", "weight_bytes")
    totals = [measured[name] for name in names if measured.get(name) is not None]
    if len(totals) == len(names):
        rest = [total - sum(one[side] for one in sums.values()) for side, total in enumerate(totals)]
        sums["unchanged"] = [max(0.0, one) for one in rest]
    return {name: (before, after) for name, (before, after) in sums.items() if before or after}


def _bits(dtype: str) -> int:
    """Of an element: the first number in its type's name."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 0
