"""Safetensors files read into given memory, with a SHA-256 of every 16 MiB checked on the way.

A file is eight bytes with the header's length, the header (JSON: name → dtype, shape, offsets) and the tensors' bytes
without gaps. Nothing of it is trusted: a header must fit the file exactly, bytes go straight into the tensors they are
for, and what is hashed is what lies there afterwards, so a file that changes meanwhile is found out.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoq._files import parse_json, shown
from autoq.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
PIECE_BYTES = 1 << 24
MAX_HEADER_BYTES = 1 << 26  # of all files of a checkpoint together; as JSON one has at most 250,000 tensors
MAX_DIMENSIONS = 8
NOTE = "autoq"  # in a file's metadata

_BATCH_BYTES = 1 << 20  # read and hashed at once: it stays in the second-level cache
_BATCH_BUFFERS = 256
DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.complex64: "C64",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Form(NamedTuple):
    """A tensor's shape and dtype, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Hashes(NamedTuple):
    """What a file's content must be: the SHA-256 of each of its pieces, in hexadecimal digits."""

    sha256: tuple[str, ...]
    piece_bytes: int = PIECE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """An open safetensors file whose header was read and fits its size.

    Attributes:
        path: for messages.
        handle: the open file's descriptor.
        size: bytes of the whole file.
        head: the file's first bytes, up to the first tensor's.
        forms: tensor name → shape and dtype.
        offsets: tensor name → where its bytes start in the file.
        metadata: the header's texts by name.
    """

    path: Path
    handle: int
    size: int
    head: bytes
    forms: Mapping[str, Form]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]


class _Piece(NamedTuple):
    """The bytes of a file under one hash, and where they go."""

    file: TensorFile
    starts: Sequence[int]  # of the views in the file
    views: Sequence[memoryview]  # of the whole file, the header first
    begin: int
    end: int
    sha256: str | None


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, writable."""
    data: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return data


def check_hashes(data: bytes, hashes: Hashes, path: Path) -> None:
    """Refuse a small file whose bytes are not those that were saved.

    Raises:
        CheckpointError: with the file.
    """
    starts = range(0, len(data), hashes.piece_bytes)
    found = [hashlib.sha256(data[at : at + hashes.piece_bytes]).hexdigest() for at in starts]
    if found != list(hashes.sha256):
        raise changed(path, "other content (the hash differs)")


def read_header(path: Path, handle: int, limit: int) -> TensorFile:
    """Read and check the header of an open safetensors file.

    Args:
        path: for messages.
        handle: its descriptor, which stays the caller's.
        limit: the longest header accepted, in bytes.

    Raises:
        CheckpointError: if the header is too long, not understood, or does not cover the file exactly.
        OSError: if the file cannot be read.
    """
    size = os.fstat(handle).st_size
    start = os.pread(handle, 8, 0)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(limit, size - 8):
        raise CheckpointError(
            f"a safetensors file starts with the length of its header, at most {min(limit, max(0, size - 8))} here",
            where=str(path),
            got=length,
        )
    text = os.pread(handle, length, 8)
    if len(text) != length:
        raise changed(path, "a file that was cut while it was read")
    header = parse_json(text, CheckpointError, what="a safetensors header", where=str(path))
    if not isinstance(header, dict):
        raise CheckpointError("a safetensors header is a JSON object", where=str(path))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(one, str) for one in metadata.values()):
        raise CheckpointError('"__metadata__" is an object of texts', where=str(path))
    entries = {name: _entry(name, value, path) for name, value in header.items()}
    end = 0
    for name, (form, begin, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if begin != end or stop - begin != form.nbytes:
            got = f"{form.nbytes} bytes of shape and dtype at [{begin}, {stop}], the bytes before end at {end}"
            raise CheckpointError(
                "tensors fill the file without gaps or overlaps", where=f"{path}: {shown(name)}", got=got
            )
        end = stop
    if 8 + length + end != size:
        raise CheckpointError("tensors end where the file ends", where=str(path), got=f"{8 + length + end} of {size}")
    return TensorFile(
        path=path,
        handle=handle,
        size=size,
        head=start + text,
        forms={name: form for name, (form, _, _) in entries.items()},
        offsets={name: 8 + length + begin for name, (_, begin, _) in entries.items()},
        metadata=metadata,
    )


def read_files(files: Sequence[tuple[TensorFile, Hashes | None]], targets: Mapping[str, Tensor], threads: int) -> None:
    """Fill tensors from files, each byte read once, and check the bytes that arrived.

    Args:
        files: the files with the hashes of their pieces, or None where nothing says what they must be.
        targets: tensor name → contiguous tensor on the CPU, for every tensor of the files.
        threads: how many read and hash at once.

    Raises:
        CheckpointError: naming the first file whose content is not what was saved.
        OSError: if a file cannot be read.
    """
    jobs: list[_Piece] = []
    for file, hashes in files:
        order = sorted(file.offsets.items(), key=lambda item: (item[1], file.forms[item[0]].nbytes))
        starts = [0, *(start for _, start in order)]
        views = [memoryview(file.head), *(bytes_of(targets[name]) for name, _ in order)]
        piece_bytes = PIECE_BYTES if hashes is None else hashes.piece_bytes
        begins = range(0, file.size, piece_bytes)
        wanted_here: Sequence[str | None] = [None] * len(begins) if hashes is None else hashes.sha256
        if len(wanted_here) != len(begins):
            raise CheckpointError(
                f"a file has a hash per {piece_bytes} bytes", where=str(file.path), got=len(wanted_here)
            )
        for begin, wanted in zip(begins, wanted_here, strict=True):
            end = min(begin + piece_bytes, file.size)
            jobs.append(_Piece(file, starts, views, begin, end, wanted))
    pool = ThreadPoolExecutor(max(1, threads))
    try:
        for _ in pool.map(_read_piece, jobs):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _entry(name: str, value: Any, path: Path) -> tuple[Form, int, int]:
    """Form, begin and end of a header's entry."""
    fields = value if isinstance(value, dict) and set(value) == {"dtype", "shape", "data_offsets"} else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    known = _DTYPES.get(dtype) if isinstance(dtype, str) else None
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
    whole = all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in numbers)
    if known is None or not whole or len(shape or ()) > MAX_DIMENSIONS or len(offsets or ()) != 2:
        raise CheckpointError(
            "a tensor has a dtype, a shape and two data_offsets", where=f"{path}: {shown(name)}", got=shown(value)
        )
    return Form(tuple(shape or ()), known), numbers[-2], numbers[-1]


def _read_piece(piece: _Piece) -> None:
    digest = hashlib.sha256()
    for start, views in _batches(piece):
        if start >= len(piece.file.head):  # else it is the header, which was read
            _fill(piece.file, start, views)
        for view in views if piece.sha256 is not None else ():
            digest.update(view)
    if piece.sha256 not in (None, digest.hexdigest()):
        raise changed(piece.file.path, f"other content in bytes {piece.begin} to {piece.end} (the hash differs)")


def _batches(piece: _Piece) -> Iterator[tuple[int, list[memoryview]]]:
    """The memory that a piece goes to: (where a batch starts in the file, its parts in order)."""
    number = bisect_right(piece.starts, piece.begin) - 1
    at, batch, held = piece.begin, list[memoryview](), 0
    while at + held < piece.end:
        inside = at + held - piece.starts[number]
        view = piece.views[number]
        part = view[inside : inside + min(piece.end - at - held, _BATCH_BYTES - held)]
        batch.append(part)
        held += len(part)
        if inside + len(part) == len(view):
            number += 1
        if number == 1 or held == _BATCH_BYTES or len(batch) == _BATCH_BUFFERS:
            yield at, batch
            at, batch, held = at + held, [], 0
    if batch:
        yield at, batch


def _fill(file: TensorFile, start: int, views: list[memoryview]) -> None:
    todo = [view for view in views if len(view)]
    while todo:
        got = os.preadv(file.handle, todo, start)
        if got == 0:
            raise changed(file.path, "a file that was cut while it was read")
        start += got
        while todo and got >= len(todo[0]):
            got -= len(todo.pop(0))
        if got:
            todo[0] = todo[0][got:]


def changed(path: Path, got: str) -> CheckpointError:
    """The error for a file that is not what was saved."""
    return CheckpointError(
        "the file is as it was saved",
        where=str(path),
        got=got,
        fix="Copy the folder again, or save the model again.",
    )
