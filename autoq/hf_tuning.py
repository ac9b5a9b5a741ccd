"""A Hugging Face model tuned in one line: loaded, judged by text, quantized, ready to be saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from autoq.applying import ApplyReport, apply
from autoq.checkpoint import save_quantized
from autoq.errors import InputError
from autoq.loading import ROWS, Loaded, inputs, load_model
from autoq.pipeline import tune as tune_model
from autoq.results import TuneResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A model that ``autoq.hf.tune`` quantized.

    Attributes:
        model: the model, quantized in place.
        tokenizer: as it came with the model, or None.
        result: the plan, and the tables that it rests on.
        report: what was applied, and what was left alone.
        judged_by: what accuracy was judged by, for people.
    """

    model: nn.Module
    tokenizer: Any
    result: TuneResult
    report: ApplyReport
    judged_by: str

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer as a folder that ``autoq.hf.load`` and ``from_pretrained`` open.

        Raises:
            CheckpointError: as ``autoq.save_quantized``.
        """
        save_quantized(self.model, folder, tokenizer=self.tokenizer)


def tune(
    model: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    text: str | Path | None = None,
    rows: int = ROWS,
    batches: Any = None,
    keep_float: bool = False,
    **settings: Any,
) -> Tuned:
    """Tune a Hugging Face model and quantize it.

    Args:
        model: a folder, a name on the Hugging Face Hub, a ``.gguf`` file; or a model of transformers, which is
            quantized in place.
        tokenizer: of a model that is given as such.
        text: UTF-8 file by whose first tokens accuracy is judged; default is English text that comes with Python. Give
            text of the kind that the model is for.
        rows: of 512 tokens each, at most.
        batches: inputs to judge by instead of text, as ``autoq.tune`` takes them.
        keep_float: keeps the float weights, so that ``autoq.restore`` works.
        settings: everything else that ``autoq.tune`` takes: ``max_degradation``, ``candidates``, ``ties``, ….

    Returns:
        The quantized model with its tokenizer and the result.

    Raises:
        InputError: if there is no such model, it has neither tokenizer nor batches, or the text is unusable.
        AutoqError: as ``autoq.tune`` and ``autoq.apply``.
    """
    if isinstance(model, nn.Module) and tokenizer is None and batches is None:
        raise InputError(
            "accuracy is judged by text, which needs the model's tokenizer, or by batches",
            where=type(model).__name__,
            got="neither",
            fix="Pass tokenizer=, or batches= as autoq.tune takes them.",
        )
    loaded = _loaded(model, tokenizer)
    judged_by = "the batches given"
    if batches is None:
        batches, judged_by = inputs(loaded, None if text is None else Path(text), rows=rows)
    elif text is not None:
        raise InputError("accuracy is judged by text or by batches", got="both", fix="Leave one of them out.")
    result = tune_model(loaded.model, batches, **settings)
    report = apply(loaded.model, result.plan, keep_float=keep_float, packed=result.packed)
    return Tuned(model=loaded.model, tokenizer=loaded.tokenizer, result=result, report=report, judged_by=judged_by)


def _loaded(model: str | Path | nn.Module, tokenizer: Any) -> Loaded:
    if isinstance(model, nn.Module):
        return Loaded(model=model, tokenizer=tokenizer, source=type(model).__name__)
    if tokenizer is not None:
        raise InputError(
            "a model by name comes with its tokenizer", where="tokenizer", got="another", fix="Load both yourself."
        )
    return load_model(str(model))
