"""Kept times, held against new ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from autoq import candidates
from autoq.cache import STOCK, Fingerprint
from autoq.candidates import Candidate
from autoq.errors import CandidateError
from autoq.profiler.isolated import Shape, measure_shape

_MAX_VALUES = 1 << 28  # of a shape's weight, inputs and outputs together: 1 GiB in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Remeasured:
    """Some kept rows beside what they are now.

    Attributes:
        kept: rows of the measurements.
        now: the same shapes and schemes, measured now, in the same order.
    """

    kept: Sequence[Mapping[str, Any]]
    now: Sequence[Mapping[str, Any]]

    @property
    def failed(self) -> int:
        """Rows that could not be timed again."""
        return sum(row["status"] != "ok" for row in self.now)

    @property
    def quotients(self) -> list[float]:
        """The ratio now over the kept ratio, of each row that could be timed."""
        pairs = zip(self.kept, self.now, strict=True)
        return [float(new["ratio"] / old["ratio"]) for old, new in pairs if new["status"] == "ok"]

    @property
    def deviation(self) -> float:
        """The median of |quotient − 1|; a row that could not be timed again is infinitely far off."""
        found = [abs(one - 1) for one in self.quotients] + [float("inf")] * self.failed
        return median(found) if found else 0.0


def usable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that ``remeasure`` can draw."""
    return [row for row in rows if _candidate(row) is not None]


def remeasure(
    rows: Sequence[Mapping[str, Any]],
    count: int,
    *,
    fingerprint: Fingerprint,
    device: str = "cpu",
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Remeasured:
    """Measure some rows again, drawn at random.

    Args:
        rows: of the measurements; only those with a time count, and of these only schemes and types that this version
            of autoq has, on shapes of at most 2²⁸ values. Unquantized layers of stock PyTorch, whose ratio is 1 by
            definition, are left out.
        count: how many, at most.
        fingerprint: of the device here.
        device: ``"cpu"`` or ``"cuda"``, with or without an index.
        seed: of the draw.
        progress: called with (text, done, total).
    """
    known = [(row, found) for row in rows if (found := _candidate(row)) is not None]
    drawn = random.Random(seed).sample(known, min(count, len(known)))
    now = []
    for done, (row, candidate) in enumerate(drawn):
        shape = _shape(row)
        if progress is not None:
            progress(f"M={shape.m} K={shape.k} N={shape.n} {row['scheme']}", done, len(drawn))
        now += measure_shape(shape, [candidate], fingerprint=fingerprint, device=device)
    if progress is not None:
        progress("", len(drawn), len(drawn))
    return Remeasured(kept=[row for row, _ in drawn], now=now)


def _shape(row: Mapping[str, Any]) -> Shape:
    return Shape(m=row["m"], k=row["k"], n=row["n"], dtype=row["dtype"], bias=row["bias"])


def _candidate(row: Mapping[str, Any]) -> Candidate | None:
    """The scheme of a row that can be measured again."""
    m, k, n = row["m"], row["k"], row["n"]
    dtypes = {str(one).removeprefix("torch.") for one in (torch.float32, torch.bfloat16, torch.float16)}
    if row["status"] != "ok" or row["kernel"] == STOCK or row["dtype"] not in dtypes:
        return None
    if k * n + m * (k + n) > _MAX_VALUES:
        return None
    try:
        return candidates.parse(row["scheme"])
    except CandidateError:
        return None
