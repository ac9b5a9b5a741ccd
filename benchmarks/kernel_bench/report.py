"""A run's rows as a table and as a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_bench.roofline import Row
from kernel_bench.shapes import MODELS, names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: distinguishable with every common colour blindness. Markers differ as well; a mix has the
# colour of the scheme it becomes at many rows.
_STYLES: dict[str, tuple[str, str, str]] = {
    "none": ("#000000", "o", "-"),
    "int8wo": ("#E69F00", "s", "-"),
    "int4wo-hqq": ("#009E73", "^", "-"),
    "sinq": ("#56B4E9", "v", "-"),
    "fp6": ("#CC79A7", "D", "-"),
    "int8dq": ("#D55E00", "P", "-"),
    "int4dq": ("#0072B2", "X", "-"),
    "int8mix": ("#D55E00", "*", ":"),
    "int4mix": ("#0072B2", "*", ":"),
}
_PANELS = 9


def best_rival(row: Row, cell: list[Row]) -> Row | None:
    """The fastest timed rival that could stand in: with no fewer bits, and int8 activations only if ours has them."""
    fit = [
        other
        for other in cell
        if other["engine"] != "autoq"
        and other["status"] == "ok"
        and other["bits"] >= row["bits"]
        and (other["rate"] != "u8s8" or row["rate"] == "u8s8")
    ]
    return min(fit, key=lambda other: other["time_us"], default=None)


def table(data: Mapping[str, Any]) -> str:
    """One table per shape, dtype and number of threads: engines in rows, M in columns."""
    groups: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in data["rows"]:
        groups[(row["n"], row["k"], row["dtype"], row["threads"])].append(row)
    blocks = [_machine_text(data["machine"])]
    for (n, k, dtype, threads), rows in groups.items():
        where = "; ".join(names(n, k)) or "no model listed"
        title = f"{n}x{k} (N x K), {dtype}, {threads} threads: {where}"
        blocks.append("\n".join([title, *_lines(rows)]))
    return "\n\n".join(blocks)


def _machine_text(machine: Mapping[str, Any]) -> str:
    lines = [f"{machine['name']}, {machine['isa']}, {machine['caches']}; torch {machine['torch']}; {machine['date']}"]
    for threads, value in machine.get("bandwidth_gb_s", {}).items():
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in machine.get("rates", {}).get(threads, {}).items())
        lines.append(f"{threads} threads: reads {value:.1f} GB/s; oneDNN, 10⁹ multiply-adds a second: {rates}")
    lines.append("Times in µs / over the roofline; autoq's also / over the best rival that could stand in.")
    return "\n".join(lines)


def _lines(rows: list[Row]) -> Iterator[str]:
    ms = sorted({row["m"] for row in rows})
    cells = {m: [row for row in rows if row["m"] == m] for m in ms}
    found = {(row["engine"], row["scheme"], row["m"]): row for row in rows}
    yield f"{'scheme':46} {'engine':42}" + "".join(f"{f'M={m}':>24}" for m in ms)
    for engine, scheme in dict.fromkeys((row["engine"], row["scheme"]) for row in rows):
        shown = (_cell_text(found.get((engine, scheme, m)), cells[m]) for m in ms)
        yield f"{scheme:46} {engine:42}" + "".join(f"{one:>24}" for one in shown)


def _cell_text(row: Row | None, cell: list[Row]) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return str(row["status"])
    time_us = row["time_us"]
    text = f"{time_us:.1f}" if time_us < 1000 else f"{time_us:.0f}"
    text += f" / {time_us / row['roofline_us']:.2f}" if row["roofline_us"] else " / –"
    rival = best_rival(row, cell) if row["engine"] == "autoq" else None
    return text if rival is None else f"{text} / {time_us / rival['time_us']:.2f}"


def picture(data: Mapping[str, Any], path: Path) -> None:
    """Time over the roofline against M, a panel per shape, a line per scheme; stock float in grey.

    Of a scheme's variants groups of 64 or else the first is drawn; of the numbers of threads the largest, of the
    dtypes the first. At most nine shapes are drawn, the large and small ones first, and of a quick run those with
    several M; the title counts the rest.

    Args:
        data: a run's JSON.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    threads, dtype = max(row["threads"] for row in data["rows"]), data["rows"][0]["dtype"]
    rows = [
        row
        for row in data["rows"]
        if row["threads"] == threads and row["dtype"] == dtype and row["status"] == "ok" and row["roofline_us"]
    ]
    order = [shape for layers in MODELS.values() for shape in layers.values()]
    shapes = sorted({(row["n"], row["k"]) for row in rows}, key=order.index)
    several = [one for one in shapes if len({row["m"] for row in rows if (row["n"], row["k"]) == one}) > 1]
    drawn = (several or shapes)[:_PANELS]
    ms = sorted({row["m"] for row in rows})
    columns = min(3, len(drawn))
    lines = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.3 * columns, 3.3 * lines + 1.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(drawn) :]:
        axes.set_visible(False)
    for axes, shape in zip(panels.flat, drawn, strict=False):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ms)
        _panel(axes, shape, [row for row in rows if (row["n"], row["k"]) == shape])
    for axes in panels[:, 0]:
        axes.set_ylabel("time / roofline")
    for axes in panels.flat[max(0, len(drawn) - columns) : len(drawn)]:
        axes.set_xlabel("M, rows of the activation")
        axes.tick_params(labelbottom=True)
    left = f"; {len(shapes) - len(drawn)} shapes more in the file" if len(shapes) > len(drawn) else ""
    figure.suptitle(f"autoq's CPU kernels, {dtype}, {threads} threads\nweights out of cache{left}", fontsize=11)
    handles = {
        label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, columns + 1), fontsize=8)
    figure.savefig(path)


def _panel(axes: Axes, shape: tuple[int, int], rows: list[Row]) -> None:
    from matplotlib.ticker import LogLocator

    n, k = shape
    found = names(n, k)
    models = [name for name in found if name.split()[0] not in ("large", "small")]
    axes.set_title(f"{n} × {k}  ({'; '.join(models or found)})", fontsize=9)
    axes.axhline(1, color="#444444", linewidth=1, linestyle=":")
    stock = [row for row in rows if row["engine"] == "aten.linear"]
    _line(axes, stock, label="stock float (oneDNN)", color="#9A9A9A", marker="", linestyle="--")
    ours = [row for row in rows if row["engine"] == "autoq"]
    for key, (color, marker, linestyle) in _STYLES.items():
        variants = dict.fromkeys(row["scheme"] for row in ours if row["scheme"].partition("(")[0] == key)
        if not variants:
            continue
        scheme = next((one for one in variants if "group_size=64" in one), next(iter(variants)))
        own = [row for row in ours if row["scheme"] == scheme]
        _line(axes, own, label=scheme, color=color, marker=marker, linestyle=linestyle)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.25, linewidth=0.6)


def _line(axes: Axes, rows: list[Row], **style: Any) -> None:
    points = sorted((row["m"], row["time_us"] / row["roofline_us"]) for row in rows)
    if points:
        axes.plot(*zip(*points, strict=True), linewidth=1.3, markersize=4, **style)
