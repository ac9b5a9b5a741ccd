"""The profile of a workload: every distinct (M, K, N, dtype) under every scheme, measured once per device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autoq.cache import SHAPE, Fingerprint, ShapeKey
from autoq.candidates import Candidate
from autoq.profiler.isolated import Shape, measure_shape, would_run
from autoq.workload import Workload

Progress = Callable[[str, int, int], None]


def shapes_of(workload: Workload) -> list[Shape]:
    """The distinct shapes that the quantizable layers see, smallest first."""
    found = set()
    for layer in workload.quantizable:
        for call in workload.calls_of(layer.name):
            if call.m > 0:
                found.add(Shape(m=call.m, k=layer.k, n=layer.n, dtype=call.dtype, bias=layer.bias))
    return sorted(found)


def profile(
    workload: Workload,
    candidates: Sequence[Candidate],
    *,
    fingerprint: Fingerprint,
    device: str = "cpu",
    known: Sequence[Mapping[str, Any]] = (),
    ratios: Mapping[tuple[ShapeKey, str], Mapping[str, Any]] | None = None,
    keep: Callable[[Sequence[Mapping[str, Any]]], None] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure what is not known yet.

    Args:
        workload: its shapes are measured.
        candidates: the schemes; the unquantized layer is always measured beside them.
        fingerprint: of the device and the software, written into the rows.
        device: what to measure, ``"cpu"`` or ``"cuda"`` with or without an index; on a GPU every product is tuned
            before it is timed.
        known: rows of the measurements table from the cache; those that do not hold here count for nothing.
        ratios: (shape, scheme) → a row of another device; what is not known takes its ratio, is checked here but not
            timed, and names that device as its ``origin``. The unquantized layer is never predicted.
        keep: called with the measured rows of each finished shape, so that an interrupted run loses one shape at most.
        progress: called with (text, done, total).

    Returns:
        One row of the measurements table per (shape, scheme) of this workload: old, new and predicted.
    """
    have = {tuple(row[name] for name in (*SHAPE, "scheme")): dict(row) for row in known if fingerprint.covers(row)}
    shapes = shapes_of(workload)
    rows: list[dict[str, Any]] = []
    for done, shape in enumerate(shapes):
        if progress is not None:
            progress(f"M={shape.m} K={shape.k} N={shape.n}", done, len(shapes))
        found = {one: have.get((*shape.key, str(one.scheme))) for one in candidates}
        current = {one: row for one, row in found.items() if row is not None and would_run(row, one, device)}
        missing = [one for one in candidates if one not in current]
        new = measure_shape(shape, missing, fingerprint=fingerprint, device=device, ratios=ratios) if missing else []
        measured = [row for row in new if not row["origin"]]
        if measured and keep is not None:
            keep(measured)
        rows += [*current.values(), *new]
    if progress is not None:
        progress("", len(shapes), len(shapes))
    return rows
