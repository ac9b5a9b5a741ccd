"""Safetensors files written one tensor at a time, and hashed on the way; `shards` reads them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from autoq.shards import DTYPE_NAMES, INDEX, NOTE, PIECE_BYTES, SINGLE, bytes_of


def why_not_stored(tensor: Tensor) -> str | None:
    """Why a tensor cannot be written, or None if it can."""
    if tensor.is_meta:
        return "a tensor on the meta device"
    if hasattr(tensor, "__tensor_flatten__"):
        return f"a {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"a tensor that is {tensor.layout}".replace("torch.", "")
    return None if tensor.dtype in DTYPE_NAMES else f"a tensor of {tensor.dtype}".replace("torch.", "")


def write_files(
    folder: Path, tensors: Mapping[str, Tensor], max_bytes: int, note: str = ""
) -> dict[str, dict[str, Any]]:
    """Write tensors as one file, or as numbered files with an index where they have more than ``max_bytes``.

    Only one tensor is copied at a time, and only one that is not contiguous or not on the CPU.

    Args:
        folder: where; files of the same names are overwritten.
        tensors: name → tensor of any strides and device.
        max_bytes: of tensors in a file. A larger tensor has a file of its own.
        note: for the first file's metadata, under ``autoq``; empty for none.

    Returns:
        File name → its size in ``bytes`` and the ``sha256`` of each of its pieces.

    Raises:
        OSError: if a file cannot be written.
    """
    groups = groups_of(tensors, max_bytes)
    if len(groups) == 1:
        return {SINGLE: _write(folder / SINGLE, groups[0], note)}
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    notes = [note, *[""] * (len(groups) - 1)]
    written = {name: _write(folder / name, group, text) for name, group, text in zip(names, groups, notes, strict=True)}
    weight_map = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
    index = {
        "metadata": {"total_size": sum(one.nbytes for one in tensors.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    written[INDEX] = write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")
    return written


def groups_of(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """The tensors of each file that ``write_files`` writes, in order."""
    groups: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        if groups[-1] and held + tensor.nbytes > max_bytes:
            groups.append({})
            held = 0
        groups[-1][name] = tensor
        held += tensor.nbytes
    return groups


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Write a small file, and give its size and hashes as ``write_files`` does."""
    with path.open("wb") as stream:
        file = _Hashed(stream)
        file.write(memoryview(text.encode()))
        return file.identity()


class _Hashed:
    """A file that is hashed as it is written."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._digest, self._done = stream, hashlib.sha256(), list[str]()
        self._bytes = 0

    def write(self, data: memoryview) -> None:
        at = 0
        while at < len(data):
            part = data[at : at + PIECE_BYTES - self._bytes % PIECE_BYTES]
            self._stream.write(part)
            self._digest.update(part)
            at, self._bytes = at + len(part), self._bytes + len(part)
            if self._bytes % PIECE_BYTES == 0:
                self._end_piece()

    def identity(self) -> dict[str, Any]:
        """Size and hashes of what was written, which is on disk then."""
        if self._bytes % PIECE_BYTES:
            self._end_piece()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return {"bytes": self._bytes, "sha256": self._done}

    def _end_piece(self) -> None:
        self._done.append(self._digest.hexdigest())
        self._digest = hashlib.sha256()


def _write(path: Path, tensors: Mapping[str, Tensor], note: str) -> dict[str, Any]:
    # The widest types come first, so that every tensor starts at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | ({NOTE: note} if note else {})}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        file = _Hashed(stream)
        file.write(memoryview(struct.pack("<Q", len(text)) + text))
        for name in order:
            file.write(bytes_of(tensors[name].detach().resolve_conj().resolve_neg().cpu().contiguous()))
        return file.identity()
