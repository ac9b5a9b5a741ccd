"""A run's document as text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpu_bench.roofline import LLAMA_3_8B
from gpu_bench.run_checks import Row

_LISTED = 20  # failures shown; the file has them all


def checks(rows: Sequence[Row]) -> str:
    """How many kernels were right, by method, and those that were not."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    worst: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        method = row["kernel"].partition(" ")[0] or "(refused by the scheme)"
        counts[method][row["status"]] += 1
        worst[method] = max(worst[method], row["error"] or 0.0)
    lines = [f"{'checked':28}{'ok':>8}{'wrong':>8}{'error':>8}{'refused':>9}  largest relative RMS"]
    for method, found in counts.items():
        numbers = "".join(
            f"{found[name]:>{width}}" for name, width in (("ok", 8), ("wrong", 8), ("error", 8), ("refused", 9))
        )
        lines.append(f"{method:28}{numbers}  {worst[method]:.1e}")
    failed = [row for row in rows if row["status"] in ("wrong", "error")]
    lines += [f"{row['status'].upper()} {where(row)} {row['kernel']}: {row['reason']}" for row in failed[:_LISTED]]
    if len(failed) > _LISTED:
        lines.append(f"and {len(failed) - _LISTED} more, see --json")
    return "\n".join(lines)


def where(row: Row) -> str:
    """The product of a check's row."""
    return f"{row['scheme']} {row['n']}x{row['k']} M={row['m']} {row['dtype']}{' bias' if row.get('bias') else ''}"


def tables(document: Mapping[str, Any]) -> str:
    """One table a cell, then all linear layers of the model together."""
    cells: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in document["rows"]:
        cells[(row["n"], row["k"], row["m"], row["dtype"])].append(row)
    names = {(one.n, one.k): one.name for one in LLAMA_3_8B}
    blocks = [machine(document["machine"])]
    for (n, k, m, dtype), rows in cells.items():
        layer = f": {names[n, k]}" if (n, k) in names else ""
        blocks.append("\n".join([f"{n}x{k} (N x K){layer}, M={m}, {dtype}", *_lines(rows)]))
    ends = ("\n".join(_sums(document["rows"])), "\n".join(_absent(document["rows"])))
    return "\n\n".join([*blocks, *filter(None, ends)])


def machine(about: Mapping[str, Any]) -> str:
    """What ran, in two lines."""
    return (
        f"{about['name']} ({about['architecture']}), driver {about['driver']}, {about['runtime']}, "
        f"torch {about['pytorch']}, triton {about['triton']}; {about['date']}\n"
        f"memory: {about['bandwidth_gb_s']:.0f} GB/s measured. Medians with a cold L2, from CUDA graphs where possible."
    )


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    yield f"{'engine':46}{'scheme':36}{'µs':>9}{'GB/s':>8}{'of mem':>8}{'/ cuBLAS':>10}{'/ predicted':>13}  kernel"
    for row in rows:
        head = f"{row['engine']:46}{row['scheme']:36}"
        if row["status"] == "absent":
            continue
        if row["time_us"] is None:
            yield f"{head}{row['status']:>9}  {row['reason']}"
            continue
        yield (
            f"{head}{row['time_us']:>9.1f}{row['gb_s']:>8.0f}{100 * row['bandwidth_share']:>7.0f}%"
            f"{_ratio(row['over_cublas']):>10}{_ratio(row['over_predicted']):>13}  {row['kernel'] or ''}"
        )


def _absent(rows: Sequence[Row]) -> Iterator[str]:
    """Libraries that were not there, each once, with the reason."""
    found = {(row["engine"].partition(".")[0], row["reason"]) for row in rows if row["status"] == "absent"}
    for library, reason in sorted(found):
        yield f"not measured: {library}: {reason}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _sums(rows: Sequence[Row]) -> Iterator[str]:
    """Milliseconds of all linear layers of Llama-3-8B, where every shape was timed."""
    times = {
        (row["engine"], row["scheme"], row["m"], row["dtype"], row["n"], row["k"]): row
        for row in rows
        if row["time_us"] is not None
    }
    seen = dict.fromkeys(key[:4] for key in times)
    for engine, scheme, m, dtype in seen:
        found = [(one.count, times.get((engine, scheme, m, dtype, one.n, one.k))) for one in LLAMA_3_8B]
        if any(row is None for _, row in found):
            continue
        whole = sum(count * row["time_us"] for count, row in found if row) / 1e3
        predicted = [count * row["predicted_us"] for count, row in found if row and row["predicted_us"] is not None]
        against = f", predicted {sum(predicted) / 1e3:.2f}" if len(predicted) == len(found) else ""
        yield f"all linear layers of Llama-3-8B, M={m} {dtype}, {engine} {scheme}: {whole:.2f} ms{against}"
