"""What was found, for people: the table of a plan, the figures, and one self-contained HTML report."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pyarrow as pa

from autoq import tables
from autoq._files import write_atomic
from autoq.errors import InputError
from autoq.figures import front_figure, heatmap, relative_latency
from autoq.plan_text import text_of
from autoq.summary import UNKNOWN, SummaryRow, family, interval, perplexity_change, summary_rows

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from autoq.plan import Plan
    from autoq.workload import Workload

__all__ = ["Result", "SummaryRow", "family", "front_figure", "heatmap", "summary_rows", "write_files", "write_report"]


class Result(Protocol):
    """What a report is made of; ``autoq.tune`` returns one."""

    @property
    def plan(self) -> Plan:
        """The chosen plan with its provenance."""

    @property
    def workload(self) -> Workload:
        """What was recorded."""

    @property
    def notes(self) -> Sequence[str]:
        """What autoq decided by itself, in sentences."""

    @property
    def front(self) -> pd.DataFrame:
        """Columns of ``tables.FRONT``."""

    @property
    def measurements(self) -> pd.DataFrame:
        """Columns of ``tables.MEASUREMENTS``."""

    @property
    def sensitivity(self) -> pd.DataFrame:
        """Columns of ``tables.SENSITIVITY``."""


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
    """Every table of the report, the headline first."""
    plan = result.plan
    budget = plan.provenance.get("budget") or {}
    headline = Table(
        "Before and after", SummaryRow._fields, summary_rows(plan), f"Budget: {budget.get('text', 'not recorded')}."
    )
    made = [headline, _uniform_table(result.front, budget), _predicted_table(plan), _refusals_table(result)]
    return [table for table in made if table.rows]


def _uniform_table(front: pd.DataFrame, budget: Mapping[str, Any]) -> Table:
    header = ("scheme on every layer", "loss increase", "request latency / unquantized", "weights, MB", "in budget")
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


def _predicted_table(plan: Plan) -> Table:
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
        for name, time in (predicted.get("phases") or {}).items()
    ]
    if predicted.get("latency_us") is not None:
        rows.append(["request, ms", interval(predicted["latency_us"]), interval(measured.get("latency_us")), ""])
    if predicted.get("loss_delta") is not None:
        loss = measured.get("loss_delta")
        rows.append(
            ["loss increase", f"{predicted['loss_delta']:+.4g}", UNKNOWN if loss is None else f"{loss:+.4g}", ""]
        )
    note = "The error is of the time relative to none on every layer; of a phase, the largest among the finalists."
    return Table("Predicted and measured", ("quantity", "predicted", "measured", "error"), rows, note)


def _refusals_table(result: Result) -> Table:
    rows = [[layer.name, "every scheme", layer.reason] for layer in result.workload.layers if layer.reason is not None]
    failed = result.measurements[result.measurements["status"] != "ok"]
    rows += [
        [f"M={row['m']} K={row['k']} N={row['n']} {row['dtype']}", row["scheme"], f"{row['status']}: {row['reason']}"]
        for row in failed.to_dict("records")
    ]
    return Table("Refusals", ("layer or shape", "scheme", "reason"), rows, "What was left alone, and why.")


def write_report(result: Result, path: str | Path) -> None:
    """Write one HTML file that needs no network: tables, figures, notes and provenance.

    Args:
        result: what ``autoq.tune`` returned.
        path: the file to write, atomically.

    Raises:
        InputError: if the file cannot be written.
    """
    text = _page(result)
    write_atomic(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"), InputError)


def write_files(result: Result, folder: Path) -> dict[str, str]:
    """Write ``plan.json``, ``front.parquet``, ``report.html`` and ``front.png``; returns name → path.

    Raises:
        InputError: if the folder cannot be written.
        PlanError: the same, for the plan.
    """
    files = {name: folder / name for name in ("plan.json", "front.parquet", "report.html", "front.png")}
    result.plan.save(files["plan.json"])
    tables.write(
        files["front.parquet"], pa.Table.from_pandas(result.front, tables.FRONT, preserve_index=False), InputError
    )
    write_report(result, files["report.html"])
    figure = front_figure(result.front, result.plan.provenance.get("budget") or {})
    write_atomic(files["front.png"], lambda temporary: figure.savefig(temporary, format="png"), InputError)
    return {name: str(path) for name, path in files.items()}


_STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:60rem;padding:1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #ccc}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.875rem}
th,td{text-align:left;vertical-align:top;padding:.25rem .75rem .25rem 0;border-bottom:1px solid #ddd}
td{font-variant-numeric:tabular-nums}img{max-width:100%;height:auto}
pre{overflow-x:auto;background:#f5f5f5;padding:.75rem;font-size:.8rem}
@media print{body{max-width:none}h2{break-after:avoid}img,tr{break-inside:avoid}.wide{overflow:visible}}
"""


def _page(result: Result) -> str:
    plan, made = result.plan, report_tables(result)
    budget = plan.provenance.get("budget") or {}
    created = plan.provenance.get("created", "")
    parts = [
        "<h1>autoq report</h1>",
        f"<p>Plan {plan.hash}, {len(plan.layers)} layers. {html.escape(str(created))}</p>",
    ]
    parts.append(_html_table(made[0]))
    parts.append("<h2>Trade-off</h2>")
    parts.append(_image(front_figure(result.front, budget), "request latency against loss increase"))
    parts += [_html_table(table) for table in made[1:]]
    if not result.sensitivity.empty:
        parts.append("<h2>Where each scheme hurts</h2><p>Estimated from gradients; grey: not scored.</p>")
        parts.append(_image(heatmap(result.sensitivity, unit=str(budget.get("unit", ""))), "score by layer and scheme"))
    if result.notes:
        parts.append("<h2>Notes</h2><ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in result.notes) + "</ul>")
    parts.append(_html_table(_layers_table(plan)))
    parts.append("<h2>Provenance</h2>" + _preformatted(plan.provenance))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>autoq report</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _layers_table(plan: Plan) -> Table:
    rows = [[layer, family(layer), str(scheme)] for layer, scheme in plan.layers.items()]
    return Table("Every layer", ("layer", "family", "scheme"), rows)


def _html_table(table: Table) -> str:
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    head = _cells("th", table.header)
    body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in table.rows)
    return (
        f"<h2>{html.escape(table.title)}</h2>{note}"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cells(tag: str, values: Iterable[str]) -> str:
    return "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values)


def _preformatted(value: object) -> str:
    return f"<pre>{html.escape(text_of(value))}</pre>"


def _image(figure: Figure, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'
