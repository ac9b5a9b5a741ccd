"""One layer quantized at a time: which of these losses are worth measuring, and what they are.

A pair is a (layer, scheme). Its score comes from gradients; a short measurement of a few pairs, chosen where the
knapsack's decision is close, replaces their scores and calibrates the others'.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from autoq.errors import ModelError
from autoq.estimates import Pair, role
from autoq.evaluation import Difference, paired
from autoq.knapsack import Metric as Axis
from autoq.knapsack import Problem, Unit, frontier
from autoq.losses import Batch, Metric, OutputKL, RelativeRMS, TokenNLL, logits_of
from autoq.precise import Precise
from autoq.prefix import Prefix
from autoq.profiler.end_to_end import repeated_blocks
from autoq.scheme import Scheme
from autoq.search_values import Budget
from autoq.shadow import PackedStore

# What a model may raise that expects its own dtype.
_FAILURES = (RuntimeError, TypeError, ValueError, AssertionError, LookupError, AttributeError)
Progress = Callable[[str, int, int], None]

TOKENS = 1024  # on which a pair is measured
BATCHES = 4  # the same for models without tokens
COUNT = 24  # pairs measured by default
_RUN = 64  # predictions of one text whose mean divergence is one sample
_LIMIT_SHARES = (0.5, 1.0, 2.0)  # of the limit, at which decisions are looked at: plans' losses do not quite add up
_PER_SCHEME = 3  # pairs of every scheme, to calibrate its others
_SPREAD = 0.4  # standard deviation of the logarithm of measured loss over score


class _PredictionKL:
    """KL divergence of next-token predictions from those seen first of a batch: the unquantized model's.

    It estimates the same rise in nats as the likelihood of the text's own tokens, with a fraction of the noise: what
    quantization changes at random, up for one token and down for the next, does not enter it to first order.
    """

    name = "kl"

    def __init__(self) -> None:
        self._reference: dict[int, Tensor] = {}

    def losses(self, outputs: Any, index: int, batch: Batch) -> Tensor:
        """Means over runs of predictions, float32 [rows × runs]."""
        logits_BLV = logits_of(outputs)
        assert logits_BLV is not None  # token NLL has been computed of them
        if index not in self._reference:
            self._reference[index] = logits_BLV.detach()
        parts = []
        for before_LV, now_LV in zip(self._reference[index][:, :-1], logits_BLV[:, :-1], strict=True):
            before, now = F.log_softmax(before_LV.float(), dim=-1), F.log_softmax(now_LV.float(), dim=-1)
            divergence_L = (before.exp() * before.sub_(now)).sum(dim=-1) if before_LV is not now_LV else now[:, 0] * 0
            parts += [run.mean() for run in torch.split(divergence_L, _RUN)]
        return torch.stack(parts)


class _SquaredRMS(RelativeRMS):
    """The square of the relative RMS, which is what adds up over layers and what scores predict."""

    def losses(self, outputs: Any, index: int, batch: Batch) -> Tensor:
        """One square per sample."""
        return super().losses(outputs, index, batch).square()


def distance(metric: Metric) -> _PredictionKL | Metric:
    """What pairs are measured by, on the scale of the metric's scores; with no reference outputs yet."""
    if isinstance(metric, TokenNLL):
        return _PredictionKL()
    if isinstance(metric, RelativeRMS):
        return _SquaredRMS()
    return OutputKL() if isinstance(metric, OutputKL) else metric


def sample(batches: Sequence[Batch], metric: Metric, tokens: int = TOKENS) -> tuple[list[Batch], int]:
    """The first token rows that hold a number of tokens, and how many they do; else the first few batches and 0."""
    if not isinstance(metric, TokenNLL):
        return list(batches[:BATCHES]), 0
    chosen: list[Batch] = []
    left = tokens
    for batch in batches:
        ids = batch.kwargs.get("input_ids")
        if left <= 0 or not isinstance(ids, Tensor):
            break
        rows, length = min(len(ids), -(-left // ids.shape[1])), max(2, min(tokens, ids.shape[1]))
        cut = {name: _cut(value, ids, rows, length) for name, value in batch.kwargs.items()}
        chosen.append(Batch.of(cut))
        left -= cut["input_ids"].numel()
    return (chosen, tokens - left) if chosen else (list(batches[:1]), 0)


def _cut(value: Any, ids: Tensor, rows: int, length: int) -> Any:
    """The part of an argument that belongs to the first rows' first tokens."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() > 1 and value.shape[1] == ids.shape[1] and value.shape[0] in (1, len(ids)):
        return value[:rows, :length]
    if value.shape[:1] == ids.shape[1:]:
        return value[:length]
    return value[:rows] if value.shape[:1] == ids.shape[:1] else value


def measure(
    model: nn.Module,
    store: PackedStore,
    metric: Metric,
    batches: Sequence[Batch],
    pairs: Iterable[tuple[str, Scheme]],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[Pair, Difference]:
    """The loss with only one layer quantized, paired with the unquantized model's, both computed in float32.

    Of a causal language model it is the KL divergence of the predictions, bootstrapped by runs of predictions; else
    the metric itself, bootstrapped by sample. A pair whose loss is no finite number is left out. Blocks before the
    quantized layer run once for all pairs.

    Args:
        model: the unquantized model; a copy of it runs.
        store: the layers and their packed weights.
        metric: what plans are judged by.
        batches: what is measured on, see ``sample``.
        pairs: layers and schemes without mixes; they are measured in the order of the model's blocks.
        seed: of the bootstrap.
        progress: called with (layer and scheme, done, total).

    Raises:
        ModelError: if the model does not run in float32.
    """
    with _in_float32():
        precise, kind = Precise(model, store), distance(metric)
        before: list[Tensor] = []

        def seen(index: int, outputs: Any) -> None:
            before.append(kind.losses(outputs, index, batches[index]).cpu())

        prefix = Prefix(precise.model, repeated_blocks(precise.model), batches, seen=seen)
        baseline = torch.cat(before)
        order = sorted(pairs, key=lambda pair: (prefix.start(pair[0]), pair[0], str(pair[1])))
        found: dict[Pair, Difference] = {}
        for done, (layer, scheme) in enumerate(order, 1):
            parts = []
            with precise.quantized(layer, scheme), torch.no_grad():
                for index, batch in enumerate(batches):
                    with prefix.from_block(prefix.start(layer), index):
                        parts.append(kind.losses(batch.call(precise.model), index, batch).cpu())
            losses = torch.cat(parts)
            if torch.isfinite(losses).all():  # else the scheme breaks the layer, which the score has to say
                found[layer, str(scheme)] = paired(losses, baseline, seed=seed)
            if progress is not None:
                progress(f"{layer} {scheme}", done, len(order))
        return found


@contextmanager
def _in_float32() -> Iterator[None]:
    """What a model raises that insists on its own dtype, as an error that says so."""
    try:
        yield
    except torch.OutOfMemoryError as problem:
        raise ModelError("a copy's activations in float32 fit the memory", got=str(problem)) from problem
    except _FAILURES as problem:
        raise ModelError("the model runs in float32", got=f"{type(problem).__name__}: {problem}") from problem


def close(problem: Problem, budget: Budget, scores: Sequence[Mapping[str, Any]], count: int = COUNT) -> list[Pair]:
    """The pairs most worth measuring, the best first.

    With a price on the loss, the one at which the knapsack meets its limit, every unit decides alone. A measurement
    is worth what it is expected to save there: by showing that an option passed over is better than the one chosen,
    or that the one chosen is worse than the next. That is large where the costs are close against the uncertainty of
    the score, and where much is at stake. Of every scheme and every role of layers (the last parts of their names) the
    pairs worth most are taken in turn, so that both can be calibrated.

    Args:
        problem: with the scores as losses.
        budget: objective and limits.
        scores: sensitivity rows; of a unit's layers, that with the highest score is taken.
        count: pairs wanted, at most.
    """
    score = {(row["layer"], row["scheme"]): row["score"] for row in scores}
    worth: dict[Pair, tuple[float, float]] = {}
    prices = [_price(problem, budget, share) for share in _LIMIT_SHARES]
    for unit in problem.units:
        gains = [sum(gain) for gain in zip(*(_gains(unit, axis, price) for axis, price in prices), strict=True)]
        for option, gain in zip(unit.options, gains, strict=True):
            layer = max(unit.layers, key=lambda one: score.get((one, option.scheme), -math.inf))
            if option.loss > 0 and (layer, option.scheme) in score:
                worth[layer, option.scheme] = (gain, option.loss)
    ranked = sorted(worth, key=lambda pair: worth[pair], reverse=True)
    chosen: dict[Pair, None] = {}
    used: Counter[str] = Counter()  # by role

    def choose(candidates: Sequence[Pair]) -> None:
        """The one whose role was chosen least; of equals the first, worth most."""
        if candidates:
            pair = min(candidates, key=lambda pair: used[role(pair[0])])
            chosen[pair] = None
            used[role(pair[0])] += 1

    for scheme in [*dict.fromkeys(scheme for _, scheme in ranked)] * _PER_SCHEME:
        choose([pair for pair in ranked if pair[1] == scheme and pair not in chosen])
    while len(chosen) < min(count, len(ranked)):
        choose([pair for pair in ranked if pair not in chosen])
    return list(chosen)[:count]


def _price(problem: Problem, budget: Budget, share: float) -> tuple[Axis, float]:
    """What is traded against the loss, and its price: how much of it one unit of loss is worth at the limit.

    Args:
        problem: with the scores as losses.
        budget: objective and limits.
        share: of the primary limit.
    """
    primary, limit = budget.primary, budget.limits[budget.primary] * share
    axis: Literal["time", "bytes"] = "bytes" if "bytes" in (budget.metric, primary) else "time"
    points = frontier(problem, objective=axis)
    values = [problem.value(point.assignment, primary) for point in points]
    # From the fastest plan on: losses fall, times and bytes rise.
    inside = [value <= limit for value in values]
    edge = inside.index(True) if primary == "loss" and any(inside) else len(points) - 1
    if primary != "loss" and any(inside):
        edge = min(sum(inside), len(points) - 1)
    edge = max(edge, 1)
    if len(points) < 2:
        return axis, 0.0
    a, b = (problem.value(points[at].assignment, axis) for at in (edge - 1, edge))
    return axis, (b - a) / max(points[edge - 1].loss - points[edge].loss, 1e-300)


def _gains(unit: Unit, axis: Axis, price: float) -> list[float]:
    """What knowing each option's loss is expected to save of ``axis`` + price × loss, the other options' taken as they
    are: for the option chosen, what it may cost more than the next best; for the others, what they may cost less.
    """
    if len(unit.options) == 1:
        return [0.0]
    costs = [(option.time_us if axis == "time" else float(option.bytes)) for option in unit.options]
    totals = [cost + price * option.loss for cost, option in zip(costs, unit.options, strict=True)]
    best, second = sorted(range(len(totals)), key=totals.__getitem__)[:2]
    gains = []
    for index, (cost, option) in enumerate(zip(costs, unit.options, strict=True)):
        break_even = totals[second if index == best else best] - cost
        gains.append(_expected_regret(price * option.loss, break_even, above=index == best))
    return gains


def _expected_regret(median: float, break_even: float, *, above: bool) -> float:
    """Mean of how far a lognormal quantity is above a value, or below it."""
    if median <= 0 or break_even <= 0:
        return max(0.0, median - break_even) if above else max(0.0, break_even - median)
    mean = median * math.exp(0.5 * _SPREAD * _SPREAD)
    low = math.log(median / break_even) / _SPREAD
    sign = 1.0 if above else -1.0
    return sign * (mean * _normal(sign * (low + _SPREAD)) - break_even * _normal(sign * low))


def _normal(z: float) -> float:
    """The standard normal distribution function."""
    return 0.5 * math.erfc(-z / math.sqrt(2))
