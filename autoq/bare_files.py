"""Quantized checkpoints without a manifest: only tensor files, which say in their metadata what a manifest would."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from autoq._files import parse_json, shown
from autoq.checkpoint_files import PLAN, Checkpoint, check_maps, check_schema, forms_of, told_where, unreadable
from autoq.errors import CheckpointError
from autoq.shards import MAX_HEADER_BYTES, NOTE, TensorFile, read_header


@contextmanager
def opened_files(paths: Sequence[Path]) -> Iterator[Checkpoint]:
    """The tensor files of a quantized model without its manifest, as transformers' ``save_pretrained`` writes them.

    Their headers are checked as in ``opened``; nothing says what the tensors must hash to.

    Args:
        paths: all files, of one folder; links are followed.

    Raises:
        CheckpointError: if a file is missing, not understood, or none says that autoq quantized the model.
    """
    folder = paths[0].parent
    with told_where(folder), ExitStack() as stack:
        files: list[TensorFile] = []
        limit = MAX_HEADER_BYTES
        try:
            for path in paths:
                stream = stack.enter_context(path.open("rb"))
                files.append(read_header(path, stream.fileno(), limit))
                limit -= len(files[-1].head)
        except OSError as problem:
            raise unreadable(folder, problem) from problem
        note = _note(files)
        yield Checkpoint(
            folder=folder,
            layers=note["layers"],
            tied=note["tied"],
            texts={PLAN: json.dumps(note["plan"]).encode()},
            files=tuple((file, None) for file in files),
            forms=forms_of(files),
        )


def _note(files: Sequence[TensorFile]) -> dict[str, Any]:
    """What the files' metadata says in place of a manifest."""
    text = next((file.metadata[NOTE] for file in files if NOTE in file.metadata), None)
    path = files[0].path
    if text is None:
        raise CheckpointError(
            f"tensor files of a quantized model have {NOTE!r} in their metadata",
            where=str(path),
            got="none",
            fix='Remove "quantization_config" from config.json if the model is not quantized.',
        )
    note = parse_json(text, CheckpointError, what=f"the metadata {NOTE!r}", where=str(path))
    if not isinstance(note, dict) or set(note) != {"schema", "layers", "tied", "plan"}:
        raise CheckpointError("the metadata has schema, layers, tied and plan", where=str(path), got=shown(note))
    check_schema(note["schema"], path)
    check_maps(note, ("layers", "tied"), path)
    return note
