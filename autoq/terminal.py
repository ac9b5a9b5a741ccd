"""How the command line looks: its tables, and progress with the time left. Printing them is the command line's."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import progress as bars
from rich.markup import escape
from rich.table import Table

from autoq.summary import family, loss_row, phase_loss_rows, summary_rows

if TYPE_CHECKING:
    from rich.console import Console

    from autoq.diagnosis import Fact
    from autoq.plan import Plan

_EVERY_S = 20.0  # between two lines of progress where stderr is no terminal


class Progress:
    """Progress of the stages: one bar each on a terminal, a line now and then elsewhere. Called by the library.

    Args:
        console: where they appear.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = bars.Progress(
            bars.TextColumn("{task.fields[stage]:<12}"),
            bars.BarColumn(bar_width=24),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
        )
        self._tasks: dict[str, bars.TaskID] = {}
        self._started: dict[str, float] = {}
        self._said: dict[str, float] = {}
        self._begin = time.monotonic()

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def __call__(self, stage: str, text: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of a stage are over, and what comes next."""
        if not self._console.is_terminal:
            self._line(stage, text, done, total)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._live.add_task("", total=total, stage=stage, note=text)
        self._live.update(self._tasks[stage], completed=done, total=total, note=text)

    def _line(self, stage: str, text: str, done: int, total: int) -> None:
        now = time.monotonic()
        begin = self._started.setdefault(stage, now)
        recent = stage in self._said and now - self._said[stage] < _EVERY_S
        if recent or (stage in self._said and done >= total):
            return
        self._said[stage] = now
        left = f", about {(now - begin) / done * (total - done):.0f} s left" if 0 < done < total else ""
        line = f"[{now - self._begin:5.0f} s] {stage} {done}/{total}{left} {text}".rstrip()
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def summary(plan: Plan, *, title: str) -> Table:
    """The table of a plan."""
    table = Table("", "unquantized", "autoq", "change", title=title, title_justify="left")
    for row in summary_rows(plan):
        table.add_row(*map(escape, row))
    return table


def losses(found: Mapping[str, Any], *, title: str) -> Table:
    """Loss before and, when it was measured, after."""
    table = Table("", "unquantized", "under the plan", "change", title=title, title_justify="left")
    for row in (loss_row(found, found), *phase_loss_rows(found, found)):
        table.add_row(*map(escape, row))
    return table


def origin(plan: Plan) -> Table:
    """Where a plan comes from."""
    known = plan.provenance
    facts = {
        "budget": (known.get("budget") or {}).get("text"),
        "created": known.get("created"),
        "autoq": known.get("autoq"),
        "device": (known.get("device") or {}).get("name"),
        "edited": "yes; the original plan's figures were dropped" if known.get("edited") else None,
        "retargeted": "yes; the figures are predictions" if known.get("retargeted") else None,
    }
    table = Table("provenance", "")
    for name, value in facts.items():
        if value:
            table.add_row(name, escape(str(value)))
    if table.row_count == 0:
        table.add_row("none", "written by hand")
    return table


def layers(plan: Plan) -> Table:
    """Every layer with its family and scheme."""
    table = Table("layer", "family", "scheme")
    for layer, scheme in plan.layers.items():
        table.add_row(layer, family(layer), str(scheme))
    return table


def diagnosis(facts: Sequence[Fact]) -> Table:
    """What ``doctor`` found."""
    table = Table("", "found", "what to do")
    for fact in facts:
        table.add_row(fact.name, escape(fact.value), escape(fact.advice))
    return table
