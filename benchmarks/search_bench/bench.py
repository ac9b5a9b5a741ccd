"""What the parts of the benchmark share: the problem, the losses, our search and the others' plans."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from autoq._files import write_atomic
from autoq.errors import InputError
from search_bench import baselines, ours
from search_bench import frozen as freezing
from search_bench.fronts import LOSS_UNIT, Plan, gain, hypervolume
from search_bench.frozen import Frozen, Prepared
from search_bench.store import LossStore, Measurer

ROWS = 8  # of 512 tokens: one evaluation of 4,096
TEXT_ROWS = 32
UNITS = 49  # evaluations that ours may take: 200,704 tokens
SHORT, LONG, REFERENCE = 40, 100, 300


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text), InputError)


def say(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Bench:
    """What the parts share, each made when first needed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work
        self._outcomes: dict[int, ours.Outcome] = {}

    @cached_property
    def tuning(self) -> freezing.Tuning:
        """SmolLM2's tuning, recorded."""
        options = self.options
        return freezing.language_tuning(
            options.model, options.text, TEXT_ROWS, options.cache, lambda *stage: say(" ".join(map(str, stage)))
        )

    @cached_property
    def reference(self) -> dict[str, Any] | None:
        """The reference run, if it was made."""
        path: Path = self.options.reference
        return json.loads(path.read_text()) if path.is_file() else None

    @cached_property
    def frozen(self) -> Frozen:
        """The problem, at the reference's times if there is one.

        Raises:
            InputError: if it was made of another model or text.
        """
        found = Frozen.load(self.work / "problem.json")
        now = {"weights": self.tuning.weights_hash, "batches": self.tuning.identity()["batches"]}
        differing = [name for name, value in now.items() if found.about[name] != value]
        if differing:
            raise InputError("the problem was made of this model and text", got=f"other {', '.join(differing)}")
        return found if self.reference is None else found.with_times(self.reference["times"])

    @cached_property
    def store(self) -> LossStore:
        """Losses measured by any part."""
        return LossStore(self.work / "losses.jsonl", f"{self.frozen.about['weights']}-{self.frozen.about['batches']}")

    def measurer(self) -> Measurer:
        """Losses of plans, counted from zero."""
        return Measurer(self.tuning.meter, self.store)

    @cached_property
    def prepared(self) -> Prepared:
        """This machine's measurements, from the cache where it has them."""
        return freezing.prepare(self.tuning)

    @cached_property
    def start(self) -> ours.Start:
        """The problem with calibrated losses."""
        judge = self.tuning.judge()
        scores = judge.scores(lambda *_: None)
        return ours.start(self.frozen, judge, scores, count=self.options.pairs)

    def outcome(self, seed: int) -> ours.Outcome:
        """Our search within the units; it starts afresh, and finds in the store what was measured before."""
        if seed not in self._outcomes:
            n_trials = ours.affordable(self.start, ROWS, self.options.units)
            with tempfile.TemporaryDirectory() as folder:
                self._outcomes[seed] = ours.run(
                    self.start,
                    self.measurer(),
                    ROWS,
                    Path(folder),
                    n_trials=n_trials,
                    max_loss=LOSS_UNIT,
                    seed=seed,
                )
        return self._outcomes[seed]


def rounded(plan: Plan) -> list[float]:
    return [round(value, 7) for value in plan]


def uniform_plans(bench: Bench) -> dict[str, Plan]:
    measuring, frozen = bench.measurer(), bench.frozen
    return {
        name: Plan(frozen.ratio(plan), statistics.fmean(measuring.changes(frozen.problem.schemes(plan), ROWS)))
        for name, plan in frozen.uniform.items()
    }


def baseline_plans(bench: Bench) -> dict[str, list[Plan]]:
    """The baselines' plans by ``sampler-seed``, from their studies; else from the reference file."""
    found = {
        path.stem: baselines.plans(baselines.open_study(bench.work, *_sampler_and_seed(path)), bench.frozen)
        for name in baselines.SAMPLERS
        for path in sorted(bench.work.glob(f"{name}-*.journal"))
    }
    if found or bench.reference is None:
        return found
    return {name: [Plan(*plan) for plan in plans] for name, plans in bench.reference["baselines"].items()}


def _sampler_and_seed(path: Path) -> tuple[str, int]:
    sampler, _, seed = path.stem.rpartition("-")
    return sampler, int(seed)


def measure_front(bench: Bench) -> dict[str, Any]:
    """Every search's gain over the uniform front; the ratios are of means over the seeds."""
    outcomes = [bench.outcome(seed) for seed in range(bench.options.seeds)]
    uniform = uniform_plans(bench)
    fronts = [list(ours.plans(bench.frozen, one.result).values()) for one in outcomes]
    mine = [_front_row(f"ours-{seed}", plans, uniform) for seed, plans in enumerate(fronts)]
    rows = [_front_row("uniform", list(uniform.values()), uniform), *mine]
    found: dict[str, Any] = {"evaluations": max(one.evaluations for one in outcomes)}
    gains: dict[str, list[float]] = {}
    for name, plans in sorted(baseline_plans(bench).items()):
        for key, count in (("", SHORT), ("_long", LONG)):
            if len(plans) < count:
                say(f"{name} has {len(plans)} of {count} plans")
                continue
            rows.append(_front_row(f"{name}, {count}", plans[:count], uniform))
            gains.setdefault(f"{name.rpartition('-')[0]}{key}_ratio", []).append(rows[-1]["gain"])
    ours_gain = statistics.fmean(row["gain"] for row in mine)
    for key, theirs in gains.items():  # None where theirs is no more than the uniform plans
        found[key] = ours_gain / statistics.fmean(theirs) if max(theirs) > 0 else None
    if bench.reference is not None:
        long = [Plan(*plan) for plan in bench.reference["plans"]]
        rows.append(_front_row("reference", long, uniform))
        found["hypervolume_ratio"] = ours_gain / max(rows[-1]["gain"], 1e-12)
    details = {
        "rows": rows,
        "tokens": dict(outcomes[0].tokens),
        "plans": [[rounded(plan) for plan in plans] for plans in fronts],
        "labels": [[point.label for point in one.result.points if point.full] for one in outcomes],
    }
    return found | {"front": details}


def _front_row(name: str, plans: list[Plan], uniform: dict[str, Plan]) -> dict[str, Any]:
    area = hypervolume([*plans, *uniform.values()])
    return {"name": name, "plans": len(plans), "hypervolume": area, "gain": gain(plans, uniform.values())}
