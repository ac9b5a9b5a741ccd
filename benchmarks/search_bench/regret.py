"""Problems small enough to measure every plan: by how much the search's plan is slower than the best there is."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoq.evaluation import model_losses
from autoq.prefix import Prefix
from autoq.profiler.end_to_end import repeated_blocks
from autoq.scheme import NONE, Scheme
from autoq.search import Assignment, Evaluation, Option, Problem, Unit, search
from autoq.studies import digest
from autoq.ties import units as tied_units
from autoq.tuning import Tuning
from search_bench import frozen as freezing
from search_bench.frozen import Frozen
from search_bench.ours import limit
from search_bench.store import LossStore, as_evaluation

BLOCK_SCHEMES = ("none", "int8dq", "fp6(format=e2m3)", "int4wo-hqq(group_size=64)")
SMALL_SCHEMES = ("none", "int8dq", "int4wo-hqq(group_size=64)")
_WIDTHS = (512, 2048, 1024, 1024, 2048, 512, 64)
_SAMPLES = 256
_SHARES = (0.2, 0.4, 0.6, 0.8)  # quantiles of all plans' losses, taken as limits
_TRIALS = 40

Changes = Mapping[Assignment, Sequence[float]]


def every_plan(problem: Problem) -> list[Assignment]:
    """All assignments."""
    return list(itertools.product(*(range(len(unit.options)) for unit in problem.units)))


def regrets(
    problem: Problem, families: Mapping[str, str], changes: Changes, *, n_trials: int = _TRIALS, seeds: int = 1
) -> list[dict[str, Any]]:
    """One row per limit and seed: the best plan there is, the search's, and how much slower it is.

    Args:
        problem: with predicted losses; the search does not see ``changes`` but through its evaluations.
        families: unit → family.
        changes: every plan's change of the loss per sample.
        n_trials: plans the search may measure.
        seeds: searches for each limit.
    """
    evaluations = {plan: as_evaluation(found) for plan, found in changes.items()}
    highs = sorted(evaluation.high for evaluation in evaluations.values())
    rows = []
    for share in _SHARES:
        max_loss = highs[int(share * (len(highs) - 1))]
        if not max_loss > 0:
            continue
        best = min(problem.time_us(plan) for plan, one in evaluations.items() if one.high <= max_loss)
        for seed in range(seeds):
            found, used = _searched(problem, families, evaluations, max_loss, n_trials, seed)
            rows.append(
                {
                    "max_loss": max_loss,
                    "seed": seed,
                    "best_us": best,
                    "found_us": found,
                    "regret": found / best - 1.0,
                    "evaluations": used,
                    "plans": len(evaluations),
                }
            )
    return rows


def _searched(
    problem: Problem,
    families: Mapping[str, str],
    evaluations: Mapping[Assignment, Evaluation],
    max_loss: float,
    n_trials: int,
    seed: int,
) -> tuple[float, int]:
    """Time of the best plan the search finds within the limit, and how many plans it measured."""

    def evaluate(schemes: Mapping[str, str], fidelity: int) -> Evaluation:
        return evaluations[problem.assignment(schemes)]

    offered = dict.fromkeys(option.scheme for unit in problem.units for option in unit.options)
    with tempfile.TemporaryDirectory() as folder:
        result = search(
            problem,
            evaluate=evaluate,
            budget=limit(max_loss),
            families=families,
            uniform={scheme: problem.uniform(scheme) for scheme in offered},
            storage=Path(folder) / "study.journal",
            fingerprint="every plan",
            n_trials=n_trials,
            fidelities=1,
            seed=seed,
        )
    return (result.finalists[0].time_us if result.finalists else math.inf), len(result.points)


def sub_problem(frozen: Frozen, groups: Mapping[str, Sequence[str]], schemes: Sequence[str]) -> Problem:
    """The decisions of some layers only, in groups, among some schemes; nothing else counts."""
    of = {unit.name: {option.scheme: option for option in unit.options} for unit in frozen.problem.units}

    def option(layers: Sequence[str], scheme: str) -> Option:
        parts = [of[layer][scheme] for layer in layers]
        return Option(
            scheme=scheme,
            time_us=sum(one.time_us for one in parts),
            loss=sum(one.loss for one in parts),
            bytes=sum(one.bytes for one in parts),
        )

    return Problem(
        units=tuple(
            Unit(name=name, layers=tuple(layers), options=tuple(option(layers, scheme) for scheme in schemes))
            for name, layers in groups.items()
        )
    )


def block_problem(frozen: Frozen, tuning: Tuning) -> Problem:
    """The last block: layers that read the same input decide together, four schemes each."""
    groups = tied_units(tuning.workload, ("siblings",), tuning.settings.candidates)
    blocks = repeated_blocks(tuning.model)
    last = set(blocks[-1].modules())
    inside = {name for name, module in tuning.model.named_modules() if module in last}
    mine = {
        "+".join(layer.rpartition(".")[2] for layer in layers): layers
        for layers in groups.values()
        if layers[0] in inside
    }
    return sub_problem(frozen, mine, BLOCK_SCHEMES)


def block_changes(
    problem: Problem, tuning: Tuning, store: LossStore, rows: int, say: Callable[[str], None]
) -> dict[Assignment, list[float]]:
    """Every plan's change of the loss per row, all other layers unquantized; the blocks before run once."""
    everything = dict.fromkeys(tuning.layers, str(NONE))
    plans = {plan: everything | problem.schemes(plan) for plan in every_plan(problem)}
    keys = {plan: digest(schemes) for plan, schemes in plans.items()}
    missing = [plan for plan, key in keys.items() if store.get(key, rows) is None]
    if missing:
        measure = _prefixed(tuning, rows)
        baseline = measure(everything)
        for done, plan in enumerate(missing):
            store.put(keys[plan], (measure(plans[plan]) - baseline).tolist())
            if done % 16 == 0:
                say(f"{done} of {len(missing)} plans of the last block")
    found = {plan: store.get(key, rows) for plan, key in keys.items()}
    return {plan: changes for plan, changes in found.items() if changes is not None}


def _prefixed(tuning: Tuning, rows: int) -> Callable[[Mapping[str, str]], Tensor]:
    """Losses per row, float64 [rows], of plans that change the last block only."""
    meter = tuning.meter
    batches, seen = [], 0
    for batch in meter.batches:
        if seen < rows:
            batches.append(batch)
            seen += batch.kwargs["input_ids"].shape[0]
    shadow = meter.shadow
    shadow.assign({})
    blocks = repeated_blocks(shadow.model)
    with shadow.exact_products():
        prefix = Prefix(shadow.model, blocks, batches)

    def measure(schemes: Mapping[str, str]) -> Tensor:
        shadow.assign({layer: Scheme.parse(scheme) for layer, scheme in schemes.items()})
        parts = []
        with shadow.exact_products():
            for index, batch in enumerate(batches):
                with prefix.from_block(len(blocks) - 1, index):
                    parts.append(model_losses(shadow.model, [batch], meter.metric))
        return torch.cat(parts).double()

    return measure


class SmallModel(nn.Module):
    """Six linear layers of different widths with heavy-tailed weights, so that they bear quantization differently."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList()
        for number, (k, n) in enumerate(itertools.pairwise(_WIDTHS)):
            layer = nn.Linear(k, n, bias=False)
            normal = torch.randn(n, k, generator=generator)
            tails = torch.exp(0.2 * number * torch.randn(n, k, generator=generator))
            layer.weight.data = normal * tails / (normal * tails).norm() * n**0.5
            self.layers.append(layer)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers[:-1]:
            x = torch.nn.functional.gelu(layer(x))
        return {"logits": self.layers[-1](x)}


def small_problem(cache: Path | None) -> tuple[Frozen, Problem, dict[Assignment, list[float]]]:
    """The model of six layers: its problem with modelled times, and every plan's measured loss per sample."""
    inputs = torch.randn(_SAMPLES, _WIDTHS[0], generator=torch.Generator().manual_seed(1))
    tuning = freezing.other_tuning(SmallModel().eval(), inputs, inputs[:1], SMALL_SCHEMES, cache)
    found = freezing.prepare(tuning).frozen({"model": "six layers"})
    problem = replace(found.problem, fixed_time_us=0.0, fixed_bytes=0)
    baseline = tuning.meter.baseline().double()
    changes = {}
    for plan in every_plan(problem):
        schemes = {layer: Scheme.parse(scheme) for layer, scheme in problem.schemes(plan).items()}
        changes[plan] = (tuning.meter.losses(schemes).double() - baseline).tolist()
    return found, problem, changes
