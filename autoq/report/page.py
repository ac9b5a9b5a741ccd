"""The report's page: its sections in order, its style, its script, and nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

from autoq._files import parse_json, shown
from autoq.errors import InputError
from autoq.explaining import Explanation, explain
from autoq.explaining_text import duration, sentence, weight
from autoq.plan_text import text_of
from autoq.report.cells import Tips, chosen_map, loss_maps, time_tables, tips_json
from autoq.report.charts import memory_chart, predicted_charts
from autoq.report.front import front_picture
from autoq.report.svg import tag, text
from autoq.report.tables import (
    Table,
    family_tables,
    is_text,
    layers_table,
    predicted_table,
    provenance_table,
    refusals_table,
    report_tables,
    uniform_table,
)
from autoq.result_files import Result
from autoq.summary import loss_row, perplexity_change, speedup

_NO_COSTS = "The costs of single layers were not recorded, so that nothing is told of them."


def page(result: Result) -> str:
    """The whole HTML file.

    Args:
        result: what ``autoq.tune`` returned, or ``result_files.read_folder``.

    Raises:
        InputError: if no plan's loss and time are known, or the plan is not one of the tuning's.
    """
    keep = Tips()
    found = None if result.costs.empty else explain(result)
    sections = [(title, content) for title, content in _sections(result, found, keep) if content]
    links = [tag("a", text(title), href=f"#{_anchor(title)}") for title, _ in sections]
    body = [_head(result), tag("nav", links)]
    body += [tag("section", tag("h2", text(title)) + content, id=_anchor(title)) for title, content in sections]
    script, style = (_source(name) for name in ("script.js", "style.css"))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>autoq report {text(result.plan.hash)}</title><link rel="icon" href="data:,">'
        f"<style>\n{style}</style></head>\n<body>\n"
        + "\n".join(body)
        + '\n<div id="tip" role="tooltip" hidden></div>\n'
        + f"{tips_json(keep)}\n<script>{script}</script>\n</body></html>\n"
    )


def _source(name: str) -> str:
    return files("autoq.report").joinpath(name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """Only this script runs, whatever a name of a layer holds; nothing is fetched."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-").replace(",", "")


def _sections(result: Result, found: Explanation | None, keep: Tips) -> Iterator[tuple[str, str]]:
    plan = result.plan
    budget, measured = plan.provenance.get("budget") or {}, plan.provenance.get("measured") or {}
    yield "Before and after", _table(report_tables(result)[0])
    yield "Trade-off", front_picture(result.front, budget) + _titled(uniform_table(result.front, budget))
    if found is None:
        yield "Why this plan", tag("p", text(_NO_COSTS))
    else:
        yield "What was chosen", chosen_map(found, keep)
        yield "Why this plan", _why(found)
        yield "Where each scheme hurts", _hurts(found, keep)
        yield "How long layers take", time_tables(found, _phases(result), _times(result))
    drawn = predicted_charts(result.front, result.sensitivity, budget)
    yield "Predicted and measured", _table(predicted_table(plan, result.front)) + drawn
    yield "Memory", "" if found is None else memory_chart(found, result.workload, measured)
    yield "Refusals", _table(refusals_table(result))
    yield "Notes", tag("ul", [tag("li", text(note)) for note in result.notes]) if result.notes else ""
    yield "Every layer", _folded("Layers and schemes", _table(layers_table(plan)))
    whole = _folded("The plan's provenance as JSON", tag("pre", text(text_of(plan.provenance))))
    yield "Provenance", _table(provenance_table(plan)) + whole


def _head(result: Result) -> str:
    plan = result.plan
    budget, measured = plan.provenance.get("budget") or {}, plan.provenance.get("measured") or {}
    device = (plan.provenance.get("device") or {}).get("name")
    lines = [f"{len(plan.layers)} layers", device, str(plan.provenance.get("created") or ""), f"plan {plan.hash}"]
    tiles = [tag("div", tag("b", text(value)) + tag("span", text(what))) for value, what in _tiles(budget, measured)]
    return (
        tag("h1", "autoq report")
        + tag("p", text(" · ".join(one for one in lines if one)), class_="soft")
        + (tag("div", tiles, class_="headline") if tiles else "")
    )


def _tiles(budget: dict[str, Any], measured: dict[str, Any]) -> Iterator[tuple[str, str]]:
    before, after = measured.get("baseline_latency_us"), measured.get("latency_us")
    if before and after:
        yield speedup(before, after), f"a request: {duration(before)} → {duration(after)}"
    delta = measured.get("loss_delta")
    if delta is not None:
        row = loss_row(measured, budget)
        nll = budget.get("metric") == "nll"
        yield perplexity_change(delta) if nll else f"{delta:+.2g}", f"{row.quantity}: {row.before} → {row.after}"
    before, after = measured.get("baseline_weight_bytes"), measured.get("weight_bytes")
    if before and after is not None:
        yield f"{after / before - 1:+.0%}", f"weights: {weight(before)} → {weight(after)}"


def _why(found: Explanation) -> str:
    intro = (
        "Differences from the plan if every layer of a part had the scheme, predicted from the measurements; losses "
        "are estimated from gradients where they were not measured."
    )
    parts = [tag("p", intro, class_="soft")]
    parts += [_titled(table) for table in family_tables(found)]
    changes = found.counterfactuals()
    if changes:
        parts.append(tag("h3", "Single changes nearest to being made"))
        parts.append(tag("ul", [tag("li", text(sentence(one, found.pricing))) for one in changes]))
    return "".join(parts)


def _hurts(found: Explanation, keep: Tips) -> str:
    drawn = loss_maps(found, keep)
    intro = "What each scheme costs on each layer; touch a cell for what it would do to the plan."
    return tag("p", intro, class_="soft") + drawn if drawn else ""


def _phases(result: Result) -> dict[str, float]:
    return {phase.name: phase.calls for phase in result.workload.phases}


def _times(result: Result) -> dict[str, dict[str, dict[str, float]]]:
    """Layer → scheme → phase → microseconds of one pass."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    frame = result.costs
    for layer, scheme, value in zip(frame["layer"], frame["scheme"], frame["phases_us"], strict=True):
        mine = found.setdefault(layer, {})
        if not isinstance(value, str):
            continue
        where = f"costs: {layer}, {scheme}"
        known = parse_json(value, InputError, what="phases_us", where=where)
        if not isinstance(known, dict) or not all(isinstance(time, int | float) for time in known.values()):
            raise InputError("phases_us is an object of phase to microseconds", where=where, got=shown(known))
        mine[scheme] = {phase: float(time) for phase, time in known.items()}
    return found


def _titled(table: Table) -> str:
    return tag("h3", text(table.title)) + _table(table) if table.rows else ""


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    note = tag("p", text(table.note), class_="soft") if table.note else ""
    head = tag("thead", tag("tr", [tag("th", text(name)) for name in table.header])) if any(table.header) else ""
    body = tag("tbody", [tag("tr", _cells(row, table.header)) for row in table.rows])
    return note + tag("div", tag("table", head + body, class_="rows"), class_="wide-table")


def _cells(row: Sequence[str], names: Sequence[str]) -> list[str]:
    return [
        tag("td", text(value), class_="text" if is_text(str(value)) else None, data_name=name)
        for value, name in zip(row, names, strict=True)
    ]


def _folded(summary: str, content: str) -> str:
    return tag("details", tag("summary", text(summary)) + content) if content else ""
