"""The files of a quantized checkpoint: the manifest, and everything it names, opened once and checked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoq._files import parse_json, reason_of, shown
from autoq.errors import CandidateError, CheckpointError, PlanError
from autoq.folders import recover, resolved
from autoq.opening import Opener, printable
from autoq.shard_writing import write_text
from autoq.shards import (
    INDEX,
    MAX_HEADER_BYTES,
    SHARD,
    SINGLE,
    Form,
    Hashes,
    TensorFile,
    changed,
    check_hashes,
    read_files,
    read_header,
)

SCHEMA = 3
FORMAT = "autoq-checkpoint"
MANIFEST = "autoq.json"
PLAN = "plan.json"
CONFIG = "config.json"  # the model's own, when it has one (transformers)
GENERATION = "generation_config.json"

_TEXT_LIMITS = {PLAN: 1 << 26, INDEX: 1 << 26, CONFIG: 1 << 24, GENERATION: 1 << 24}
_MANIFEST_LIMIT = 1 << 26
MOST_FILES = 512  # all are open at once
_FIELDS = {"format", "schema", "autoq", "layers", "tied", "files"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose small files are read and checked, and whose tensor files are open.

    Attributes:
        folder: for messages.
        layers: quantized layer → its shape, bias and dtype, as the manifest says.
        tied: tensor name → name of the stored tensor that it is.
        texts: name of a small file → its bytes.
        files: the tensor files with what they must hash to, where that is known.
        forms: tensor name → shape and dtype, of all files.
    """

    folder: Path
    layers: Mapping[str, Any]
    tied: Mapping[str, str]
    texts: Mapping[str, bytes]
    files: tuple[tuple[TensorFile, Hashes | None], ...]
    forms: Mapping[str, Form]

    def json(self, name: str) -> Any:
        """The value in a small file, as it was when its hash was checked; None if the checkpoint has no such file."""
        if name not in self.texts:
            return None
        return parse_json(self.texts[name], CheckpointError, what=name, where=str(self.folder / name))

    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Fill a tensor per name of ``forms``, on the CPU and contiguous, checking all hashes.

        Raises:
            CheckpointError: if a file is not what was saved, or cannot be read.
        """
        try:
            read_files(self.files, targets, torch.get_num_threads())
        except OSError as problem:
            raise unreadable(self.folder, problem) from problem


def is_own(name: str) -> bool:
    """Whether ``save_quantized`` gives this name to a file."""
    return name in (MANIFEST, SINGLE, *_TEXT_LIMITS) or SHARD.fullmatch(name) is not None


def write_manifest(path: Path, fields: Mapping[str, Any]) -> None:
    """Write the manifest: format, schema and hash are added.

    Raises:
        OSError: if it cannot be written.
    """
    manifest = {"format": FORMAT, "schema": SCHEMA, **fields}
    write_text(path, json.dumps(manifest | {"sha256": _own_hash(manifest)}, indent=1) + "\n")


@contextmanager
def opened(folder: Path) -> Iterator[Checkpoint]:
    """A checkpoint's files, opened once: what is read later is what was checked, whatever the folder holds by then.

    Args:
        folder: of ``save_quantized``. One that a killed save left under another name is brought back first.

    Raises:
        CheckpointError: if a file is missing, cut, changed, no regular file or not understood.
    """
    with told_where(folder), ExitStack() as stack:
        try:
            recover(resolved(folder))
            checkpoint = _opened(folder, stack)
        except OSError as problem:
            raise unreadable(folder, problem) from problem
        yield checkpoint


def check_readable(folder: Path, name: Path) -> None:
    """Refuse a folder that ``opened`` would refuse: the limits of reading hold for what is written too.

    Args:
        folder: a complete checkpoint. Its tensors are not read.
        name: that the folder will have, for messages.

    Raises:
        CheckpointError: with what cannot be read again.
    """
    try:
        with opened(folder):
            return
    except CheckpointError as problem:
        raise CheckpointError(
            f"what is saved can be loaded again, so: {problem.rule}",
            where=problem.where.replace(str(folder), str(name)),
            got=problem.got,
            fix="Nothing was written. Save the model without what is too large or too odd there.",
        ) from problem


@contextmanager
def told_where(folder: Path) -> Iterator[None]:
    """Every refusal names the folder, and says what to do."""
    try:
        yield
    except (CandidateError, CheckpointError, PlanError) as problem:
        name = printable(folder)
        where = problem.where if name in problem.where else f"{name}: {problem.where}" if problem.where else name
        fix = problem.fix or "Copy the folder again, or save the model again."
        if (where, fix) == (problem.where, problem.fix):
            raise
        raise type(problem)(problem.rule, where=where, got=problem.got, fix=fix) from problem


def _opened(folder: Path, stack: ExitStack) -> Checkpoint:
    """The checkpoint; read again where a save replaced the folder meanwhile."""
    while True:
        with ExitStack() as attempt:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            attempt.callback(os.close, handle)
            opener = Opener(folder, handle, attempt)
            try:
                checkpoint = _checkpoint(folder, _manifest(folder, opener), opener)
            except CheckpointError:
                if not folder.exists() or os.path.samestat(folder.stat(), os.fstat(handle)):
                    raise
                continue
            stack.push(attempt.pop_all())
            return checkpoint


def _manifest(folder: Path, opener: Opener) -> dict[str, Any]:
    """The manifest, with its fields' types and its own hash checked."""
    path = folder / MANIFEST
    try:
        data = opener.read(MANIFEST, _MANIFEST_LIMIT)
    except CheckpointError as problem:
        if not isinstance(problem.__cause__, FileNotFoundError):
            raise
        raise CheckpointError(
            f"a quantized checkpoint is a folder with {MANIFEST}",
            where=str(folder),
            got=problem.got,
            fix="Pass the folder that autoq.save_quantized wrote.",
        ) from problem
    manifest = parse_json(data, CheckpointError, what="the manifest", where=str(path))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f'"format" is "{FORMAT}"', where=str(path))
    schema = manifest.get("schema")
    check_schema(schema, path)
    own = manifest.pop("sha256", None)
    if schema != 1 and own != _own_hash(manifest):
        raise changed(path, "other content (the hash differs)")
    if set(manifest) != _FIELDS:
        raise CheckpointError(
            f"the manifest has {', '.join(sorted(_FIELDS))}", where=str(path), got=shown(sorted(manifest))
        )
    check_maps(manifest, ("layers", "tied", "files"), path)
    _check_names(set(manifest["files"]), path)
    return manifest


def check_schema(schema: Any, path: Path) -> None:
    """Refuse a schema that this version does not read."""
    if schema not in range(1, SCHEMA + 1) or isinstance(schema, bool):
        raise CheckpointError(
            f"this autoq reads checkpoints up to schema {SCHEMA}",
            where=str(path),
            got=shown(schema),
            fix="Upgrade autoq.",
        )


def check_maps(value: Mapping[str, Any], names: Sequence[str], path: Path) -> None:
    """Refuse what is no object in a manifest, and tied tensors without a name."""
    for name in names:
        if not isinstance(value[name], dict):
            raise CheckpointError(f"$.{name} is an object", where=str(path), got=type(value[name]).__name__)
    for name, source in value["tied"].items():
        if not isinstance(source, str):
            raise CheckpointError(f"$.tied[{json.dumps(name)}] is a name", where=str(path), got=shown(source))


def forms_of(files: Sequence[TensorFile]) -> dict[str, Form]:
    """Tensor name → its form, of all files."""
    forms: dict[str, Form] = {}
    for file in files:
        twice = sorted(forms.keys() & file.forms.keys())
        if twice:
            raise CheckpointError("a tensor is in one file", where=str(file.path), got=shown(twice[0]))
        forms |= file.forms
    return forms


def _check_names(names: set[str], path: Path) -> None:
    """Refuse a manifest that names other files than a checkpoint has: nothing outside the folder is ever opened."""
    shards = sorted(name for name in names if SHARD.fullmatch(name))
    whole = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    tensors = {*shards, INDEX} if shards else {SINGLE}
    wanted = tensors | {PLAN}
    if not wanted <= names <= wanted | {CONFIG, GENERATION} or shards != whole or len(names) > MOST_FILES:
        raise CheckpointError(
            f"$.files has {SINGLE}, or all numbered files and {INDEX}; {PLAN}; at most {CONFIG} and {GENERATION}",
            where=str(path),
            got=shown(sorted(names)),
        )


def _checkpoint(folder: Path, manifest: Mapping[str, Any], opener: Opener) -> Checkpoint:
    texts: dict[str, bytes] = {}
    files: list[tuple[TensorFile, Hashes | None]] = []
    places: dict[str, str] = {}
    limit = MAX_HEADER_BYTES
    for name, identity in sorted(manifest["files"].items()):
        path = folder / name
        size, hashes = _identity(identity, manifest["schema"], f"{folder / MANIFEST}: $.files[{json.dumps(name)}]")
        if name in _TEXT_LIMITS:
            texts[name] = opener.read(name, _TEXT_LIMITS[name])
            _check_size(len(texts[name]), size, path)
            check_hashes(texts[name], hashes, path)
            continue
        handle, found = opener.open(name)
        _check_size(found, size, path)
        file = read_header(path, handle, limit)
        limit -= len(file.head)
        files.append((file, hashes))
        places |= dict.fromkeys(file.forms, name)
    checkpoint = Checkpoint(
        folder=folder,
        layers=manifest["layers"],
        tied=manifest["tied"],
        texts=texts,
        files=tuple(files),
        forms=forms_of([file for file, _ in files]),
    )
    index = checkpoint.json(INDEX)
    if INDEX in texts and (not isinstance(index, dict) or index.get("weight_map") != places):
        raise CheckpointError('"weight_map" names the file of every tensor', where=str(folder / INDEX))
    return checkpoint


def _identity(value: Any, schema: int, where: str) -> tuple[int, Hashes]:
    """Size and hashes of a file; in schema 1 there was one hash of it all."""
    fields = value if isinstance(value, dict) and set(value) == {"bytes", "sha256"} else {}
    size, digests = fields.get("bytes"), fields.get("sha256")
    whole = isinstance(digests, str) and schema == 1
    found = [digests] if whole else digests if isinstance(digests, list) else [None]
    texts = tuple(one for one in found if isinstance(one, str))
    if len(texts) != len(found) or not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise CheckpointError("it has bytes and sha256", where=where, got=shown(value))
    return size, Hashes(texts, size) if whole else Hashes(texts)


def _check_size(found: int, wanted: int, path: Path) -> None:
    if found != wanted:
        raise changed(path, f"{found} of {wanted} bytes")


def _own_hash(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def unreadable(folder: Path, problem: OSError) -> CheckpointError:
    """The error for files that the operating system does not give."""
    return CheckpointError(
        f"a quantized checkpoint is a folder with {MANIFEST}, readable",
        where=printable(folder),
        got=reason_of(problem),
        fix="Pass the folder that autoq.save_quantized wrote.",
    )
