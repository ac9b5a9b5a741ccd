"""The inputs of a tuning where the user gave only some: what accuracy is judged by, what latency is timed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from autoq import language
from autoq.errors import InputError
from autoq.losses import Batch, as_batches, is_causal_lm
from autoq.workload import Phase

_TIMED_BATCHES = 8  # batches of a phase that the user did not name


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What accuracy is judged by.

    Attributes:
        batches: one call of the model each.
        sampled_tokens: how many of a language model's tokens it wrote itself, since the given text was short.
    """

    batches: list[Batch]
    sampled_tokens: int = 0


def judging_batches(
    model: nn.Module, given: Any, phases: Mapping[str, Phase] | None, *, own_loss: bool, seed: int
) -> Judged:
    """The batches that plans are judged by.

    Args:
        model: unwrapped.
        given: the user's, or None for those of the phases.
        phases: the user's, or None.
        own_loss: whether the user's function judges; a language model's batches stay as they are then.
        seed: of what is sampled.

    Raises:
        InputError: if there are neither batches nor phases, or they are not usable.
    """
    if given is None:
        if not phases:
            raise InputError("tune() needs batches or phases", fix="Pass inputs that the model will really see.")
        given = [one for phase in phases.values() for one in as_batches(phase.inputs)]
    batches = as_batches(given)
    if not is_causal_lm(model) or own_loss:
        return Judged(batches=batches)
    rows = [one.clone() for one in language.tokens_of(batches)]  # clones of inference tensors can be differentiated
    more = language.extended(model, rows, seed=seed)
    sampled = sum(one.numel() for one in more) - sum(one.numel() for one in rows)
    return Judged(batches=language.rows_as_batches(more), sampled_tokens=sampled)


def default_phases(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Phase]:
    """The phases of a model for which the user named none: the batches themselves, or a prompt and decoding after it.

    Args:
        model: unwrapped.
        batches: of a causal language model, token rows.
    """
    if is_causal_lm(model):
        return language.synthesised_phases(model, language.tokens_of(list(batches))[0])
    timed = batches[:_TIMED_BATCHES]
    return {"forward": Phase(list(timed), 1 / len(timed))}
