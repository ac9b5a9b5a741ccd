"""What tuning and the knapsack take in seconds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import autoq
from autoq.loading import inputs, load_model
from autoq.search import Option, Problem, Unit, frontier, solve

_COLD, _WARM = 0.05, 0.03  # budgets: how much the perplexity may rise
_END_TO_END = ("compile", "calibrate", "verify")


def tune_once(model: str, text: Path | None, cache: Path, max_degradation: float) -> dict[str, Any]:
    """Tune a named model and say how long each stage took."""
    loaded = load_model(model)
    batches, _ = inputs(loaded, text)
    stages: defaultdict[str, float] = defaultdict(float)
    last = begin = time.perf_counter()
    stage = "record"

    def progress(name: str, text: str, done: int, total: int) -> None:
        nonlocal last, stage
        now = time.perf_counter()
        stages[stage] += now - last
        last, stage = now, name
        print(f"  {now - begin:6.1f} s {name} {text} {done}/{total}", file=sys.stderr, flush=True)

    result = autoq.tune(loaded.model, batches, max_degradation=max_degradation, cache_dir=cache, progress=progress)
    end = time.perf_counter()
    stages[stage] += end - last
    return {
        "seconds": end - begin,
        "stages": dict(stages),
        "max_degradation": max_degradation,
        "plans": len(result.front_rows),
        "measured": result.plan.provenance["measured"],
        "predicted": result.plan.provenance["predicted"],
        "certificate": result.plan.provenance["certificate"],
        "notes": list(result.notes),
    }


def fresh(script: Path, model: str, text: Path | None, cache: Path, max_degradation: float) -> dict[str, Any]:
    """The same in a process of its own, whose compiler has nothing cached."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, str(script), "once", "--model", model, "--cache", str(cache), "--json", str(report)]
        command += ["--max-degradation", str(max_degradation)]
        if text is not None:
            command += ["--text", str(text)]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor")}
        subprocess.run(command, check=True, env=environment)
        return dict(json.loads(report.read_text()))


def cold_and_warm(script: Path, model: str, text: Path | None, parts: set[str]) -> dict[str, Any]:
    """Tuning with nothing cached, and for another budget with what that measured.

    Warm seconds are those without compiling and timing what is verified end to end.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        found["cold"] = fresh(script, model, text, Path(cache), _COLD)
        found["cold_s"] = found["cold"]["seconds"]
        if "warm" in parts:
            found["warm"] = fresh(script, model, text, Path(cache), _WARM)
            end_to_end = sum(found["warm"]["stages"].get(name, 0.0) for name in _END_TO_END)
            found["warm_s"] = found["warm"]["seconds"] - end_to_end
            found["warm_end_to_end_s"] = end_to_end
    return found


def knapsack_problem(units: int = 32 * 7, options: int = 12, seed: int = 0) -> Problem:
    """Random decisions with the spread of a real model's: more bits take longer and lose less, not exactly so."""
    drawn = random.Random(seed)
    made = []
    for number in range(units):
        size, weight = drawn.uniform(0.5, 4.0), drawn.lognormvariate(-6.0, 1.5)
        choices = []
        for option in range(options):
            bits = 3.0 + 13.0 * option / (options - 1)
            choices.append(
                Option(
                    scheme=f"scheme {option}",
                    time_us=size * (10.0 + 4.0 * bits) * drawn.uniform(0.9, 1.1),
                    loss=weight * 4.0**-bits * 4.0**4 * drawn.uniform(0.7, 1.4),
                    bytes=int(size * 1e5 * bits),
                )
            )
        made.append(Unit(name=f"layer {number}", layers=(f"layer {number}",), options=tuple(choices)))
    return Problem(units=tuple(made))


def knapsack(repeats: int = 3) -> dict[str, Any]:
    """Seconds and gaps of the whole hull, of one limit and of two, at several places; the slowest is reported."""
    rows: dict[str, dict[str, float]] = {}
    for seed in range(repeats):
        problem = knapsack_problem(seed=seed)
        begin = time.perf_counter()
        hull = frontier(problem)
        _worst(rows, "hull", time.perf_counter() - begin, 0.0)
        for share in (0.2, 0.5, 0.8):
            point = hull[int(share * (len(hull) - 1))]
            for name, limits in (
                ("one limit", {"max_loss": 1.001 * point.loss}),
                ("two limits", {"max_loss": 1.05 * point.loss, "max_bytes": 0.995 * point.bytes}),
            ):
                begin = time.perf_counter()
                try:
                    gap = solve(problem, objective="time", **limits).gap
                except autoq.errors.SearchError:
                    continue
                _worst(rows, name, time.perf_counter() - begin, gap)
    return rows


def _worst(rows: dict[str, dict[str, float]], name: str, seconds: float, gap: float) -> None:
    row = rows.setdefault(name, {"seconds": 0.0, "gap": 0.0})
    row["seconds"], row["gap"] = max(row["seconds"], seconds), max(row["gap"], gap)
