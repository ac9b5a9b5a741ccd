"""Quantized models as folders: safetensors for all tensors, the plan, and a manifest with hashes. No pickles."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autoq._files import reason_of
from autoq.checkpoint_files import (
    CONFIG,
    GENERATION,
    MANIFEST,
    MOST_FILES,
    PLAN,
    check_readable,
    is_own,
    opened,
    write_manifest,
)
from autoq.errors import CheckpointError
from autoq.folders import new_folder, resolved
from autoq.hf_marks import mark
from autoq.installing import install, skeleton, without_collection
from autoq.modules import quantized_layers, unwrap
from autoq.opening import printable
from autoq.plan_text import text_of
from autoq.shard_writing import groups_of, write_files, write_text
from autoq.stored import CONFIG_KEY, config_entry, note_in_files, stored_layers, stored_plan, stored_tensors

_log = logging.getLogger(__name__)
MAX_SHARD_BYTES = 4 << 30


def save_quantized(
    model: nn.Module, directory: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES, tokenizer: Any = None
) -> None:
    """Write a model, quantized or not, as a folder that ``load_quantized`` reads.

    ``model.safetensors`` has every parameter and buffer (also those that ``state_dict`` leaves out) and the quantized
    weights' canonical sections; tied tensors lie there once. Above ``max_shard_bytes`` it is numbered files and an
    index, named as transformers names them. ``plan.json`` is the plan the model carries, ``config.json`` and
    ``generation_config.json`` the model's own if it has them, ``autoq.json`` the layers' shapes, the ties and the
    files' hashes.

    The folder appears when it is complete and ``load_quantized`` would open it. An earlier checkpoint of that
    name is replaced in one step, and other files that were put into it stay; another folder with content is refused.

    Args:
        model: plain, compiled or wrapped.
        directory: the folder to make.
        max_shard_bytes: of tensors in a file.
        tokenizer: saved beside the model; anything with ``save_pretrained(folder)``.

    Raises:
        CheckpointError: if the folder cannot be written, holds something else or is the working directory, a tensor
            cannot be stored, or there would be more than a checkpoint holds.
    """
    root = unwrap(model)
    tensors, tied = stored_tensors(root)
    _check_count(tensors, max_shard_bytes)
    try:
        target = resolved(directory)
        _check_target(target)
        with new_folder(target) as folder:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            _carry(target, folder)
            files = _write_texts(root, folder)
            note = note_in_files(root, tied) if CONFIG in files else ""
            files |= write_files(folder, tensors, max_shard_bytes, note)
            fields = {
                "autoq": version("autoq"),
                "layers": stored_layers(root),
                "tied": tied,
                "files": dict(sorted(files.items())),
            }
            write_manifest(folder / MANIFEST, fields)
            check_readable(folder, target)
    except OSError as problem:
        raise CheckpointError(
            "the folder must be writable",
            where=printable(directory),
            got=reason_of(problem),
            fix="Choose another folder, or free space and permissions there.",
        ) from problem


def load_quantized(model_or_factory: nn.Module | Callable[[], nn.Module], directory: str | Path) -> nn.Module:
    """Read a folder of ``save_quantized`` into a model; the outputs are bit-equal to the saved model's.

    Every byte is read once, straight to its place, and hashed there. The float weights of quantized layers never exist.

    Args:
        model_or_factory: a float model of the same structure, changed in place; or a function that makes one. It is
            called with the meta device as default, so that its float weights are never allocated, and once more
            without where that fails (a model that computes with its tensors while it is built), which is logged.
        directory: the folder.

    Returns:
        The model; one that a factory made is on the CPU and in eval mode.

    Raises:
        CheckpointError: if a file is missing, cut or changed, or the checkpoint is of another model; the model is
            unchanged then.
        CandidateError: if a scheme is unknown to this version.
    """
    with without_collection(), opened(Path(directory)) as checkpoint:
        if isinstance(model_or_factory, nn.Module):
            install(model_or_factory, checkpoint)
            mark(model_or_factory)
            return model_or_factory
        model = skeleton(model_or_factory)
        if model is None:
            _log.warning("the model cannot be built without values: its float weights are allocated, then replaced")
            model = model_or_factory()
        install(model, checkpoint)
        mark(model)
        return model.eval()


def _write_texts(root: nn.Module, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the plan and the model's configurations; file name → identity."""
    texts = {PLAN: text_of(stored_plan(root).to_json()) + "\n"}
    for name, attribute in ((CONFIG, "config"), (GENERATION, "generation_config")):
        to_json = getattr(getattr(root, attribute, None), "to_json_string", None)
        if callable(to_json):
            texts[name] = str(to_json())
    if CONFIG in texts:
        # As transformers' own save_pretrained does, so that the folder says what to build.
        more = {"architectures": [type(root).__name__], "dtype": str(root.dtype).removeprefix("torch.")}
        config = {key: one for key, one in json.loads(texts[CONFIG]).items() if key != CONFIG_KEY} | more
        if quantized_layers(root):
            config[CONFIG_KEY] = config_entry()
        texts[CONFIG] = json.dumps(config, indent=2) + "\n"
    return {name: write_text(folder / name, text) for name, text in texts.items()}


def _carry(old: Path, new: Path) -> None:
    """What others put into the folder of an earlier checkpoint (a tokenizer, a description), kept unless it is new."""
    for path in old.iterdir() if old.is_dir() else ():
        if is_own(path.name) or os.path.lexists(new / path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def _check_count(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Refuse to write more files than are opened at once."""
    others = 4  # the index, the plan, two configurations
    if max_shard_bytes < 1 or len(groups_of(tensors, max_shard_bytes)) + others > MOST_FILES:
        # Two files in a row are always fuller than one may be.
        enough = 1 + 2 * sum(tensor.nbytes for tensor in tensors.values()) // (MOST_FILES - others - 1)
        raise CheckpointError(
            f"a checkpoint has at most {MOST_FILES} files",
            where="max_shard_bytes",
            got=max_shard_bytes,
            fix=f"Pass at least {enough}.",
        )


def _check_target(target: Path) -> None:
    """Refuse to replace anything but a checkpoint or an empty folder."""
    is_folder = target.is_dir()
    free = not os.path.lexists(target) or (is_folder and ((target / MANIFEST).is_file() or not any(target.iterdir())))
    if not free:
        kind = "a symbolic link that leads nowhere" if target.is_symlink() else "a file"
        raise CheckpointError(
            "a checkpoint replaces only a checkpoint or an empty folder",
            where=str(target),
            got="a folder with other content" if is_folder else kind,
            fix="Choose another folder.",
        )
    if is_folder and target in (here := Path.cwd(), *here.parents):
        raise CheckpointError(
            "the working directory is not replaced: whatever runs in it would be in a removed folder",
            where=str(target),
            got=f"the working directory {here}",
            fix="Save from another directory, or into a new folder below this one.",
        )
