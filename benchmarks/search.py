"""How good the search is: against brute force, a long reference run, and Optuna's samplers on raw assignments.

    python benchmarks/search.py --text valid.txt --json out.json                  every figure
    python benchmarks/search.py --text valid.txt --json out.json --parts front    some; the file's others stay
    python benchmarks/search.py --table out.json                                  print them again

before the first run, and once (hours; interrupted, the same command goes on):

    python benchmarks/search.py prepare --text valid.txt        the problem: times, bytes, scores of SmolLM2
    python benchmarks/search.py baselines --text valid.txt      NSGA-II and TPE, 100 plans each
    python benchmarks/search.py reference --text valid.txt      300 plans, into benchmarks/search_reference.json

Plans are judged on the first 8 rows of 512 tokens. Every measured loss is kept in build/search/losses.jsonl and no
part measures a plan again, but a plan counts for whoever asks for it. The reference file holds the times that its
areas were computed with; the front is computed with them on every machine.
After a change of the search remove build/search/reference, whose studies would go on; the losses may stay.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from search_bench import accuracy, baselines, cost, ours, regret, report
from search_bench.bench import (
    LONG,
    REFERENCE,
    ROWS,
    SHORT,
    UNITS,
    Bench,
    baseline_plans,
    measure_front,
    rounded,
    say,
    uniform_plans,
    write_json,
)
from search_bench.fronts import gain

from autoq import pairs
from autoq.errors import AutoqError

PARTS = ("regret-block", "regret-small", "front", "spearman", "latency", "cold", "warm", "knapsack")
COMMANDS = ("figures", "prepare", "baselines", "reference", "once")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="?", choices=COMMANDS, default="figures")
    parser.add_argument("--text", type=Path, help="UTF-8 text that plans are judged by; default: Python's own")
    parser.add_argument("--model", default="smollm2", help="as for the autoq command")
    parser.add_argument("--json", type=Path, help="file for the figures; those of other parts in it stay")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}; default all")
    parser.add_argument("--table", type=Path, help="print the tables of a file")
    parser.add_argument("--work", type=Path, default=Path("build/search"), help="folder of all that was measured")
    parser.add_argument("--cache", type=Path, help="autoq's cache folder; default ~/.cache/autoq")
    parser.add_argument("--reference", type=Path, default=Path(__file__).parent / "search_reference.json")
    parser.add_argument("--trials", type=int, help=f"plans of a baseline ({LONG}) or of the reference ({REFERENCE})")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each search, ours and the baselines', from 0 up")
    parser.add_argument("--units", type=int, default=UNITS, help="evaluations of 4,096 tokens that ours may take")
    parser.add_argument("--pairs", type=int, default=pairs.COUNT, help="losses measured one layer at a time; 0: none")
    parser.add_argument("--max-degradation", type=float, default=0.05, help="budget of one tuning (once)")
    options = parser.parse_args(arguments)
    options.parts = set(options.parts.split(","))
    if options.parts - set(PARTS):
        parser.error(f"--parts are of {', '.join(PARTS)}, not {', '.join(sorted(options.parts - set(PARTS)))}")
    return options


def prepare(bench: Bench) -> None:
    tuning = bench.tuning
    about = {
        "model": bench.options.model,
        "weights": tuning.weights_hash,
        "batches": tuning.identity()["batches"],
        "device": tuning.fingerprint.to_json(),
    }
    found = bench.prepared.frozen(about)
    found.save(bench.work / "problem.json")
    for scheme, plan in found.uniform.items():
        print(f"{scheme:32} ratio {found.ratio(plan):.4f}  score {found.problem.loss(plan):.4f}")


def run_baselines(bench: Bench) -> None:
    frozen, measuring, options = bench.frozen, bench.measurer(), bench.options

    def measure(assignment: ours.Assignment) -> float:
        return statistics.fmean(measuring.changes(frozen.problem.schemes(assignment), ROWS))

    for seed in range(options.seeds):
        studies = {name: baselines.open_study(bench.work, name, seed) for name in baselines.SAMPLERS}
        for wanted in range(1, (options.trials or LONG) + 1):  # in turn, so that they can be compared at any time
            for name, study in studies.items():
                if len(baselines.finished(study)) >= wanted:
                    continue
                begin = time.perf_counter()
                ratio, loss = baselines.step(study, name, seed, frozen, measure).values
                seconds = time.perf_counter() - begin
                print(f"{name} {seed} {wanted}: ratio {ratio:.4f} loss {loss:+.4f} ({seconds:.1f} s)", flush=True)


def run_reference(bench: Bench) -> None:
    frozen, count = bench.frozen, bench.options.trials or REFERENCE
    found, searches = ours.long_run(
        bench.start, bench.measurer(), ROWS, bench.work / "reference", n_trials=count, say=say
    )
    uniform = uniform_plans(bench)
    content = {
        "command": f"benchmarks/search.py reference --text TEXT --trials {count}",
        "date": datetime.date.today().isoformat(),
        "about": frozen.about,
        "tokens_per_plan": ROWS * 512,
        "searches": searches,
        "gain": gain(found, uniform.values()),
        "gain_after": {str(n): gain(found[:n], uniform.values()) for n in (SHORT, LONG, 200) if n <= len(found)},
        "uniform": {name: rounded(plan) for name, plan in uniform.items()},
        "plans": [rounded(plan) for plan in found],
        "baselines": {name: [rounded(plan) for plan in plans] for name, plans in baseline_plans(bench).items()},
        "times": frozen.times(),
    }
    write_json(bench.options.reference, content)
    print(f"{len(found)} plans, gain over the uniform front {content['gain']:.5f}")


def measure_spearman(bench: Bench) -> dict[str, Any]:
    models = {
        "scores": bench.frozen.problem,
        "calibrated by pairs": bench.start.frozen.problem,
        "fitted to our search": bench.outcome(0).result.refitted,
    }
    found = accuracy.losses(bench.frozen, models, bench.measurer(), ROWS, count=40, seed=1, say=say)
    best = found["models"]["fitted to our search"]
    return {"spearman": best["spearman"], "spearman_small": best["spearman_small"], "spearman_details": found}


def measure_latency(bench: Bench) -> dict[str, Any]:
    here = bench.prepared.frozen(bench.frozen.about)
    found = accuracy.latencies(bench.prepared, here, count=20, seed=2)
    return {"latency_error_median": found["median"], "latency_details": found}


def measure_block(bench: Bench) -> dict[str, Any]:
    problem = regret.block_problem(bench.frozen, bench.tuning)
    changes = regret.block_changes(problem, bench.tuning, bench.store, ROWS, say)
    families = {unit.name: unit.name for unit in problem.units}
    return {"regret_block": regret.regrets(problem, families, changes, seeds=bench.options.seeds)}


def measure_small(bench: Bench) -> dict[str, Any]:
    frozen, problem, changes = regret.small_problem(bench.options.cache)
    return {"regret_small": regret.regrets(problem, frozen.families, changes, seeds=bench.options.seeds)}


def measure_seconds(bench: Bench) -> dict[str, Any]:
    options = bench.options
    return cost.cold_and_warm(Path(__file__), options.model, options.text, options.parts)


def measure_knapsack(bench: Bench) -> dict[str, Any]:
    found = cost.knapsack()
    return {"knapsack": found, "knapsack_s": max(row["seconds"] for row in found.values())}


MEASURES = {
    "knapsack": measure_knapsack,
    "regret-small": measure_small,
    "regret-block": measure_block,
    "front": measure_front,
    "spearman": measure_spearman,
    "latency": measure_latency,
    "cold": measure_seconds,
    "warm": measure_seconds,
}


def figures(bench: Bench) -> None:
    options = bench.options
    path: Path | None = options.json
    data: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    wanted = options.parts - ({"warm"} if "cold" in options.parts else set())  # cold measures both
    for part in (name for name in MEASURES if name in wanted):
        say(part)
        data |= MEASURES[part](bench)
        worst = [row["regret"] for name in ("regret_block", "regret_small") for row in data.get(name, [])]
        data |= {"regret": max(worst)} if worst else {}
        if path is not None:
            write_json(path, data)
    show(data)


def show(data: dict[str, Any]) -> None:
    print(report.tables(data), end="\n\n")
    print(report.figures(data))


def main() -> None:
    options = parse()
    if options.table:
        show(json.loads(options.table.read_text()))
    elif options.command == "once":  # in a process of its own, see ``cost.fresh``
        write_json(options.json, cost.tune_once(options.model, options.text, options.cache, options.max_degradation))
    else:
        commands = {"figures": figures, "prepare": prepare, "baselines": run_baselines, "reference": run_reference}
        commands[options.command](Bench(options))


if __name__ == "__main__":
    try:
        main()
    except AutoqError as problem:
        sys.exit(str(problem))
