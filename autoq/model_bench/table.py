"""The tables of a run. Printing them is the command line's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from autoq.model_bench.rows import Report

UNKNOWN = "–"
_FIGURES = ("ms", "10–90 %", "tokens/s", "perplexity", "weights MB", "cache MB", "peak MB", "bandwidth")


def measured(report: Report, *, phase: str, batch: int) -> Table:
    """A row for each engine in one phase, the fastest first."""
    facts = report.facts
    many = f", {batch} rows" if batch > 1 else ""
    title = (
        f"{facts.get('model', '')}: {phase}, {facts['context']} tokens{many}; threads: {facts['threads']}, rounds: "
        f"{facts['rounds']}, memory reads {facts['bandwidth_gb_s']:.1f} GB/s"
    )
    right = [Column(name, justify="right") for name in _FIGURES]
    table = Table(Column("engine", no_wrap=True), *right, title=escape(title), title_justify="left")
    rows = [one for one in report.rows if (one["phase"], one["batch"]) == (phase, batch)]
    for row in sorted(rows, key=lambda one: one["time_ms"]):
        table.add_row(*map(escape, _cells(row)))
    return table


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["engine"],
        _number(row["time_ms"]),
        f"{_number(row['low_ms'])}–{_number(row['high_ms'])}",
        f"{row['tokens_per_s']:,.1f}" if row["tokens_per_s"] < 1000 else f"{row['tokens_per_s']:,.0f}",
        UNKNOWN if row["perplexity"] is None else f"{row['perplexity']:.3f}",
        _megabytes(row["weight_bytes"]),
        _megabytes(row["kv_bytes"]),
        UNKNOWN if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
        UNKNOWN if row["bandwidth_share"] is None else f"{row['bandwidth_share']:.0%}",
    )


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def _megabytes(size: float | None) -> str:
    return UNKNOWN if size is None else f"{size / 1e6:.1f}"


def breakdown(report: Report, *, phase: str, batch: int) -> Table | None:
    """Milliseconds by part of a pass of each engine in PyTorch; None if none was broken down."""
    found = [one for one in report.breakdowns if (one["phase"], one["batch"]) == (phase, batch)]
    if not found:
        return None
    engines = [Column(escape(one["engine"]), justify="right", overflow="fold") for one in found]
    table = Table("ms", *engines, title=f"{phase}, batch {batch}: where the time goes", title_justify="left")
    for part in _parts(found):
        table.add_row(escape(part), *(_number(one["parts"][part]) if part in one["parts"] else "" for one in found))
    table.add_section()
    table.add_row("in all", *(_number(one["wall_ms"]) for one in found))
    return table


def _parts(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The largest first."""
    largest: dict[str, float] = {}
    for one in found:
        for part, value in one["parts"].items():
            largest[part] = max(largest.get(part, 0.0), value)
    return sorted(largest, key=lambda part: -largest[part])


def absent(report: Report) -> Table | None:
    """What was not measured, and why; None if everything was."""
    if not report.missing and not report.failed:
        return None
    table = Table("not measured", Column("why", overflow="fold"))
    for one in (*report.missing, *report.failed):
        table.add_row(escape(one.name), escape(one.reason))
    return table
