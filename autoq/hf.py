"""Hugging Face models: tuned with ``autoq.hf.tune``, opened with ``autoq.hf.load`` or with ``from_pretrained``.

Importing this module makes ``from_pretrained`` understand models that autoq quantized.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.nn.modules import module as registration

from autoq._files import shown
from autoq.applying import plan_of, use_attention
from autoq.checkpoint_files import CONFIG, GENERATION, Checkpoint, opened
from autoq.errors import CheckpointError, InputError
from autoq.hf_marks import mark
from autoq.hf_settings import BACKBONE, IMPLEMENTATION, settings
from autoq.installing import install, skeleton, without_collection
from autoq.stored import CONFIG_KEY, reshape

if TYPE_CHECKING:
    from autoq.hf_evaluating import lm_eval_model
    from autoq.hf_tuning import Tuned, tune

__all__ = ["Tuned", "lm_eval_model", "load", "tune"]

_HOMES = {"Tuned": "hf_tuning", "lm_eval_model": "hf_evaluating", "tune": "hf_tuning"}

# What would make transformers fetch other files, or run code that is not its own.
_FOREIGN = re.compile(rf"auto_map|custom_\w+|{IMPLEMENTATION.pattern}|{BACKBONE.pattern}")
_FOREIGN_TYPE = re.compile(r"timm\w*")  # models of another library, which fetches them by name
# transformers makes lists as long as these say, before it makes the modules.
_REPEATED = re.compile(r"\w*(layers?|depths?|blocks?|labels|block_(sizes|repeats))")
_COUNTED = re.compile(r"(num|n)_\w+|\w*experts")
_MOST_COUNTED = 1 << 16
_MOST_LISTED = 1 << 18
_MOST = 1 << 40
_FLOATS = {name: float(name) for name in ("Infinity", "-Infinity", "NaN")}  # JSON has none of them
_BUILD_IT = "Build the model yourself: autoq.load_quantized(factory, folder)."


def load(folder: str | Path, *, attn_implementation: str | None = None) -> Any:
    """A transformers model from a folder of ``autoq.save_quantized``, on the CPU and in eval mode.

    The class is the one ``config.json`` names, if transformers has it; a configuration that would make transformers
    fetch or run something else is refused. The model is built without weights.
    ``transformers.AutoTokenizer.from_pretrained(folder)`` reads the tokenizer, if one was saved there.

    Args:
        folder: the checkpoint.
        attn_implementation: transformers' name of an attention, such as ``"eager"``; None takes the plan's, else
            transformers' default.

    Returns:
        A ``transformers.PreTrainedModel``.

    Raises:
        InputError: if transformers is not installed.
        CheckpointError: as ``autoq.load_quantized``, and if transformers cannot build the model from its configuration.
    """
    transformers = _transformers()
    with without_collection(), opened(Path(folder)) as checkpoint:
        model = _built(transformers, checkpoint, attn_implementation)
        reshape(model, checkpoint)
        install(model, checkpoint)
        mark(model)
        plan = plan_of(model)
        if attn_implementation is None and plan is not None and plan.model.get("attention") == "autoq":
            use_attention(model, "autoq")
        generation = checkpoint.json(GENERATION)
        if GENERATION in checkpoint.texts:
            with _understood(checkpoint.folder / GENERATION):
                _check(generation, checkpoint.folder / GENERATION, checkpoint)
                model.generation_config = transformers.GenerationConfig.from_dict(_decoded(generation))
    return model.eval()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autoq.hf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"autoq.{_HOMES[name]}"), name)


def _built(transformers: Any, checkpoint: Checkpoint, attn_implementation: str | None) -> Any:
    """The model that the configuration describes, without values."""
    path = checkpoint.folder / CONFIG
    value = checkpoint.json(CONFIG)
    if value is None:
        raise CheckpointError(
            f"a transformers model's checkpoint has {CONFIG}", where=str(checkpoint.folder), got="none", fix=_BUILD_IT
        )
    if isinstance(value, dict):
        value.pop(CONFIG_KEY, None)  # for transformers' own from_pretrained
    _check(value, path, checkpoint)
    with _understood(path), _at_most(10_000 + 16 * len(checkpoint.forms)):
        config = transformers.CONFIG_MAPPING[value.get("model_type")].from_dict(_decoded(value))
        kind = _named(transformers, value.get("architectures"), config, path)
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        model = skeleton(lambda: kind(config))
    if model is None:
        raise CheckpointError("transformers can build the model without values", where=str(path), fix=_BUILD_IT)
    return model


def _named(transformers: Any, names: Any, config: Any, path: Path) -> Any:
    """The class of transformers' own that the configuration names."""
    name = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else ""
    kind: Any = getattr(transformers, name, None) if name.isidentifier() else None
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if is_model and kind.config_class is not None and isinstance(config, kind.config_class):
        return kind
    raise CheckpointError(
        '"architectures" has the class of a transformers model', where=str(path), got=shown(names), fix=_BUILD_IT
    )


def _check(value: Any, path: Path, checkpoint: Checkpoint) -> None:
    """Refuse settings that fetch or run other code, and numbers that the checkpoint's tensors do not account for."""
    if not isinstance(value, dict):
        raise CheckpointError("a configuration is a JSON object", where=str(path), got=type(value).__name__)
    longest = max((max(form.shape, default=1) for form in checkpoint.forms.values() if form.nbytes), default=1)
    repeated = 1024 + 16 * len(checkpoint.forms)
    for where, key, one in settings(value):
        if (_FOREIGN.fullmatch(key) and one not in (None, False)) or _is_foreign_type(key, one):
            raise CheckpointError(
                f"{where} would let transformers fetch or run other code",
                where=str(path),
                got=shown(one),
                fix=_BUILD_IT,
            )
        if isinstance(one, dict):
            continue
        listed = isinstance(one, list)
        items = one if listed else [one]
        sizes = [abs(item) for item in items if isinstance(item, int | float)]
        most = _MOST
        if _REPEATED.fullmatch(key):
            most, sizes = repeated, [sum(sizes)]
        elif _COUNTED.fullmatch(key):
            most = max(_MOST_COUNTED, longest)
        elif listed:
            most = max(_MOST_LISTED, longest)
        if max(sizes, default=0) > most:
            raise CheckpointError(f"{where} is at most {most} here", where=str(path), got=shown(one), fix=_BUILD_IT)


def _is_foreign_type(key: str, value: Any) -> bool:
    return key == "model_type" and isinstance(value, str) and _FOREIGN_TYPE.fullmatch(value) is not None


def _decoded(value: Any) -> Any:
    """The value with the numbers that transformers writes as ``{"__float__": "Infinity"}``."""
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"__float__"} and isinstance(value["__float__"], str) and value["__float__"] in _FLOATS:
        return _FLOATS[value["__float__"]]
    return {key: _decoded(one) for key, one in value.items()}


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """What transformers raises on a configuration that makes no sense, as a CheckpointError."""
    from huggingface_hub.errors import StrictDataclassError

    kinds = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError)
    try:
        yield
    except (*kinds, RuntimeError, StrictDataclassError, TypeError, ValueError) as problem:
        raise CheckpointError(
            "transformers understands the configuration",
            where=str(path),
            got=f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}",
            fix=_BUILD_IT,
        ) from problem


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Stop this thread from building a model of more modules and parameters than that."""
    thread, made = threading.get_ident(), 0

    def counted(*_: Any) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > count:
            raise CheckpointError(
                f"the model has at most {count} modules and parameters", where=CONFIG, got="more", fix=_BUILD_IT
            )

    hooks = (
        registration.register_module_module_registration_hook(counted),
        registration.register_module_parameter_registration_hook(counted),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _transformers() -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise InputError("autoq.hf needs transformers", got="it is not installed", fix="Run: pip install 'autoq[hf]'")
    return importlib.import_module("transformers")


if importlib.util.find_spec("transformers") is not None:
    importlib.import_module("autoq.hf_quantizer")  # registers itself
