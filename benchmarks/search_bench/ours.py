"""The search itself on the frozen problem, with everything it evaluates counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoq import estimates, pairs
from autoq.judging import Judge
from autoq.search import Assignment, Budget, Evaluation, SearchResult, search
from search_bench.fronts import LOSS_UNIT, Plan
from search_bench.frozen import Frozen
from search_bench.store import UNIT_TOKENS, Measurer

# The scores' tokens run forward and, at twice the price, backward.
_SCORED_TOKENS = 3 * 2048
# The reference's searches: their limits lie between LOSS_UNIT and a twentieth of it, evenly in the logarithm.
_SEARCHES, _RANGE, _GOLDEN = 100, 20.0, (5**0.5 - 1) / 2


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a search begins with.

    Attributes:
        frozen: the problem, its losses calibrated by pairs measured one at a time.
        tokens: evaluated for the scores and for the pairs, whatever a cache had of them.
    """

    frozen: Frozen
    tokens: Mapping[str, int]


def limit(max_loss: float) -> Budget:
    """The least latency within a loss."""
    return Budget(objective="latency", max_loss=max_loss)


def start(frozen: Frozen, judge: Judge, scores: Sequence[Mapping[str, Any]], *, count: int = pairs.COUNT) -> Start:
    """Calibrate the problem's losses as ``tune`` does.

    Args:
        frozen: with the scores as losses.
        judge: measures pairs; what its cache has is not measured again, but is counted.
        scores: the sensitivity rows.
        count: pairs; 0 leaves the scores as they are.
    """
    tokens = {"scores": _SCORED_TOKENS}
    if count == 0:
        return Start(frozen=frozen, tokens=tokens)
    budget = limit(LOSS_UNIT)
    chosen = pairs.close(frozen.problem, budget, scores, count)
    rows = judge.measured_pairs(frozen.problem, budget, scores, lambda *_: None, count=count)
    per_pair = pairs.sample(judge.meter.batches, judge.meter.metric)[1]
    wanted = set(chosen)
    kept = [row if (row["layer"], row["scheme"]) in wanted else row | {"measured": None} for row in rows]
    losses = estimates.calibrated(kept, frozen.families)
    return Start(frozen=frozen.with_losses(losses), tokens=tokens | {"pairs": (len(chosen) + 1) * per_pair})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a search found and what it cost.

    Attributes:
        result: the search's own.
        tokens: evaluated tokens by purpose.
    """

    result: SearchResult
    tokens: Mapping[str, int]

    @property
    def evaluations(self) -> int:
        """Tokens in units of 4,096, rounded up."""
        return math.ceil(sum(self.tokens.values()) / UNIT_TOKENS)


def run(
    begin: Start, measuring: Measurer, rows: int, folder: Path, *, n_trials: int, max_loss: float, seed: int
) -> Outcome:
    """Search the problem; every plan is measured on the same rows, through the store.

    Args:
        begin: the problem and what it cost so far.
        measuring: gives losses.
        rows: of 512 tokens, for every plan.
        folder: for the study; a study that is there goes on.
        n_trials: plans at most.
        max_loss: the limit.
        seed: of the search.
    """
    frozen = begin.frozen

    def evaluate(schemes: Mapping[str, str], fidelity: int) -> Evaluation:
        return measuring.evaluation(schemes, rows)

    result = search(
        frozen.problem,
        evaluate=evaluate,
        budget=limit(max_loss),
        families=frozen.families,
        uniform=frozen.uniform,
        storage=folder / f"ours-{max_loss:g}-{seed}.journal",
        fingerprint=f"{frozen.about['weights']}-{frozen.about['batches']}-{rows}",
        n_trials=n_trials,
        fidelities=1,
        seed=seed,
    )
    tokens = dict(begin.tokens) | {"plans": len(result.points) * rows * 512}
    return Outcome(result=result, tokens=tokens)


def affordable(begin: Start, rows: int, units: int) -> int:
    """How many plans may be measured within so many units of 4,096 tokens in all."""
    return (units * UNIT_TOKENS - sum(begin.tokens.values())) // (rows * 512)


def plans(frozen: Frozen, result: SearchResult) -> dict[Assignment, Plan]:
    """The measured plans on the two axes, in order."""
    return {
        point.assignment: Plan(ratio=frozen.ratio(point.assignment), loss=point.evaluation.loss_delta)
        for point in result.points
        if point.full
    }


def long_run(
    begin: Start, measuring: Measurer, rows: int, folder: Path, *, n_trials: int, say: Any = print
) -> tuple[list[Plan], list[dict[str, Any]]]:
    """So many different plans by searches one after another: each stops when it learns nothing more.

    The limits differ, so that every part of the front is searched. What was measured is in the store, and each study
    in its file: interrupted, the same command goes on.

    Returns:
        The plans in the order measured, and the searches they come from.
    """
    found: dict[Assignment, Plan] = {}
    searches: list[dict[str, Any]] = []
    for seed in range(_SEARCHES):
        max_loss = LOSS_UNIT * _RANGE ** -(seed * _GOLDEN % 1.0)
        left = n_trials - len(found)
        if left <= 0:
            break
        wanted = left + (len(begin.frozen.uniform) if found else 0)  # the uniform plans are in every search
        outcome = run(begin, measuring, rows, folder, n_trials=wanted, max_loss=max_loss, seed=seed)
        new = {key: plan for key, plan in plans(begin.frozen, outcome.result).items() if key not in found}
        found |= new
        searches.append({"max_loss": max_loss, "seed": seed, "new_plans": len(new)})
        say(f"limit {max_loss:g}, seed {seed}: {len(new)} new plans, {len(found)} of {n_trials}")
    return list(found.values())[:n_trials], searches
