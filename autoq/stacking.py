"""Packed weights of one form in one buffer, their rows under each other, and the way back.

A row of a packed weight is what it is without its neighbours, so rows are copied, never packed anew.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from autoq.sections import HEADER, SCHEME, Unfilled, allocate
from autoq_kernels import layout

_COLUMNS = "column_scale"  # [K], shared by all rows
_OFFSETS = {
    "codes_offset": ("codes", "codes_8", "codes_4", "codes_2", "codes_1"),  # whichever comes first
    "scale_offset": ("scale",),
    "minimum_offset": ("minimum",),
    "row_scale_offset": ("row_scale",),
    "column_scale_offset": (_COLUMNS,),
}
_OF_A_BUFFER = (*_OFFSETS, "n", "total_bytes")


def why_not_stacked(weights: Sequence[Tensor]) -> str | None:
    """Why packed weights cannot share a buffer; None if they can.

    Args:
        weights: whole buffers, uint8.
    """
    if len({one.device for one in weights}) > 1:
        return "they are on different devices"
    first, *others = [(layout.header(one), layout.sections(one)) for one in weights]
    form = first[0]._replace(**dict.fromkeys(_OF_A_BUFFER, 0))
    for other, sections in others:
        if other._replace(**dict.fromkeys(_OF_A_BUFFER, 0)) != form or sections.keys() != first[1].keys():
            return "their packed forms differ"
        if _COLUMNS in sections and not torch.equal(sections[_COLUMNS], first[1][_COLUMNS]):
            return "each has column scales of its own"
    return None


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """One buffer with the rows of all.

    Args:
        weights: whole buffers of weights [N_i, K] that `why_not_stacked` accepts.

    Returns:
        uint8, the buffer of the weight [ΣN_i, K].
    """
    parts = [layout.sections(one) for one in weights]
    pieces = {name: [part[name] for part in parts[: 1 if name == _COLUMNS else None]] for name in parts[0]}
    return _built(layout.header(weights[0]), pieces, weights[0].device)


def rows(data: Tensor, begin: int, end: int) -> Tensor:
    """The buffer of some rows of a weight, as packing them alone would lay it out.

    Args:
        data: the whole buffer of a weight [N, K].
        begin: the first row.
        end: the row after the last.
    """
    pieces = {name: [one] for name, one in _cut(data, begin, end).items()}
    return _built(layout.header(data), pieces, data.device)


def row_sections(data: Tensor, begin: int, end: int) -> dict[str, Tensor]:
    """The sections of `rows` by the names checkpoints have for them, as views of `data`; the header is new.

    Args:
        data: the whole buffer of a weight [N, K].
        begin: the first row.
        end: the row after the last.
    """
    cut = _cut(data, begin, end)
    unfilled = allocate(_forms({name: [one] for name, one in cut.items()}), where="", device="meta")
    header = _header(layout.header(data), end - begin, unfilled).to(data.device)
    return {HEADER: header} | {f"weight_{name}": one for name, one in cut.items()}


def _cut(data: Tensor, begin: int, end: int) -> dict[str, Tensor]:
    return {name: one if name == _COLUMNS else one[begin:end] for name, one in layout.sections(data).items()}


def _built(form: layout.Header, pieces: Mapping[str, Sequence[Tensor]], device: torch.device) -> Tensor:
    """The buffer whose sections are these pieces, one after the other."""
    unfilled = allocate(_forms(pieces), where="", device=device)
    n = 0
    for name, found in pieces.items():
        view, done = unfilled.views[f"weight_{name}"], 0
        for piece in found:
            view[done : done + len(piece)] = piece
            done += len(piece)
        n = n if name == _COLUMNS else done
    unfilled.views[HEADER].copy_(_header(form, n, unfilled))
    return unfilled.data


def _forms(pieces: Mapping[str, Sequence[Tensor]]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What `allocate` asks for; the scheme's text, which lies outside the buffer, as one byte."""
    fixed = {HEADER: ((layout.HEADER_BYTES,), torch.uint8), SCHEME: ((1,), torch.uint8)}
    return fixed | {
        f"weight_{name}": ((sum(map(len, found)), *found[0].shape[1:]), found[0].dtype)
        for name, found in pieces.items()
    }


def _header(form: layout.Header, n: int, unfilled: Unfilled) -> Tensor:
    """The header's bytes for n rows that lie as in a buffer, which may be on the meta device."""
    offsets = {}
    for field, names in _OFFSETS.items():
        found = (unfilled.views[f"weight_{name}"] for name in names if f"weight_{name}" in unfilled.views)
        view = next(found, None)
        offsets[field] = 0 if view is None else view.storage_offset() * view.element_size()
    new = form._replace(n=n, total_bytes=len(unfilled.data), **offsets)
    return torch.tensor(list(struct.pack("<16q", layout.MAGIC, layout.VERSION, *new)), dtype=torch.uint8)
