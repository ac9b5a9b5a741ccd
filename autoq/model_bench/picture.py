"""The picture of a run: time of a decode step against perplexity, one mark for each engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq._files import write_atomic
from autoq.errors import InputError
from autoq.model_bench.engine import DECODE
from autoq.model_bench.rows import Report
from autoq.pictures import Picture
from autoq.placement import Box, Label, around, placed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
# Okabe and Ito's palette: distinguishable with every common colour blindness. Markers differ as well.
_STYLES = {
    "autoq": ("o", "#0072B2", "autoq"),
    "bf16": ("s", "#8C8C8C", "transformers, bfloat16"),
    "torchao": ("^", "#009E73", "torchao"),
    "llamacpp": ("D", "#E69F00", "llama.cpp"),
    "openvino": ("v", "#D55E00", "OpenVINO"),
}
_MARK, _FONT = 4.0, 7.5  # points: a mark's radius, and a font size


def drawn(report: Report, *, batch: int | None = None) -> Picture:
    """The picture.

    Args:
        report: of the run.
        batch: whose rows are drawn; None for the smallest.

    Raises:
        InputError: if no engine has both a time and a perplexity.
    """
    rows = [one for one in report.rows if one["phase"] == DECODE and one["perplexity"] is not None]
    if not rows:
        raise InputError("the picture needs a decode time and a perplexity of one engine at least", got="none")
    batch = min(one["batch"] for one in rows) if batch is None else batch
    rows = [one for one in rows if one["batch"] == batch]
    figure = Picture(8.0, 5.5, dpi=150)
    axes = figure.add_subplot()
    for family, (marker, colour, label) in _STYLES.items():
        points = [one for one in rows if _family(one) == family]
        if points:
            x, y = [one["time_ms"] for one in points], [one["perplexity"] for one in points]
            ends = [
                [one["time_ms"] - one["low_ms"] for one in points],
                [one["high_ms"] - one["time_ms"] for one in points],
            ]
            axes.errorbar(x, y, xerr=ends, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.5)
            axes.plot(x, y, marker, color=colour, markersize=2 * _MARK, label=label)
    axes.set_xscale("log")
    axes.set_xlabel(f"milliseconds for each decode step after {report.facts['context']} tokens, batch {batch}")
    axes.set_ylabel("perplexity")
    axes.margins(0.12)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(True, which="both", alpha=0.2)
    _plain_ticks(axes)
    axes.set_title(f"{report.facts.get('model', '')}: to the left is faster, lower is better", fontsize=10)
    axes.legend(fontsize=_FONT, loc="best")
    figure.draw_without_rendering()
    _name(axes, rows)
    return figure


def _family(row: Mapping[str, Any]) -> str:
    return str(row["engine"]).partition("-")[0]


def _plain_ticks(axes: Axes) -> None:
    """1, 2, 5, 10, … instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _name(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Each engine's name beside its mark, where it covers nothing."""
    figure: Any = axes.figure
    renderer: Any = figure.canvas.get_renderer()
    pixels = figure.dpi / 72
    spots = axes.transData.transform([(one["time_ms"], one["perplexity"]) for one in rows])
    labels = []
    for one, (x, y) in zip(rows, spots, strict=True):
        text = axes.text(0, 0, one["engine"], fontsize=_FONT)
        size = text.get_window_extent(renderer)
        text.remove()
        labels.append(Label(x, y, size.width + 2 * pixels, size.height, (_MARK + 2) * pixels))
    corner: Any = axes.get_legend()
    lows = axes.transData.transform([(one["low_ms"], one["perplexity"]) for one in rows])
    highs = axes.transData.transform([(one["high_ms"], one["perplexity"]) for one in rows])
    bars = [Box(left, y - pixels, right, y + pixels) for (left, y), (right, _) in zip(lows, highs, strict=True)]
    marks = [around(x, y, _MARK * pixels) for x, y in spots] + [Box(*corner.get_window_extent(renderer).extents), *bars]
    for box, one in zip(placed(labels, marks, Box(*axes.get_window_extent().extents)), rows, strict=True):
        place = axes.transData.inverted().transform(((box.left + box.right) / 2, (box.low + box.high) / 2))
        axes.annotate(one["engine"], tuple(place), fontsize=_FONT, ha="center", va="center", zorder=5)


def check(path: Path) -> None:
    """Refuse a file that is no picture.

    Raises:
        InputError: naming it.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"a picture's file ends in {' or '.join(SUFFIXES)}", where=str(path), got=path.suffix or "nothing"
        )


def save(report: Report, path: Path) -> None:
    """Write the picture.

    Args:
        report: of the run.
        path: ``.png`` or ``.svg``.

    Raises:
        InputError: if it is another kind of file, cannot be written, or there is nothing to draw.
    """
    check(path)
    figure = drawn(report)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:]), InputError)
