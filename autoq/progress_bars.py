"""How far the stages of a verb are, with the time left: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING

from rich import progress as bars
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_EVERY_S = 20.0  # between two lines where stderr is no terminal


class Progress:
    """Called by the library with a stage, what comes next, and how many steps of how many are over.

    Args:
        console: where it appears.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = _Bars(
            bars.TextColumn("{task.fields[stage]:<12}"),
            bars.BarColumn(bar_width=24),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._tasks: dict[str, bars.TaskID] = {}
        self._first: dict[str, tuple[float, int]] = {}  # of a stage: when it began, and the steps done before
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
            self._live.now = ""
            self._live.stop()

    def __call__(self, stage: str, text: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of a stage are over, and what comes next or was found."""
        now = time.monotonic()
        begin, before = self._first.setdefault(stage, (now, done))
        left = time_left(now - begin, done - before, total - done)
        if not self._console.is_terminal:
            self._line(stage, text, done, total, left)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._live.add_task("", total=total, stage=stage, left=left)
        self._live.now = text
        self._live.update(self._tasks[stage], completed=done, total=total, left=left)

    def _line(self, stage: str, text: str, done: int, total: int, left: str) -> None:
        now = time.monotonic()
        said = self._said.get(stage)
        if said is not None and (now - said < _EVERY_S or done >= total):
            return
        self._said[stage] = now
        parts = [f"[{now - self._begin:5.0f} s] {stage} {done}/{total}", left]
        line = " ".join(filter(None, (", ".join(filter(None, parts)), text)))
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def time_left(spent_s: float, done: int, left: int) -> str:
    """How long the rest of a stage takes if it goes on as so far; nothing where that is not known.

    Args:
        spent_s: seconds for the steps done.
        done: steps.
        left: steps.
    """
    if done <= 0 or left <= 0:
        return ""
    seconds = spent_s / done * left
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"


class _Bars(bars.Progress):
    """The bars, and below them what happens now in a line of its own."""

    now = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.now:
            yield Text(self.now, style="dim")
