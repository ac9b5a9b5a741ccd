"""Measured loss of a plan: on the same samples as the unquantized model, as paired differences with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from autoq.errors import InputError
from autoq.losses import Batch, Metric
from autoq.modules import evaluating
from autoq.phase_forms import PhaseForms
from autoq.scheme import NONE, Scheme
from autoq.shadow import Shadow

EvalFn = Callable[[nn.Module], "float | Tensor"]
_RESAMPLES = 2000
_CONFIDENCE = 0.95
_MOST_ROWS = 64
_FIDELITIES = (8, 4, 1)  # a plan is measured on this part of the batches first, then on more


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A plan's mean loss minus the unquantized model's, on the same samples.

    Attributes:
        mean: in the metric's unit.
        low: lower end of the 95 % bootstrap interval over samples (rows, not tokens).
        high: its upper end.
        samples: how many pairs.
        rows: the pairs' differences, in the order of the samples; of many, the means of at most 64 equal runs of them.
    """

    mean: float
    low: float
    high: float
    samples: int
    rows: tuple[float, ...] = ()


class Bounded(Protocol):
    """A measured loss with the upper end of its interval."""

    @property
    def high(self) -> float:
        """That end."""


_Loss = TypeVar("_Loss", bound=Bounded)


def largest(losses: Mapping[str, _Loss]) -> _Loss:
    """The one of several phases' losses that counts: a plan is in budget when every phase's arithmetic is."""
    return max(losses.values(), key=lambda loss: loss.high)


def paired(losses: Tensor, baseline: Tensor, *, seed: int = 0) -> Difference:
    """The paired difference of two loss vectors with its bootstrap interval.

    Args:
        losses: float [samples]; infinite where the plan breaks the model.
        baseline: float [samples or more], in the same order. Where it has more, ``rows`` are runs of as many samples as
            if there were as many losses, so that they are the first ones of a later measurement on all.
        seed: of the resampling.
    """
    run = -(-baseline.numel() // _MOST_ROWS)
    partly = losses.numel() < baseline.numel()
    change = (losses.double() - baseline[: losses.numel()].double()).cpu()
    mean = change.mean().item()
    if not math.isfinite(mean):
        return Difference(mean=math.inf, low=math.inf, high=math.inf, samples=change.numel())
    if change.numel() == 1:
        return Difference(mean=mean, low=mean, high=mean, samples=1, rows=(mean,))
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(change.numel(), (_RESAMPLES, change.numel()), generator=generator)
    means = change[picks].mean(dim=1)
    tail = (1 - _CONFIDENCE) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    runs = [part for part in torch.split(change, run) if len(part) == run or not partly]
    rows = tuple(part.mean().item() for part in runs)
    return Difference(mean=mean, low=low, high=high, samples=change.numel(), rows=rows)


def model_losses(model: nn.Module, batches: Sequence[Batch], metric: Metric, *, first: int = 0) -> Tensor:
    """One loss per sample of all batches, float32 [samples].

    Args:
        model: what runs.
        batches: what it runs on.
        metric: makes losses of its outputs.
        first: the first batch's number, by which the metric knows it.

    Raises:
        InputError: if a loss is NaN.
    """
    return _checked(_run(model, batches, metric, first), metric.name)


def _run(model: nn.Module, batches: Sequence[Batch], metric: Metric, first: int) -> Tensor:
    with evaluating(model), torch.no_grad():
        parts = [metric.losses(batch.call(model), index, batch).cpu() for index, batch in enumerate(batches, first)]
    return torch.cat(parts)


def _checked(losses: Tensor, name: str) -> Tensor:
    bad = int((~torch.isfinite(losses)).sum())
    if bad:
        raise InputError(
            "a loss must be a finite number",
            where=name,
            got=f"NaN or infinity in {bad} of {losses.numel()} samples",
            fix="Check the inputs, and what the loss does with this model's outputs.",
        )
    return losses


class LossMeter:
    """Measures assignments on the shadow, always against the unquantized model on the same samples.

    Args:
        shadow: the model whose assignment changes.
        metric: loss of a batch's outputs; unused when ``eval_fn`` is given.
        batches: all samples, in a fixed order.
        eval_fn: the user's own measure of a whole model, instead.
        eval_repeats: runs of a scalar ``eval_fn`` (its noise is taken from them).
        forms: what plans with mixes compute in each phase; by default, on one row and on many.
    """

    def __init__(
        self,
        shadow: Shadow,
        metric: Metric,
        batches: Sequence[Batch],
        *,
        eval_fn: EvalFn | None = None,
        eval_repeats: int = 3,
        forms: PhaseForms | None = None,
    ) -> None:
        self.shadow = shadow
        self.metric = metric
        self.batches = list(batches)
        self.eval_fn = eval_fn
        self.eval_repeats = eval_repeats
        self.forms = forms or PhaseForms.extremes(list(shadow.store.modules))
        self._baseline: Tensor | None = None
        self._last: tuple[dict[str, Scheme], int, Tensor] | None = None  # assignment, batches, losses
        self.levels = self._levels()

    def _levels(self) -> tuple[int, ...]:
        """Fidelities: an eighth of the batches first, a quarter, then all of them; with ``eval_fn`` only all."""
        everything = len(self.batches)
        if self.eval_fn is not None:
            return (everything,)
        return tuple(sorted({everything // part for part in _FIDELITIES} - {0}))

    def losses(self, assignment: Mapping[str, Scheme], level: int = -1) -> Tensor:
        """One loss per sample under an assignment without mixes, at a fidelity of ``levels``.

        Of the assignment measured last, only the batches that a higher fidelity adds are run. A loss that is no number
        is infinite: the plan breaks the model.
        """
        self.shadow.assign(assignment)
        if self.eval_fn is not None:
            return self._user_losses(self.eval_fn)
        count, begin, parts = self.levels[level], 0, []
        if self._last is not None and self._last[0] == assignment and self._last[1] <= count:
            begin, parts = self._last[1], [self._last[2]]
        if begin < count:
            with self.shadow.exact_products():
                added = self.batches[begin:count]
                parts.append(_unbroken(_run(self.shadow.model, added, self.metric, begin)))
        losses = torch.cat(parts)
        self._last = (dict(assignment), count, losses)
        return losses

    def _user_losses(self, eval_fn: EvalFn) -> Tensor:
        with evaluating(self.shadow.model), torch.no_grad():
            first = _as_losses(eval_fn(self.shadow.model))
            if first.numel() > 1:
                return _unbroken(first)
            again = [_as_losses(eval_fn(self.shadow.model)) for _ in range(self.eval_repeats - 1)]
        return _unbroken(torch.cat([first, *again]))

    def baseline(self) -> Tensor:
        """The unquantized model's losses at full fidelity; measured once.

        Raises:
            InputError: if one is no finite number.
        """
        if self._baseline is None:
            losses = self.losses({})
            self._baseline = _checked(losses, self.metric.name if self.eval_fn is None else "eval_fn")
        return self._baseline

    def remember(self, baseline: Tensor) -> None:
        """Take the unquantized model's losses, float32 [samples] at full fidelity, from an earlier run.

        Not for metrics that compare outputs with the unquantized model's.
        """
        self._baseline = baseline

    def difference(self, assignment: Mapping[str, Scheme], level: int = -1) -> Difference:
        """The assignment's paired difference to the unquantized model, in its form of the phase with the most rows."""
        form = self.forms.form(assignment, self.forms.largest)
        baseline = self.baseline()
        if self.eval_fn is None and all(scheme == NONE for scheme in form.values()):
            return paired(baseline, baseline)  # an eval_fn may be noisy, and its noise is wanted
        losses = self.losses(form, level)
        if level % len(self.levels) == len(self.levels) - 1 and losses.numel() != baseline.numel():
            raise InputError(
                "a plan has as many losses as the unquantized model",
                where=self.metric.name if self.eval_fn is None else "eval_fn",
                got=f"{losses.numel()} instead of {baseline.numel()}",
                fix="Return one loss per sample, infinite where a sample fails.",
            )
        return paired(losses, baseline)

    def by_phase(self, assignment: Mapping[str, Scheme]) -> dict[str, Difference]:
        """Phase → the difference of the assignment's form there; a form that phases share is measured once."""
        found: dict[str, Difference] = {}
        for phases, form in self.forms.distinct(assignment):
            found |= dict.fromkeys(phases, self.difference(form))
        return {phase: found[phase] for phase in self.forms.rows}


def _as_losses(value: Any) -> Tensor:
    losses = value.detach().float().reshape(-1).cpu() if isinstance(value, Tensor) else torch.tensor([float(value)])
    if losses.numel() == 0:
        raise InputError("eval_fn returns a number or a non-empty 1-D tensor of losses", got="an empty tensor")
    return losses


def _unbroken(losses: Tensor) -> Tensor:
    return losses.masked_fill(torch.isnan(losses), math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossBudget:
    """How much the mean loss may rise, and what the user was promised in his own unit.

    Attributes:
        max_increase: in the metric's unit.
        baseline: the unquantized model's mean loss.
        text: such as ``perplexity at most 5 % above 27.60``.
    """

    max_increase: float
    baseline: float
    text: str


def loss_budget(metric: str, baseline: float, *, max_degradation: float, max_increase: float | None) -> LossBudget:
    """The budget in the metric's unit.

    ``max_degradation`` is relative to |baseline|: of the perplexity for token NLL, of the value for an ``eval_fn`` or
    ``loss_fn``. KL and relative RMS are zero for the unquantized model; their defaults are 0.01 nats and
    ``max_degradation`` itself.

    Raises:
        InputError: if a relative budget has no baseline to be relative to.
    """
    if max_increase is not None:
        return LossBudget(
            max_increase=max_increase, baseline=baseline, text=f"{metric} at most {max_increase:g} above {baseline:.4f}"
        )
    if not max_degradation >= 0:
        raise InputError("max_degradation is zero or positive", got=max_degradation)
    if metric == "nll":
        increase = math.log1p(max_degradation)
        text = f"perplexity at most {max_degradation:.2%} above {math.exp(baseline):.3f}"
        return LossBudget(max_increase=increase, baseline=baseline, text=text)
    if metric == "kl":
        return LossBudget(max_increase=0.01, baseline=baseline, text="KL divergence at most 0.01 nats")
    if metric == "relative_rms":
        text = f"relative RMS of the outputs at most {max_degradation:.2%}"
        return LossBudget(max_increase=max_degradation, baseline=baseline, text=text)
    if baseline < 1e-6:
        raise InputError(
            "a metric that is near zero or negative for the unquantized model needs an absolute budget",
            where=metric,
            got=f"a baseline of {baseline:g}",
            fix="Pass max_increase= in the metric's unit.",
        )
    text = f"{metric} at most {max_degradation:.2%} above {baseline:.4f}"
    return LossBudget(max_increase=max_degradation * abs(baseline), baseline=baseline, text=text)
