"""What autoq knows about causal language models: the phases they always have, and text to judge them by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoq.errors import InputError
from autoq.losses import Batch
from autoq.workload import Phase

CONTEXT = 512  # tokens of context for the synthesised decode phase, and of the synthesised prompt
ROOM = 32  # cache slots beyond the context
ANSWER = 128  # tokens generated per request, the decode phase's calls
BATCH_ROWS = 4  # token rows per forward pass: logits of 2,048 tokens at a time
MINIMUM_TOKENS = 2048  # fewer tokens than this cannot tell two plans apart


def tokens_of(batches: list[Batch]) -> list[Tensor]:
    """The token rows of every batch, int64 [rows, length] each.

    Raises:
        InputError: if a batch holds none.
    """
    found = []
    for batch in batches:
        tokens = batch.kwargs.get("input_ids", batch.args[0] if batch.args else None)
        if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dim() != 2:
            raise InputError(
                "a causal language model's batch is integer token rows [rows, length]",
                got=f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__,
            )
        found.append(tokens)
    return found


def rows_as_batches(rows: list[Tensor]) -> list[Batch]:
    """Token rows int64 [rows, length] as batches of a few rows each, so that their logits fit in memory."""
    return [Batch.of({"input_ids": part}) for one in rows for part in torch.split(one, BATCH_ROWS)]


def synthesised_phases(
    model: nn.Module, tokens: Tensor, *, context: int = CONTEXT, answer: int = ANSWER
) -> dict[str, Phase]:
    """The two phases of a request: ``prefill`` of a prompt and ``decode`` of single tokens after it.

    Both compute the logits of the last token only, as generation does. Decoding runs over transformers' static cache
    with ``context`` tokens in it, so that it compiles to one graph.

    Args:
        model: a transformers causal language model, not compiled.
        tokens: int64 [rows, length], used as the prompt's text, repeated if shorter than the context.
        context: tokens in the prompt and in the cache.
        answer: tokens generated per request.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int):
        context = min(context, longest - 1)
    flat = tokens.flatten()
    repeats = -(-(context + 1) // flat.numel())
    line = flat.repeat(repeats)[: context + 1]
    prompt, following = line[None, :context].clone(), line[None, context:].clone()
    return {
        "prefill": Phase({"input_ids": prompt, "use_cache": False, "logits_to_keep": 1}, 1, synthesised=True),
        "decode": Phase(decode_step(model, prompt, following), answer, synthesised=True),
    }


def decode_step(model: nn.Module, prompt: Tensor, following: Tensor) -> Callable[[], dict[str, Any]]:
    """Keyword arguments of a single-token step after ``prompt``, the same at every call.

    Args:
        model: a transformers causal language model.
        prompt: int64 [rows, context].
        following: int64 [rows, 1], the token fed in.

    Returns:
        A function that rewinds the cache to the end of the prompt and gives the arguments.
    """
    from transformers import StaticCache

    rows, context = prompt.shape
    config: Any = model.config
    cache = StaticCache(config=config, max_cache_len=context + ROOM)
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    positions = torch.full((rows, 1), context, dtype=torch.long, device=prompt.device)

    lengths: list[Tensor] = [getattr(layer, "cumulative_length") for layer in cache.layers]  # noqa: B009 (not typed)

    def arguments() -> dict[str, Any]:
        for length in lengths:
            length.fill_(context)
        return {
            "input_ids": following,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }

    return arguments


def extended(model: nn.Module, rows: list[Tensor], *, seed: int, minimum: int = MINIMUM_TOKENS) -> list[Tensor]:
    """The rows, followed by text sampled from the model until there are at least ``minimum`` tokens.

    Args:
        model: a transformers causal language model.
        rows: int64 [rows, length] tensors.
        seed: of the sampling.
        minimum: tokens wanted in all.
    """
    missing = minimum - sum(one.numel() for one in rows)
    if missing <= 0:
        return rows
    prompt = rows[0][:1, : max(1, min(8, rows[0].shape[1]))]
    length = min(256, getattr(model.config, "max_position_embeddings", 256))
    wanted = -(-missing // length)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        sampled = model.generate(  # type: ignore[operator]  # is_causal_lm has checked it
            input_ids=prompt.expand(wanted, -1).contiguous(),
            attention_mask=torch.ones(wanted, prompt.shape[1], dtype=torch.long),
            do_sample=True,
            top_k=0,
            min_new_tokens=length - prompt.shape[1],
            max_new_tokens=length - prompt.shape[1],
        )
    return [*rows, sampled]
