"""What besides the linear layers makes a decode step: the attention, and what the KV cache holds.

A tuning that is asked for it measures the chosen plan's loss and time once more with autoq's attention and every
precision of the KV cache, and takes the best within the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from torch import nn

from autoq.errors import InputError
from autoq.evaluation import Difference, LossMeter, largest, paired
from autoq.plan import Plan
from autoq.plan_text import finite
from autoq.scheme import Scheme
from autoq.shadow import PackedStore, Shadow
from autoq.workload import Phase

if TYPE_CHECKING:
    from autoq.profiler import Timing

PREFILL, DECODE = "prefill", "decode"
STOCK: Final = "stock"
Attention = Literal["stock", "autoq"]


class _Time(Protocol):
    def __call__(
        self,
        plans: Mapping[str, Mapping[str, Scheme]],
        *,
        others: Mapping[str, Mapping[str, Callable[[], None]]],
    ) -> Mapping[str, Mapping[str, Timing]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOption:
    """One way to run attention, measured under the chosen plan.

    Attributes:
        attention: the model's own, or autoq's.
        kv_cache: what keys and values are rounded to.
        loss: paired difference to the unquantized model with its own attention.
        times: phase → time of one pass.
        kv_bytes: of the cache at the phase's context, all sequences together.
    """

    attention: Attention
    kv_cache: str
    loss: Difference
    times: Mapping[str, Timing]
    kv_bytes: int

    def request_us(self, calls: Mapping[str, float]) -> float:
        """The sum over phases of calls × pass."""
        return sum(count * self.times[phase].median_us for phase, count in calls.items())

    def section(self) -> dict[str, str]:
        """The plan's section ``model``."""
        return {} if self.attention == STOCK else {"attention": self.attention, "kv_cache": self.kv_cache}

    def row(self, calls: Mapping[str, float], *, chosen: bool) -> dict[str, Any]:
        """For the plan's provenance."""
        return {
            "attention": self.attention,
            "kv_cache": self.kv_cache,
            "loss_delta": self.loss.mean,
            "loss_low": self.loss.low,
            "loss_high": self.loss.high,
            **{f"{phase}_us": self.times[phase].median_us for phase in calls},
            "request_us": self.request_us(calls),
            "kv_bytes": self.kv_bytes,
            "chosen": chosen,
        }


def check(model: nn.Module, kv_cache: Sequence[str], phases: Mapping[str, Phase]) -> None:
    """Refuse what cannot be measured, before minutes of measuring.

    Raises:
        InputError: an unknown precision, phases that autoq did not make, or a model without a decode loop of autoq's.
    """
    from autoq.attention import checked
    from autoq.decoding import Decoder

    for one in kv_cache:
        precision = checked(one)
        made = {name for name, phase in phases.items() if phase.synthesised}
        if set(phases) != {PREFILL, DECODE} or made != set(phases):
            raise InputError(
                "the KV cache is decided for the phases that autoq makes for a causal language model",
                where="kv_cache",
                got=", ".join(phases),
                fix="Leave phases= or kv_cache= out.",
            )
        Decoder(model, max_length=1, kv_cache=precision, compiled=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRuns:
    """Decoders over one shadow of the model, ready to be timed.

    Attributes:
        functions: phase → option's name → one pass.
        kv_bytes: option's name → bytes of its cache.
        stock_bytes: of a cache that holds numbers of the model's dtype.
    """

    functions: Mapping[str, Mapping[str, Callable[[], None]]]
    kv_bytes: Mapping[str, int]
    stock_bytes: int


def runs(
    model: nn.Module, store: PackedStore, plan: Mapping[str, Scheme], prefill: Phase, precisions: Sequence[str]
) -> tuple[Shadow, DecodeRuns]:
    """Compile a decoder of every precision, over a shadow that carries the plan.

    Args:
        model: the unquantized model.
        store: packed weights.
        plan: layer → scheme.
        prefill: the phase whose prompt fills the cache.
        precisions: of the KV cache.

    Returns:
        The shadow, which has to live as long as the runs do, and the runs.
    """
    from autoq.attention import checked
    from autoq.decoding import Decoder

    inputs: Any = prefill.inputs
    prompt = inputs["input_ids"]
    rows, context = prompt.shape
    following = prompt[:, :1].clone()
    shadow = Shadow(model, store)
    shadow.assign(plan)
    functions: dict[str, dict[str, Callable[[], None]]] = {PREFILL: {}, DECODE: {}}
    sizes: dict[str, int] = {}
    for one in precisions:
        decoder = Decoder(
            shadow.model, batch=rows, max_length=context + 1, kv_cache=checked(one), compiled_prefill=True
        )
        decoder.prefill(prompt)
        decoder.advance(following)

        def read(decoder: Decoder = decoder) -> None:
            decoder.prefill(prompt)

        def step(decoder: Decoder = decoder) -> None:
            decoder.rewind(context)
            decoder.advance(following)

        functions[PREFILL][one], functions[DECODE][one] = read, step
        sizes[one] = decoder.kv_bytes
    stock = Decoder(shadow.model, batch=rows, max_length=context + 1, compiled=False).kv_bytes
    return shadow, DecodeRuns(functions=functions, kv_bytes=sizes, stock_bytes=stock)


def loss_with(meter: LossMeter, plan: Mapping[str, Scheme], precision: str) -> Difference:
    """The plan's paired difference with autoq's attention and keys and values rounded, in its worst phase."""
    from autoq.attention import checked, using

    fresh = LossMeter(
        meter.shadow, meter.metric, meter.batches, eval_fn=meter.eval_fn, eval_repeats=meter.eval_repeats,
        forms=meter.forms,
    )  # fmt: skip
    baseline = meter.baseline()
    with using(meter.shadow.model, checked(precision)):
        found = {phases[0]: paired(fresh.losses(form), baseline) for phases, form in meter.forms.distinct(plan)}
    return largest(found)


def best(options: Sequence[DecodeOption], calls: Mapping[str, float], *, max_loss: float | None, memory: bool) -> int:
    """The option to take: the fastest within the budget or, for memory, the one whose cache is smallest.

    Args:
        options: the model's own attention first, which is taken where no other is within the budget.
        calls: phase → calls in a request.
        max_loss: most that the upper bound of the loss may be; None for any.
        memory: whether bytes count rather than time.
    """

    def value(index: int) -> tuple[float, float]:
        one = options[index]
        time = one.request_us(calls)
        return (one.kv_bytes, time) if memory else (time, one.kv_bytes)

    good = [i for i, one in enumerate(options) if max_loss is None or one.loss.high <= max_loss]
    return min(good or [0], key=value)


def decided(
    plan: Plan,
    *,
    model: nn.Module,
    store: PackedStore,
    meter: LossMeter,
    phases: Mapping[str, Phase],
    time: _Time,
    precisions: Sequence[str],
    max_loss: float | None,
    memory: bool,
    say: Callable[[str, int, int], None],
) -> Plan:
    """A plan with the attention and the KV cache that are best under it, and the record of all that were measured.

    Args:
        plan: of the linear layers.
        model: the unquantized model.
        store: its packed weights.
        meter: measures losses.
        phases: ``prefill`` and ``decode``, as autoq makes them.
        time: times plans and other passes interleaved: ``time(plans, others=…)``.
        precisions: of the KV cache, for autoq's attention.
        max_loss: most that the upper bound of a loss may be, in the metric's unit; None for any.
        memory: whether the cache's bytes count rather than time.
        say: called with (text, done, total).
    """
    prefill: Any = phases[PREFILL]
    say("compile", 0, len(precisions))
    shadow, beside = runs(model, store, plan.layers, prefill, precisions)
    times = time({STOCK: plan.layers}, others=beside.functions)
    del shadow
    options = [
        DecodeOption(
            attention=STOCK,
            kv_cache="none",
            loss=largest(meter.by_phase(plan.layers)),
            times=times[STOCK],
            kv_bytes=beside.stock_bytes,
        )
    ]
    for number, name in enumerate(precisions):
        say(f"loss with a KV cache of {name}", number, len(precisions))
        loss = loss_with(meter, plan.layers, name)
        options.append(
            DecodeOption(attention="autoq", kv_cache=name, loss=loss, times=times[name], kv_bytes=beside.kv_bytes[name])
        )
    say("", len(precisions), len(precisions))
    calls = {name: phase.calls for name, phase in phases.items()}
    chosen = best(options, calls, max_loss=max_loss, memory=memory)
    rows = [one.row(calls, chosen=number == chosen) for number, one in enumerate(options)]
    provenance = finite({**plan.provenance, "decoding": rows})
    return replace(plan, model=options[chosen].section(), provenance=provenance)
