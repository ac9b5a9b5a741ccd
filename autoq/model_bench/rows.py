"""What a run found, as rows: one for each engine, phase and batch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autoq._files import write_atomic
from autoq.errors import InputError
from autoq.model_bench.engine import DECODE, Engine, Missing
from autoq.plan_text import finite
from autoq.profiler import Timing

SCHEMA = 1


@dataclass(slots=True, kw_only=True)
class Found:
    """What one engine's workers answered.

    Attributes:
        engine: it.
        loaded: the answer to ``load``.
        losses: of the rows of text, in nats.
        seconds: (phase, batch) → of each pass or step that counts.
        parts: (phase, batch) → the answer to ``profile``.
        peak_growth_bytes: of its memory since its imports.
    """

    engine: Engine
    loaded: Mapping[str, Any] = field(default_factory=dict)
    losses: Sequence[float] = ()
    seconds: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    parts: dict[tuple[str, int], Mapping[str, Any]] = field(default_factory=dict)
    peak_growth_bytes: int | None = None

    def perplexity(self) -> float | None:
        """On the rows of text."""
        return math.exp(sum(self.losses) / len(self.losses)) if self.losses else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run's result.

    Attributes:
        facts: model, text, context, steps, rounds, threads, device, versions.
        rows: one for each engine, phase and batch.
        breakdowns: the parts of a pass of the engines in PyTorch.
        missing: engines that were not started.
        failed: engines that could not do something, with what and why.
        order: the engines' names in each round, in the order in which they were measured.
    """

    facts: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    breakdowns: Sequence[Mapping[str, Any]] = ()
    missing: Sequence[Missing] = ()
    failed: Sequence[Missing] = ()
    order: Sequence[Sequence[str]] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON object; numbers that are not finite are null."""
        value = {
            "schema": SCHEMA,
            **self.facts,
            "rows": [dict(one) for one in self.rows],
            "breakdowns": [dict(one) for one in self.breakdowns],
            "missing": [asdict(one) for one in self.missing],
            "failed": [asdict(one) for one in self.failed],
            "order": [list(one) for one in self.order],
        }
        found: dict[str, Any] = finite(value)
        return found

    def save(self, path: Path) -> None:
        """Write the JSON object.

        Raises:
            InputError: if the file cannot be written.
        """
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), InputError)


def rows_of(found: Found, *, context: int, steps: int, bandwidth_gb_s: float | None) -> list[dict[str, Any]]:
    """The rows of one engine.

    Args:
        found: its answers.
        context: tokens of the prompt.
        steps: decode steps after it.
        bandwidth_gb_s: the memory's, in 10⁹ bytes a second.
    """
    loaded = found.loaded
    rows = []
    for (phase, batch), seconds in found.seconds.items():
        timing = Timing.of([1e6 * one for one in seconds])
        read = read_bytes(loaded, batch=batch, tokens=context + steps / 2) if phase == DECODE else None
        share = read / timing.median_us / (1e3 * bandwidth_gb_s) if read and bandwidth_gb_s else None
        tokens = batch * (1 if phase == DECODE else context)
        per_token = loaded.get("kv_bytes_per_token")
        rows.append(
            {
                "engine": found.engine.name,
                "plan": found.engine.plan,
                "phase": phase,
                "batch": batch,
                "context": context,
                "time_ms": timing.median_us / 1e3,
                "low_ms": timing.low_us / 1e3,
                "high_ms": timing.high_us / 1e3,
                "measurements": timing.repeats,
                "tokens_per_s": 1e6 * tokens / timing.median_us,
                "perplexity": found.perplexity(),
                "weight_bytes": loaded.get("weight_bytes"),
                "kv_bytes": None if per_token is None else per_token * batch * context,
                "peak_mb": None if found.peak_growth_bytes is None else found.peak_growth_bytes / 1e6,
                "bandwidth_share": share,
                "version": loaded.get("version"),
                "isa": loaded.get("isa"),
                "note": loaded.get("note"),
            }
        )
    return rows


def read_bytes(loaded: Mapping[str, Any], *, batch: int, tokens: float) -> float | None:
    """What a decode step reads that reads all weights and the cache once; None if it is not known.

    Args:
        loaded: the answer to ``load``.
        batch: rows.
        tokens: in the cache of each.
    """
    weights = loaded.get("read_bytes") or loaded.get("weight_bytes")
    return weights + (loaded.get("kv_bytes_per_token") or 0) * batch * tokens if weights else None
