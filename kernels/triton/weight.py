"""Packed weights as the launchers see them: the header's numbers on the host, the bytes on the device.

Reading a header from a GPU waits for everything queued there, and cannot be done while a CUDA graph is recorded. So it
is read once for each storage, and remembered as long as that storage lives.
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from autoq_kernels import layout

_ALIGNMENT = 16  # bytes; what a thread loads at a time


class Weight(NamedTuple):
    """A packed weight.

    Attributes:
        form: its header.
        head: uint8 [128] or longer, a view of its first bytes, on the device.
        column_power: the largest column scale is at most 2 to this power; 0 without column scales.
        prepared: other libraries' layouts of the same weight, by name, made once.
    """

    form: layout.Header
    head: Tensor
    column_power: int
    prepared: dict[str, tuple[Tensor, ...]]


class Weights:
    """The packed weights seen so far, by storage."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # A weak reference keeps the address of a storage's record from being given to another, but not its memory.
        self._seen: dict[int, tuple[StorageWeakRef, dict[int, _Known]]] = {}

    def of(self, head: Tensor) -> Weight:
        """The weight behind a head; waits for the device the first time.

        Args:
            head: uint8 [128], a view of the packed weight's first bytes. The bytes of a storage that was seen must not
                change: another weight comes in a tensor of its own, or after `forget`.

        Raises:
            layout.LayoutError: not a packed weight, not aligned, or a view with nothing behind it.
            RuntimeError: its first use is inside the recording of a CUDA graph.
        """
        storage = head.untyped_storage()
        with self._lock:
            entry = self._seen.get(storage._cdata)
            if entry is None:
                self._forget_dead()
                entry = self._seen[storage._cdata] = (StorageWeakRef(storage), {})
        offset = head.storage_offset()
        known = entry[1].get(offset)
        if known is None:
            known = entry[1][offset] = _read(head)
        return Weight(known.form, head, known.column_power, known.prepared)

    def forget(self, head: Tensor) -> None:
        """Read a weight anew at its next use: for who wrote other bytes into its storage."""
        with self._lock:
            self._seen.pop(head.untyped_storage()._cdata, None)

    def __len__(self) -> int:
        """How many storages are remembered."""
        with self._lock:
            self._forget_dead()
            return len(self._seen)

    def _forget_dead(self) -> None:
        for key in [key for key, (reference, _) in self._seen.items() if reference.expired()]:
            del self._seen[key]


class _Known(NamedTuple):
    form: layout.Header
    column_power: int
    prepared: dict[str, tuple[Tensor, ...]]


def refuse_capture(head: Tensor) -> None:
    """Refuse what must wait for the device, or is done once, while a CUDA graph is recorded.

    Raises:
        RuntimeError: one is being recorded.
    """
    if head.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "autoq: a packed weight's first use cannot be inside a CUDA graph; run the model once before"
        )


def _read(head: Tensor) -> _Known:
    refuse_capture(head)
    if head.data_ptr() % _ALIGNMENT:
        raise layout.LayoutError(
            f"a packed weight on a GPU starts at a multiple of {_ALIGNMENT} bytes; got {head.data_ptr():#x}"
        )
    data = layout.buffer(head)
    form = layout.header(data)
    power = 0
    if form.column_scale_offset:
        largest = float(layout.sections(data)["column_scale"].abs().max())
        power = math.frexp(largest)[1]
    return _Known(form, power, {})


def stand_in(form: layout.Header, *, device: torch.device | str = "meta", column_power: int = 0) -> Weight:
    """A weight without values, for compiling kernels where there is no device.

    Args:
        form: as `layout.header` of `layout.allocate` gives it.
        device: of the bytes; on "meta" there are none.
        column_power: as in `Weight`.
    """
    head = torch.empty(form.total_bytes, dtype=torch.uint8, device=device)[: layout.HEADER_BYTES]
    return Weight(form, head, column_power, {})


def arguments(weight: Weight) -> dict[str, Tensor | int]:
    """Where a kernel finds the sections: the buffer and offsets in bytes, 0 where a section is absent."""
    form = weight.form
    low = layout.PLANES[form.bits][0] if form.kind is not layout.Kind.INT8 else 8
    return {
        "head": weight.head,
        "n": form.n,
        "k": form.k,
        "padded": form.k_padded,
        "groups": form.groups,
        "codes_offset": form.codes_offset,
        "high_offset": form.codes_offset + form.n * form.k_padded * low // 8,
        "scale_offset": form.scale_offset,
        "minimum_offset": form.minimum_offset,
        "factor_offset": form.row_scale_offset if form.kind is layout.Kind.AFFINE else form.scale_offset,
        "column_offset": form.column_scale_offset,
    }


def constants(weight: Weight) -> dict[str, int | bool]:
    """What a kernel is compiled for that depends on the weight alone."""
    form = weight.form
    return {
        "KIND": int(form.kind),
        "BITS": form.bits,
        "GROUP": form.group_size,
        "HAS_MINIMUM": form.minimum_offset > 0,
        "HAS_FACTOR": form.kind is not layout.Kind.AFFINE or form.row_scale_offset > 0,
        "HAS_COLUMN": form.column_scale_offset > 0,
    }


def grain(form: layout.Header) -> int:
    """The largest of 128, 32, 16, 2 and 1 that divides the codes in a row, as a kernel is compiled for it."""
    return next(size for size in (128, 32, 16, 2, 1) if form.k_padded % size == 0)
