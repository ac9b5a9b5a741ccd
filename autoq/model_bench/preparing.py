"""Makes a job of a model's name and the options: tokens, engines, and the files that engines of others read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoq.candidates import parse
from autoq.errors import InputError, ModelError
from autoq.identity import content_hash
from autoq.language import tokens_of
from autoq.loading import ROW_TOKENS, Loaded, inputs, model_file
from autoq.losses import as_batches, is_causal_lm
from autoq.model_bench.engine import Engine, Missing, chosen, own_engines
from autoq.model_bench.peers import peer_engines
from autoq.model_bench.running import Job
from autoq.model_bench.torch_engines import CACHE_TOKENS
from autoq.plan import Plan
from autoq.provenance import versions

_WARM = 4  # steps that a breakdown runs besides those it counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked for.

    Attributes:
        plans: name → plan file; an empty path where the name is a scheme that all layers get.
        text: of prompts and losses; None for the text that ships with Python.
        rows: of the losses.
        context: tokens of a prompt.
        steps: decode steps in a round.
        rounds: that count.
        batches: prompts at once.
        threads: of each engine; None for all processors.
        patterns: of engines' names; none for all.
        kv_caches: of the plans' own decode step.
        cpp_wrapper: whether the plans' decode steps are measured with C++ calling the kernels, too.
        peers: the side environment of llama.cpp and OpenVINO.
        torchao: folder with the package.
        gguf: more files for llama.cpp.
        openvino: name → a folder that OpenVINO reads.
        work: where files for engines of others are made and kept.
        passes: of a breakdown.
    """

    plans: Mapping[str, str]
    text: Path | None = None
    rows: int = 32
    context: int = 512
    steps: int = 32
    rounds: int = 5
    batches: Sequence[int] = (1,)
    threads: int | None = None
    patterns: Sequence[str] = ()
    kv_caches: Sequence[str] = ("none",)
    cpp_wrapper: bool = False
    peers: Path
    torchao: Path
    gguf: Sequence[Path] = ()
    openvino: Mapping[str, str]
    work: Path
    passes: int = 8


def check_plans(plans: Mapping[str, str]) -> dict[str, Path | None]:
    """Name → plan file, or None where the name is a scheme.

    Raises:
        AutoqError: if a file is no plan, or a name without a file is no scheme.
    """
    for name, file in plans.items():
        if file:
            Plan.load(file)
        else:
            parse(name)
    return {name: Path(file) if file else None for name, file in plans.items()}


def job(name: str, loaded: Loaded, options: Options) -> Job:
    """The job.

    Args:
        name: of the model, as it was given; the engines load it by this.
        loaded: the model.
        options: all else.

    Raises:
        ModelError: if the model does not generate text.
        InputError: if the context is too long for it, or a text or option is unusable.
        AutoqError: if a plan is refused.
    """
    model: Any = loaded.model
    if not is_causal_lm(model):
        raise ModelError("the model is a causal language model", where=loaded.source, got=type(model).__name__)
    steps = max(options.steps, options.passes + _WARM)
    tokens = options.context + steps
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and tokens > longest:
        got = f"{options.context} tokens and {steps} steps, of {longest}"
        raise InputError(
            "the context and the steps fit the model's positions", got=got, fix="Take a shorter --context."
        )
    text, source = _tokens(loaded, options)
    ready, missing = _engines(name, loaded, options, room=max(tokens + 1, text.shape[1]))
    length = max(CACHE_TOKENS, tokens)
    return Job(
        engines=[replace(one, load={**one.load, "max_length": length}) if one.own else one for one in ready],
        missing=missing,
        prompts={batch: prompt(text, batch, options.context) for batch in options.batches},
        rows=text[: options.rows].tolist(),
        steps=options.steps,
        rounds=options.rounds,
        threads=options.threads or os.cpu_count() or 1,
        passes=options.passes,
        facts={"model": loaded.source, "text": source, "versions": versions()},
    )


def _tokens(loaded: Loaded, options: Options) -> tuple[Tensor, str]:
    """Rows of tokens [rows, length], and what they are."""
    if options.text is not None and loaded.tokenizer is None:
        raise InputError(
            "a text needs a model with a tokenizer", where=f"--text {options.text}", got=f"{loaded.source}, without one"
        )
    rows = max(options.rows, -(-options.context * max(options.batches) // ROW_TOKENS))
    found, source = inputs(loaded, options.text, rows=rows)
    return torch.cat(tokens_of(as_batches(found))), source


def prompt(tokens: Tensor, batch: int, context: int) -> list[list[int]]:
    """Tokens [batch][context] of a text [rows, length], repeated where it is too short."""
    flat = tokens.flatten()
    repeats = -(-batch * context // flat.numel())
    found: list[list[int]] = flat.repeat(repeats)[: batch * context].view(batch, context).tolist()
    return found


def _engines(name: str, loaded: Loaded, options: Options, *, room: int) -> tuple[list[Engine], list[Missing]]:
    file = model_file(name)
    source = options.work / f"model-{content_hash(dict(loaded.model.state_dict()))}"
    own = own_engines(
        name,
        plans=check_plans(options.plans),
        kv_caches=options.kv_caches or ("none",),
        cpp_wrapper=options.cpp_wrapper,
        torchao=options.torchao,
    )
    peers = peer_engines(
        peers=options.peers,
        gguf=file if file is not None and file.suffix == ".gguf" else None,
        others=options.gguf,
        folders={one: Path(folder) for one, folder in options.openvino.items()},
        source=source,
        work=options.work,
        tokens=room,
        batch=max(options.batches),
    )
    ready, missing = chosen(own[0] + peers[0], own[1] + peers[1], options.patterns)
    if any((one.convert or {}).get("source") == str(source.absolute()) for one in ready) and not source.is_dir():
        _save(loaded, source)
    return ready, missing


def _save(loaded: Loaded, folder: Path) -> None:
    """The unquantized model as a Hugging Face folder; it appears complete or not at all."""
    partial = folder.with_name(f"partial-{folder.name}")
    model: Any = loaded.model
    model.save_pretrained(partial)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(partial)
    partial.replace(folder)
