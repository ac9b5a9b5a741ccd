"""Tables of the report, as strings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from autoq.explaining_text import duration, loss_text, other_text, weight
from autoq.explaining_values import VERDICTS, Alternative
from autoq.figures import relative_latency
from autoq.result_files import Result
from autoq.scheme import NONE
from autoq.summary import UNKNOWN, SummaryRow, family, interval, perplexity_change, summary_rows

if TYPE_CHECKING:
    import pandas as pd

    from autoq.explaining import Explanation
    from autoq.plan import Plan

_SHOWN = 3  # names in a cell
_PREDICTED = (
    "Milliseconds are predicted at the speed that the machine had when single layers were timed, and it may have had "
    "another when the plan was timed. So the error is of the time relative to none on every layer; of a phase, the "
    "largest among the finalists."
)
_LONG = 40  # characters; a cell with more is a text and gets room


class Table(NamedTuple):
    """A titled table of strings.

    Attributes:
        title: heading.
        header: column names.
        rows: cells.
        note: a sentence below the heading, or empty.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def report_tables(result: Result) -> list[Table]:
    """The tables that need no explanation, the headline first; those without rows left out."""
    plan = result.plan
    budget = plan.provenance.get("budget") or {}
    headline = Table(
        "Before and after", SummaryRow._fields, summary_rows(plan), f"Budget: {budget.get('text', 'not recorded')}."
    )
    made = [headline, uniform_table(result.front, budget), predicted_table(plan, result.front), refusals_table(result)]
    return [table for table in made if table.rows]


def uniform_table(front: pd.DataFrame, budget: Mapping[str, Any]) -> Table:
    """One scheme on every layer that can take it."""
    header = ("scheme on every layer", "loss increase", "request time / unquantized", "weights, MB", "in budget")
    rows: list[list[str]] = []
    uniform = front["label"].fillna("") != ""
    if (front["label"] == "none").any():
        latency = relative_latency(front)
        for row in front.join(latency)[uniform].to_dict("records"):
            how = "measured" if row["timed"] else "predicted"
            rows.append(
                [
                    str(row["label"]),
                    _increase(row["loss_delta"], row["loss_low"], row["loss_high"], budget),
                    f"{row['latency']:.3f} ({how})",
                    f"{row['weight_bytes'] / 1e6:.1f}",
                    "yes" if row["in_budget"] else "no",
                ]
            )
    return Table("Uniform plans", header, rows, "One scheme on every layer that can take it.")


def _increase(delta: float, low: float, high: float, budget: Mapping[str, Any]) -> str:
    if delta is None or math.isnan(delta):
        return UNKNOWN
    ends = [end for end in (delta, low, high) if end is not None and not math.isnan(end)]
    if budget.get("metric") == "nll":
        texts = [perplexity_change(end) for end in ends]
        return f"{texts[0]} perplexity" + (f" [{texts[1]}, {texts[2]}]" if len(texts) == 3 else "")
    texts = [f"{end:+.3g}" for end in ends]
    return texts[0] + (f" [{texts[1]}, {texts[2]}]" if len(texts) == 3 else "")


def predicted_table(plan: Plan, front: pd.DataFrame) -> Table:
    """What was predicted of the plan, and what was measured.

    Args:
        plan: with its figures.
        front: columns of ``tables.FRONT``; has what was predicted of ``none`` on every layer.
    """
    predicted = plan.provenance.get("predicted") or {}
    measured = plan.provenance.get("measured") or {}
    errors = predicted.get("latency_error") or {}
    phases = measured.get("phases") or {}
    rows = [
        [
            f"{name}, ms a pass",
            interval(time),
            interval(phases.get(name, {}).get("time_us")),
            f"{errors[name]:.1%}" if name in errors else "",
        ]
        for name, time in sorted((predicted.get("phases") or {}).items())
    ]
    if predicted.get("latency_us") is not None:
        rows.append(["request, ms", interval(predicted["latency_us"]), interval(measured.get("latency_us")), ""])
        rows += _relative_row(predicted["latency_us"], measured, front)
    if predicted.get("loss_delta") is not None:
        loss = measured.get("loss_delta")
        rows.append(
            ["loss increase", f"{predicted['loss_delta']:+.4g}", UNKNOWN if loss is None else f"{loss:+.4g}", ""]
        )
    return Table("Predicted and measured", ("quantity", "predicted", "measured", "error"), rows, _PREDICTED)


def _relative_row(predicted_us: float, measured: Mapping[str, Any], front: pd.DataFrame) -> list[list[str]]:
    """The request's time over that with none on every layer, as predicted and as measured; nothing if not timed."""
    none = front.loc[front["label"] == str(NONE), "latency_predicted_us"].tolist()
    # Where none is the unquantized model itself, it has no time of its own.
    times = measured.get("latency_us"), measured.get("none_latency_us", measured.get("baseline_latency_us"))
    if not none or not all(one is not None and 0 < one < math.inf for one in (predicted_us, *none[:1], *times)):
        return []
    ahead, found = predicted_us / none[0], times[0] / times[1]
    error = f"{abs(ahead / found - 1):.1%}"
    return [["request, relative to none on every layer", f"{ahead:.3f}", f"{found:.3f}", error]]


def refusals_table(result: Result) -> Table:
    """What was left alone or refused, one row per reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for layer in result.workload.layers:
        if layer.reason is not None:
            found.setdefault(("every scheme", layer.reason), []).append(layer.name)
    for kind, one in result.plan.provenance.get("model", {}).get("left_alone", {}).items():
        found.setdefault(("every scheme", other_text(kind, one)), []).append("weights that no plan can quantize")
    for row in result.measurements[result.measurements["status"] != "ok"].to_dict("records"):
        shape = f"M={row['m']} K={row['k']} N={row['n']} {row['dtype']}"
        found.setdefault((str(row["scheme"]), f"{row['status']}: {row['reason']}"), []).append(shape)
    rows = [[_some(names), scheme, reason] for (scheme, reason), names in found.items()]
    return Table("Refusals", ("layers or shapes", "scheme", "reason"), rows, "What was left alone or refused, and why.")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def family_tables(found: Explanation) -> list[Table]:
    """Part by part of the model, what one scheme on all its layers would do."""
    header = ("scheme", "time a request", f"loss, {found.pricing.unit} [95 %]", "weights", "")
    made = []
    for part in found.families:
        schemes = ", ".join(f"{scheme} ×{count}" for scheme, count in part.schemes.items())
        title = f"{part.name}, {part.layers} layer{'s' if part.layers > 1 else ''}: {schemes}"
        made.append(Table(title, header, [_alternative(one) for one in part.alternatives]))
    return made


def _alternative(one: Alternative) -> list[str]:
    if one.change is None:
        return [one.scheme, "", "", "", f"refused {one.refused}"]
    change = one.change
    note = "as it is" if not change.layers else f"over: {change.over}" if change.over else VERDICTS[one.verdict]
    return [
        one.scheme,
        duration(change.time_us, sign=True),
        loss_text(change),
        weight(change.weight_bytes, sign=True),
        f"{note}; refused {one.refused}" if one.refused else note,
    ]


def layers_table(plan: Plan) -> Table:
    """Every layer with its scheme."""
    rows = [[layer, family(layer), str(scheme)] for layer, scheme in sorted(plan.layers.items(), key=_order)]
    return Table("Every layer", ("layer", "family", "scheme"), rows)


def _order(pair: tuple[str, object]) -> list[tuple[int, str]]:
    """Blocks in the order of their numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in pair[0].split(".")]


def provenance_table(plan: Plan) -> Table:
    """Where the plan comes from, the facts that people ask for."""
    known = plan.provenance
    device, model = known.get("device") or {}, known.get("model") or {}
    facts = {
        "plan": plan.hash,
        "created": known.get("created"),
        "autoq": known.get("autoq"),
        "budget": (known.get("budget") or {}).get("text"),
        "model": " ".join(str(model[name]) for name in ("class", "weights") if name in model),
        **{f"device: {name}": value for name, value in device.items()},
        **{f"version: {name}": value for name, value in (known.get("versions") or {}).items()},
        "seed": known.get("seed"),
        "study": known.get("study"),
        "times predicted from": (known.get("profile_from") or {}).get("device"),
        "remeasured": (known.get("remeasured") or {}).get("created"),
        "edited": "yes; the figures of the plan as it was are dropped" if known.get("edited") else None,
        "retargeted": "yes; its figures are predictions" if known.get("retargeted") else None,
    }
    rows = [[name, str(value)] for name, value in facts.items() if value not in (None, "")]
    return Table("Provenance", ("", ""), rows)


def is_text(cell: str) -> bool:
    """Whether a cell is prose that wants room, rather than a figure."""
    return len(cell) > _LONG
