"""Text from a transformers decoder: a compiled step, a static KV cache, autoq's attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from autoq.applying import plan_of
from autoq.attention import KVPrecision, checked
from autoq.decoding import Decoder
from autoq.errors import InputError
from autoq.modules import unwrap
from autoq.sampling import Sampling

_LENGTH_UNIT = 256  # a cache's length is a multiple, so that prompts of nearly one length share a compiled step

# Settings of transformers' generation that change greedy search, with the values that do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "guidance_scale": (None, 1.0),
    "penalty_alpha": (None, 0.0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "watermarking_config": (None,),
}

# The last decoder of each model: compiling its step takes seconds. A decoder does not keep its model alive.
_DECODERS: WeakKeyDictionary[nn.Module, Decoder] = WeakKeyDictionary()


class Streamer(Protocol):
    """What gets tokens as they come; transformers' ``TextStreamer`` is one."""

    def put(self, value: Tensor) -> None:
        """Take the prompt [B, T] first, then new tokens [B]."""

    def end(self) -> None:
        """There are no more."""


def generate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    streamer: Streamer | None = None,
    kv_cache: KVPrecision | None = None,
    compiled: bool = True,
) -> Tensor:
    """Continue prompts, token by token.

    The step is compiled at the first call of a model, which takes seconds; later calls use it again while the model
    and the batch stay the same and the cache is long enough. Greedy tokens are those of ``model.generate``, unless
    two logits are so near that another order of summation changes which is larger.

    Args:
        model: a transformers causal language model whose layers attend to all tokens, tuned by autoq or not; compiled
            and wrapped models are looked through.
        input_ids: int64 [B, T].
        attention_mask: [B, T], 0 on padding, which is on the left; None without padding.
        max_new_tokens: at most so many tokens follow.
        temperature: 0 takes the most likely token; more draws from the logits over it.
        top_k: draw among so many most likely tokens.
        top_p: draw from the smallest set of most likely tokens whose probabilities reach this sum.
        seed: of the random numbers; None takes torch's own generator.
        eos_token_id: what ends a sequence; None takes the model's generation settings, an empty list nothing.
        pad_token_id: what follows an ended sequence; None takes the model's, else the first of ``eos_token_id``.
        streamer: gets the prompt, then each step's tokens.
        kv_cache: what keys and values are rounded to, per head and token: ``"none"``, ``"int8"`` or ``"int4"``; None
            takes what the model's plan decided, else ``"none"``.
        compiled: False runs the step uncompiled.

    Returns:
        int64 [B, T + new]: the prompts and what follows, as ``model.generate`` returns them.

    Raises:
        InputError: another kind of model, an argument out of range, or settings of the model's generation that this
            loop does not have.
    """
    root = unwrap(model)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    precision = _precision(root) if kv_cache is None else checked(kv_cache)
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise InputError("input_ids is [B, T], not empty", got=list(input_ids.shape))
    if max_new_tokens < 1:
        raise InputError("max_new_tokens is 1 or more", got=max_new_tokens)
    ends, pad = _special(root, eos_token_id, pad_token_id)
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    decoder = _decoder(root, input_ids, max_new_tokens, precision, compiled)
    found = [input_ids]
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for tokens in _tokens(decoder, input_ids, attention_mask, max_new_tokens, sampling, generator, ends, pad):
        found.append(tokens)
        if streamer is not None:
            streamer.put(tokens[:, 0].cpu())
    if streamer is not None:
        streamer.end()
    return torch.cat(found, dim=1)


def _tokens(  # noqa: PLR0917 (all of one loop)
    decoder: Decoder,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    most: int,
    sampling: Sampling,
    generator: torch.Generator | None,
    ends: list[int],
    pad: int,
) -> Iterator[Tensor]:
    """The new tokens of each step, [B, 1], until all sequences have ended."""
    ended = torch.zeros(input_ids.shape[0], 1, dtype=torch.bool, device=input_ids.device)
    final = torch.tensor(ends, dtype=torch.long, device=input_ids.device)
    tokens = sampling.choose(decoder.prefill(input_ids, attention_mask), generator)
    for number in range(most):
        if number:
            tokens = (
                decoder.advance(tokens).clone() if sampling.greedy else sampling.choose(decoder.step(tokens), generator)
            )
        tokens = tokens.masked_fill(ended, pad)
        yield tokens
        if ends:
            ended = ended | torch.isin(tokens, final)
            if bool(ended.all()):
                return


def _decoder(model: nn.Module, input_ids: Tensor, new: int, kv_cache: KVPrecision, compiled: bool) -> Decoder:
    """The model's last decoder if it still serves, else a new one."""
    batch, length = input_ids.shape[0], input_ids.shape[1] + new
    known = _DECODERS.get(model)
    if known is not None and known.fits(model, batch=batch, max_length=length, kv_cache=kv_cache, compiled=compiled):
        return known
    length = -(-length // _LENGTH_UNIT) * _LENGTH_UNIT
    decoder = Decoder(model, batch=batch, max_length=length, kv_cache=kv_cache, compiled=compiled)
    _DECODERS[model] = decoder
    return decoder


def _precision(model: nn.Module) -> KVPrecision:
    """What the model's plan decided."""
    plan = plan_of(model)
    return "none" if plan is None else checked(str(plan.model.get("kv_cache", "none")))


def _special(model: nn.Module, eos: int | list[int] | None, pad: int | None) -> tuple[list[int], int]:
    """What ends a sequence, and what follows its end.

    Raises:
        InputError: the model's generation settings ask for more than this loop does.
    """
    settings: Any = getattr(model, "generation_config", None)
    for name, neutral in _NEUTRAL.items():
        value = getattr(settings, name, None)
        if value not in neutral:
            raise InputError(
                f"autoq.generate has no {name}",
                where="model.generation_config",
                got=value,
                fix="Use model.generate, or take the setting away.",
            )
    if eos is None:
        eos = getattr(settings, "eos_token_id", None)
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if pad is None:
        pad = getattr(settings, "pad_token_id", None)
    if pad is None:
        pad = ends[0] if ends else 0
    return ends, int(pad)
