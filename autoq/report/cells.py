"""Pictures of every layer: what was chosen, what each scheme costs in loss, and how long each takes.

Cells of one colour are one path, and what a cell says on touch lies beside the picture as data: a model of a thousand
layers stays a small file.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autoq.explaining_text import duration, loss_text, weight
from autoq.explaining_values import VERDICTS, Choice
from autoq.figures import layer_place, short_kinds
from autoq.report.svg import picture, tag, text, wide
from autoq.scheme import NONE

if TYPE_CHECKING:
    from autoq.explaining import Explanation

STEPS = 16  # colours of a scale
_WIDTH, _FONT = 340.0, 10.0
_CELL, _WIDEST = 13.0, 34.0
_COLOURS = 8  # of categories; letters tell apart what has one colour, or is printed without
_LETTERS, _ROOM = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", 6.5  # the narrowest cell that holds one
_REFUSED = "refused"
_SPAN = 1e-4  # of the largest loss; what is below has the colour of none
Times = Mapping[str, Mapping[str, Mapping[str, float]]]  # layer, scheme, phase → microseconds of one pass


@dataclass
class Tips:
    """What cells say on touch, by panel; the page keeps it as JSON."""

    panels: list[dict[str, Any]] = field(default_factory=list)

    def add(self, panel: dict[str, Any]) -> int:
        """Keep a panel's; returns its number."""
        self.panels.append(panel)
        return len(self.panels) - 1


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where each layer lies: a row per kind of layer, a column per block.

    Attributes:
        kinds: names of the rows.
        blocks: numbers of the columns.
        places: layer → (row, column).
    """

    kinds: tuple[str, ...]
    blocks: tuple[int, ...]
    places: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, layers: Iterable[str]) -> Grid:
        """The grid of layers with these names."""
        found = {layer: layer_place(layer) for layer in layers}
        kinds = list(dict.fromkeys(kind for kind, _ in found.values()))
        blocks = sorted({block for _, block in found.values()})
        places = {layer: (kinds.index(kind), blocks.index(block)) for layer, (kind, block) in found.items()}
        return cls(kinds=tuple(short_kinds(kinds)), blocks=tuple(blocks), places=places)

    def panel(
        self,
        title: str,
        classes: Mapping[str, str],
        tips: Mapping[str, str],
        keep: Tips,
        *,
        letters: Mapping[str, str] | None = None,
    ) -> str:
        """One picture: a cell per layer.

        Args:
            title: above it.
            classes: layer → class of its cell.
            tips: layer → what the cell says on touch.
            keep: where the tips go.
            letters: layer → what is written into its cell, where there is room.
        """
        left = 8 + max(wide(kind, _FONT) for kind in self.kinds)
        left = min(left, 0.55 * _WIDTH)
        across = min(_WIDEST, (_WIDTH - left - 4) / len(self.blocks))
        top, bottom = 6.0, 18.0
        height = top + _CELL * len(self.kinds) + bottom
        by_class: dict[str, list[str]] = {}
        for layer, (row, column) in self.places.items():
            x, y = left + column * across, top + row * _CELL
            path = f"M{x:.1f} {y:.1f}h{across - 0.6:.1f}v{_CELL - 0.8:.1f}h{0.6 - across:.1f}z"
            by_class.setdefault(classes[layer], []).append(path)
        content = [tag("path", d="".join(paths), class_=class_) for class_, paths in sorted(by_class.items())]
        for layer, letter in (letters or {}).items() if across >= _ROOM else ():
            row, column = self.places[layer]
            x, y = left + across * (column + 0.5) - 0.3, top + _CELL * (row + 0.7)
            content.append(tag("text", text(letter), x=x, y=y, class_=f"letter on-{classes[layer]}"))
        for row, kind in enumerate(self.kinds):
            content.append(
                tag("text", text(_cut(kind, left)), x=left - 5, y=top + _CELL * (row + 0.75), text_anchor="end")
            )
        if len(self.blocks) > 1:
            content.append(tag("text", "block", x=left - 5, y=height - 6, text_anchor="end", class_="label"))
        step = max(1, math.ceil(len(self.blocks) * wide("000", _FONT) / (_WIDTH - left)))
        for column in range(0, len(self.blocks), step) if len(self.blocks) > 1 else ():
            x = left + across * (column + 0.5)
            content.append(tag("text", text(self.blocks[column]), x=x, y=height - 6, text_anchor="middle"))
        says = [[""] * len(self.blocks) for _ in self.kinds]
        for layer, (row, column) in self.places.items():
            says[row][column] = tips[layer]
        number = keep.add({"x": round(left, 1), "y": top, "w": round(across, 3), "h": _CELL, "t": says})
        drawn = picture(_WIDTH, height, content, title, "cells")
        return tag("div", [tag("h3", text(title)), drawn], class_="panel", data_panel=number)


def _cut(kind: str, room: float) -> str:
    most = max(4, int((room - 6) / wide("0", _FONT)))
    return kind if len(kind) <= most else f"…{kind[-most + 1 :]}"


def chosen_map(found: Explanation, keep: Tips) -> str:
    """Which layer has which scheme, with its legend."""
    grid = Grid.of(layer for one in found.choices for layer in one.layers)
    schemes = list(dict.fromkeys(one.scheme for one in sorted(found.choices, key=lambda one: one.scheme)))
    schemes.sort(key=lambda one: one == str(NONE))
    classes = {one: "none" if one == str(NONE) else f"c{index % _COLOURS}" for index, one in enumerate(schemes)}
    letters = {one: "" if one == str(NONE) else _LETTERS[i % len(_LETTERS)] for i, one in enumerate(schemes)}
    tips = {layer: _chosen_tip(one, layer, found) for one in found.choices for layer in one.layers}
    panel = grid.panel(
        "Scheme by kind of layer and block",
        {layer: classes[one.scheme] for one in found.choices for layer in one.layers},
        tips,
        keep,
        letters={layer: letters[one.scheme] for one in found.choices for layer in one.layers},
    )
    counts = Counter(one.scheme for one in found.choices for _ in one.layers)
    items = [
        tag("span", [tag("i", letters[one], class_=f"swatch {classes[one]}"), text(f"{one} ×{counts[one]}")])
        for one in schemes
    ]
    return tag("p", items, class_="legend") + tag("div", panel, class_="panels one")


def _chosen_tip(one: Choice, layer: str, found: Explanation) -> str:
    how = "measured" if one.measured else "estimated"
    lines = [layer, one.scheme, f"{duration(one.time_us)} of a request, {weight(one.weight_bytes)}"]
    if len(one.layers) > 1:
        lines.insert(1, f"decided together with {len(one.layers) - 1} others")
    if one.loss:
        lines.append(f"adds {one.loss:.2g} [{one.loss_low:.2g}, {one.loss_high:.2g}] {found.pricing.unit}, {how}")
    return "\n".join(lines)


def loss_maps(found: Explanation, keep: Tips) -> str:
    """What each scheme costs each layer in loss: one panel per scheme, all on one logarithmic scale."""
    pricing = found.pricing
    grid = Grid.of(pricing.costs)
    tips_of = {layer: one for one in found.choices for layer in one.layers}
    schemes = _others(found)
    losses = [
        cost.loss for of in pricing.costs.values() for name, cost in of.items() if not cost.reason and cost.loss > 0
    ]
    if not schemes or not losses:
        return ""
    high = max(losses)
    low = max(min(losses), _SPAN * high)
    panels = []
    for scheme in schemes:
        classes, tips = {}, {}
        for layer, of in pricing.costs.items():
            cost = of.get(scheme)
            refused = cost is None or bool(cost.reason)
            classes[layer] = _REFUSED if cost is None or refused else f"v{_step(cost.loss, low, high)}"
            tips[layer] = _loss_tip(tips_of[layer], layer, scheme)
        panels.append(grid.panel(scheme, classes, tips, keep))
    back = pricing.scale.back
    legend = scale(f"{back(low):.1g}", f"{back(high):.1g}", f"loss increase ({pricing.unit}) of one layer, logarithmic")
    return legend + tag("div", panels, class_="panels")


def _others(found: Explanation) -> list[str]:
    """Every scheme but ``none``."""
    return [one for one in found.pricing.schemes if one != str(NONE)]


def _step(value: float, low: float, high: float) -> int:
    """The colour of a value on a logarithmic scale."""
    if value <= low or high <= low:
        return 0
    return min(STEPS - 1, int(STEPS * math.log(value / low) / math.log(high / low)))


def _loss_tip(choice: Choice, layer: str, scheme: str) -> str:
    lines = [layer, scheme]
    if len(choice.layers) > 1:
        lines.append(f"with the {len(choice.layers) - 1} decided together")
    if choice.scheme == scheme:
        return "\n".join([*lines, "chosen"])
    other = next((one for one in choice.alternatives if one.scheme == scheme), None)
    if other is None or other.change is None:
        return "\n".join([*lines, f"refused: {other.refused if other else 'not a candidate'}"])
    change = other.change
    lines.append(f"instead: {duration(change.time_us, sign=True)} a request, {weight(change.weight_bytes, sign=True)}")
    lines.append(f"loss {loss_text(change)}{', measured' if change.measured else ''}")
    lines.append(change.over or VERDICTS[other.verdict])
    return "\n".join(lines)


def scale(low: str, high: str, label: str) -> str:
    """The legend of a colour scale."""
    ramp = tag("span", [tag("i", class_=f"v{one}") for one in range(STEPS)], class_="ramp")
    refused = tag("span", [tag("i", class_="swatch refused"), _REFUSED])
    content = [tag("span", text(low)), ramp, tag("span", text(high)), tag("span", text(label)), refused]
    return tag("p", content, class_="legend")


def time_tables(found: Explanation, phases: Mapping[str, float], times: Times) -> str:
    """How long each kind of layer takes under each scheme, one table per phase.

    Layers of one kind whose times are equal are one row.

    Args:
        found: whose layers and schemes.
        phases: phase → passes per request.
        times: layer → scheme → phase → microseconds of one pass.
    """
    grid = Grid.of(found.pricing.costs)
    schemes = _others(found)
    made = []
    for phase, calls in phases.items():
        rows = _kinds_by_time(grid, phase, times)
        ratios = [r for _, layer, _ in rows for s in schemes if (r := _ratio(times, layer, s, phase)) is not None]
        if not ratios:
            continue
        low, high = min(ratios), max(ratios)
        head = ["layers", "unquantized", *schemes]
        body = [_time_row(found, times, phase, row, (low, high)) for row in rows]
        table = tag(
            "table",
            [
                tag("thead", tag("tr", [tag("th", _breakable(one)) for one in head])),
                tag("tbody", [tag("tr", cells) for cells in body]),
            ],
            class_="heat",
        )
        legend = scale(f"{low:.2f} ×", f"{high:.2f} ×", "time / that of the layer unquantized, logarithmic")
        title = tag("h3", text(f"{phase}, {calls:g} {'passes' if calls != 1 else 'pass'} a request"))
        made.append(tag("div", title + legend + tag("div", table, class_="wide-table")))
    return "".join(made)


def _kinds_by_time(grid: Grid, phase: str, times: Times) -> list[tuple[str, str, int]]:
    """Kind, one of its layers, and how many layers of the kind have the same times."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for layer, (row, _) in grid.places.items():
        mine = tuple(sorted((scheme, f"{of.get(phase, 0.0):.6g}") for scheme, of in times[layer].items()))
        groups.setdefault((row, mine), []).append(layer)
    return [(grid.kinds[key[0]], layers[0], len(layers)) for key, layers in groups.items()]


def _ratio(times: Times, layer: str, scheme: str, phase: str) -> float | None:
    here, none = (times[layer].get(one, {}).get(phase, 0.0) for one in (scheme, str(NONE)))
    return here / none if here > 0 and none > 0 else None


def _time_row(
    found: Explanation, times: Times, phase: str, row: tuple[str, str, int], ends: tuple[float, float]
) -> list[str]:
    kind, layer, count = row
    none = found.pricing.request.drift * times[layer].get(str(NONE), {}).get(phase, 0.0)
    cells = [tag("th", text(f"{kind} ×{count}" if count > 1 else kind), scope="row"), tag("td", text(duration(none)))]
    for scheme in _others(found):
        ratio = _ratio(times, layer, scheme, phase)
        if ratio is None:
            cost = found.pricing.costs[layer].get(scheme)
            reason = cost.reason if cost is not None and cost.reason else "not measured"
            cells.append(tag("td", "×", class_=_REFUSED, data_tip=f"{kind}\n{scheme}\nrefused: {reason}", tabindex=0))
            continue
        tip = f"{kind}\n{scheme}\n{duration(ratio * none)} a pass, unquantized {duration(none)}"
        cells.append(tag("td", f"{ratio:.2f}", class_=f"v{_step(ratio, *ends)}", data_tip=tip))
    return cells


def _breakable(scheme: str) -> str:
    """A scheme's name that may break where it has punctuation."""
    return text(scheme).replace("(", "<wbr>(").replace(",", ",<wbr>").replace("=", "=<wbr>")


def tips_json(keep: Tips) -> str:
    """The tips as a script that is data; no markup can end it early."""
    data = json.dumps(keep.panels, ensure_ascii=False, separators=(",", ":"))
    safe = data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return f'<script type="application/json" id="tips">{safe}</script>'
