"""What the verbs of the command line that run a model share: its arguments, loading it, and progress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoq.cli_options import Command

MODEL = click.Path()  # not only a path; shells complete it as one
PLAN = click.Path(path_type=Path)

if TYPE_CHECKING:
    from autoq.loading import Loaded
    from autoq.progress_bars import Progress


def text_option(command: Command) -> Command:
    """``--text``."""
    return click.option(
        "--text",
        type=click.Path(path_type=Path),
        help="UTF-8 text that accuracy is judged by, in rows of 512 tokens. Default: English text that ships with "
        "Python.",
    )(command)


def rows_option(command: Command) -> Command:
    """``--rows``."""
    return click.option(
        "--rows", type=click.IntRange(min=1), default=32, show_default=True, help="Rows of 512 tokens to use."
    )(command)


def shown_progress() -> Progress:
    """Progress on stderr."""
    from rich.console import Console

    from autoq.progress_bars import Progress

    return Progress(Console(stderr=True))


def loaded_model(name: str, progress: Progress, *, quantized: bool = False) -> Loaded:
    """The model of a verb's argument MODEL.

    Args:
        name: the argument.
        progress: is told.
        quantized: whether a folder that ``apply`` wrote will do as well.
    """
    from autoq.loading import is_checkpoint, load_model

    progress("load", name, 0, 1)
    loaded = _checkpoint(name) if quantized and is_checkpoint(name) else load_model(name)
    progress("load", name, 1, 1)
    return loaded


def _checkpoint(name: str) -> Loaded:
    from autoq import hf
    from autoq.loading import Loaded, tokenizer_of

    model = hf.load(name)
    source = f"{name} ({type(model).__name__}, quantized)"
    return Loaded(model=model, tokenizer=tokenizer_of(Path(name)), source=source)


def prepared(
    name: str, text: Path | None, rows: int, progress: Progress, *, quantized: bool = False
) -> tuple[Loaded, Any, str]:
    """The model, its batches, and what they are; ``quantized`` as in ``loaded_model``.

    Raises:
        InputError: if the text cannot be read, or the model cannot be judged by one.
    """
    from autoq.errors import InputError
    from autoq.loading import inputs, read_text

    if text is not None:
        read_text(text)  # refused before a model is downloaded
    loaded = loaded_model(name, progress, quantized=quantized)
    if text is not None and loaded.tokenizer is None:
        raise InputError(
            "a text judges models that have a tokenizer",
            where=f"--text {text}",
            got=f"{loaded.source}, which has none",
            fix="Leave --text out: such a model is judged by the batches that come with it.",
        )
    batches, source = inputs(loaded, text, rows=rows)
    return loaded, batches, source
