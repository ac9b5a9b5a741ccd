"""Models by their name on the Hugging Face Hub: downloaded once, afterwards read from Hugging Face's own cache."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from autoq.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[\w.-]{1,96})?")
# Top-level files only: subfolders hold the same weights in other formats. No pickles and no code.
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_NOT = ["*/*"]


def is_name(text: str) -> bool:
    """Whether a text has the form of a model's name, ``organisation/model`` or ``model``."""
    return _NAME.fullmatch(text) is not None and ".." not in text and "--" not in text


def folder_of(name: str) -> Path:
    """The folder of a model's newest files; the Hub is asked, and where it cannot be reached, the cache.

    Args:
        name: as on the Hub, such as ``HuggingFaceTB/SmolLM2-135M``.

    Raises:
        InputError: if huggingface_hub is missing, there is no such model, or it can neither be reached nor is cached.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError(
            "models by name need huggingface_hub",
            where=name,
            got="it is not installed",
            fix="Run: pip install 'autoq[hf]', or give a folder.",
        )
    from huggingface_hub import errors, snapshot_download

    http_error = errors.HTTPError  # type: ignore[attr-defined] # of the HTTP library that huggingface_hub uses

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES, ignore_patterns=_NOT))
    except errors.GatedRepoError as problem:
        fix = "Accept its terms on huggingface.co and run: hf auth login."
        raise InputError("the model may be read", where=name, got="it is gated", fix=fix) from problem
    except errors.RepositoryNotFoundError as problem:
        fix = (
            "Check the name; for a private model run: hf auth login. A folder, file.gguf or module:function works too."
        )
        raise InputError(
            "the model is a folder or a name on the Hugging Face Hub", where=name, got="neither", fix=fix
        ) from problem
    except (http_error, errors.HFValidationError, errors.RevisionResolutionError, OSError) as problem:
        offline = isinstance(problem, errors.LocalEntryNotFoundError)
        raise InputError(
            "the model is a folder, or a name that the Hugging Face Hub or its cache here has",
            where=name,
            got="no such folder, not in the cache, and the Hub cannot be reached"
            if offline
            else f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}",
            fix="Give a Hugging Face folder, a .gguf file, module:function or smollm2; or go online once.",
        ) from problem
