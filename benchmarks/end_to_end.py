"""Every uniform plan and a tuned one on a real model: perplexity on text that decided nothing, time, and replay.

    python benchmarks/end_to_end.py demo/plan.json --text test.txt --rows 16 --json out.json

All plans are timed in one run, interleaved with the compiled, unquantized model.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch

import autoq
from autoq import candidates
from autoq.loading import inputs, load_model
from autoq.plan import Plan
from autoq.profiler.end_to_end import UNQUANTIZED
from autoq.results import Settings
from autoq.scheme import Scheme
from autoq.tuning import Tuning

TUNED = "tuned"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path, help="the tuned plan")
    parser.add_argument("--model", default="smollm2", help="as for the autoq command")
    parser.add_argument("--text", type=Path, help="UTF-8 text; default: English text that ships with Python")
    parser.add_argument("--rows", type=int, default=16, help="rows of 512 tokens")
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    batches, source = inputs(loaded, arguments.text, rows=arguments.rows)
    plan = Plan.load(arguments.plan)
    rows = compare(loaded.model, plan, batches)
    replayed = replay(loaded.model, arguments.plan, batches[:1])
    print(f"text: {source}\n")
    print(f"{'plan':32} {'perplexity':>10} {'change, 95 % interval':>26} {'MB':>6}  time per pass, ms (of unquantized)")
    for row in rows:
        change = f"{row['change']:+.2%} [{row['low']:+.2%}, {row['high']:+.2%}]"
        phases = "  ".join(f"{name} {ms:.1f} ({row['ratio'][name]:.3f})" for name, ms in row["time_ms"].items())
        print(
            f"{row['plan']:32} {row['perplexity']:10.3f} {change:>26} {row['weight_bytes'] / 1e6:6.1f}  {phases}  "
            f"request {row['request_ratio']:.3f}"
        )
    print(f"\nreplay: {replayed['seconds']:.1f} s with packing, outputs bit-equal: {replayed['bit_equal']}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"text": source, "rows": rows, "replay": replayed}, indent=1) + "\n")


def compare(model: torch.nn.Module, plan: Plan, batches: torch.Tensor) -> list[dict[str, object]]:
    """One row per plan: perplexity with the interval of its change, bytes, and time per phase."""
    tuning = Tuning(model, batches, None, Settings(), None)
    tuning.prepare()
    plans: dict[str, dict[str, Scheme]] = {
        str(one): dict.fromkeys(tuning.layers, one.scheme) for one in candidates.DEFAULT if one.key != "none"
    }
    plans[TUNED] = dict(plan.layers)
    times = tuning.timer.time(plans, "time")
    calls = {phase.name: phase.calls for phase in tuning.workload.phases}

    def request(label: str) -> float:
        return sum(count * times[label][name].median_us for name, count in calls.items())

    baseline = float(tuning.meter.baseline().double().mean())
    rows = []
    for label, assignment in {UNQUANTIZED: {}, **plans}.items():
        found = tuning.meter.difference(assignment)
        rows.append(
            {
                "plan": label or "none",
                "perplexity": math.exp(baseline + found.mean),
                "change": math.expm1(found.mean),
                "low": math.expm1(found.low),
                "high": math.expm1(found.high),
                "weight_bytes": tuning.costs.weight_bytes(assignment),
                "time_ms": {name: one.median_us / 1e3 for name, one in times[label].items()},
                "low_ms": {name: one.low_us / 1e3 for name, one in times[label].items()},
                "high_ms": {name: one.high_us / 1e3 for name, one in times[label].items()},
                "ratio": {
                    name: one.median_us / times[UNQUANTIZED][name].median_us for name, one in times[label].items()
                },
                "request_ratio": request(label) / request(UNQUANTIZED),
            }
        )
    return rows


def replay(model: torch.nn.Module, path: Path, tokens: torch.Tensor) -> dict[str, object]:
    """Seconds to load and apply the plan file, and whether two models it was applied to answer the same bits."""
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    autoq.apply(first, Plan.load(path))
    begin = time.perf_counter()
    autoq.autoquant(second, plan=path)
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        equal = torch.equal(first(tokens, logits_to_keep=8).logits, second(tokens, logits_to_keep=8).logits)
    return {"seconds": seconds, "bit_equal": equal}


if __name__ == "__main__":
    main()
