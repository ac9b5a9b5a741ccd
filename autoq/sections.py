"""A packed weight from its named sections, as checkpoints and state dicts hold it, checked before a kernel sees it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from autoq import candidates
from autoq._files import parse_json, shown
from autoq.candidates import Candidate, Packed
from autoq.errors import CheckpointError
from autoq_kernels import layout
from autoq_kernels.cpu.memory import use_large_pages

HEADER = "weight_header"
SCHEME = "weight_scheme"
# In the order in which they lie in the buffer; the planes of the codes without gaps.
_CODES = ("weight_codes", "weight_codes_8", "weight_codes_4", "weight_codes_2", "weight_codes_1")
_REST = ("weight_scale", "weight_minimum", "weight_row_scale", "weight_column_scale")
_MAX_SCHEME_BYTES = 4096
_MAX_GROUP = 1 << 16

Forms = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Unfilled(NamedTuple):
    """Memory for a packed weight whose sections are still to be copied in.

    Attributes:
        data: the buffer, uint8; what lies between sections is zero.
        views: section → its part of the buffer; the scheme's text, which is no part of it, by itself.
    """

    data: Tensor
    views: dict[str, Tensor]


def allocate(forms: Forms, *, where: str, device: torch.device | str = "cpu") -> Unfilled:
    """Memory for a packed weight, laid out by its sections' sizes alone.

    Args:
        forms: shape and dtype of header, scheme and sections by name.
        where: the layer's name, for error messages.
        device: of the buffer.

    Raises:
        CheckpointError: if header or scheme are missing or of a wrong size, or a section is unknown.
    """
    unknown = sorted(set(forms) - {HEADER, SCHEME, *_CODES, *_REST})
    odd = [name for name, (shape, _) in forms.items() if not 1 <= len(shape) <= 2 or min(shape) < 1]
    fixed = {HEADER: layout.HEADER_BYTES, SCHEME: _MAX_SCHEME_BYTES}
    for name, most in fixed.items():
        shape, dtype = forms.get(name, ((), None))
        if dtype != torch.uint8 or len(shape) != 1 or shape[0] > most or (name == HEADER and shape[0] != most):
            got = f"{name}: {dtype} {list(shape)}" if name in forms else ", ".join(sorted(forms)) or "nothing"
            raise CheckpointError(f"a quantized weight has {HEADER} and {SCHEME}", where=where, got=got)
    if unknown or odd:
        raise CheckpointError(
            "a quantized weight has known sections, vectors and matrices", where=where, got=shown((unknown + odd)[0])
        )
    starts, end = {}, layout.HEADER_BYTES
    for names in (_CODES, *((name,) for name in _REST)):
        for name in names:
            if name in forms:
                starts[name], end = end, end + _nbytes(forms[name])
        end = -(-end // layout.ALIGNMENT) * layout.ALIGNMENT
    data = torch.empty(end + layout.TRAILING_BYTES, dtype=torch.uint8, device=device)
    use_large_pages(data)
    views = {
        HEADER: data[: layout.HEADER_BYTES],
        SCHEME: torch.empty(forms[SCHEME][0], dtype=torch.uint8, device=device),
    }
    filled = layout.HEADER_BYTES
    for name, start in starts.items():
        shape, dtype = forms[name]
        data[filled:start] = 0
        filled = start + _nbytes(forms[name])
        if start % dtype.itemsize:
            raise CheckpointError("planes of codes are bytes", where=where, got=f"{name}: {dtype}")
        views[name] = data[start:filled].view(dtype).reshape(shape)
    data[filled:] = 0
    return Unfilled(data, views)


def finished(
    buffer: Unfilled, *, where: str, schemes: dict[bytes, Candidate] | None = None
) -> tuple[Packed, Candidate]:
    """The packed weight of a filled buffer, and its scheme.

    Args:
        buffer: every section copied in.
        where: the layer's name, for error messages.
        schemes: text → scheme of those that were understood before; a new one is added.

    Raises:
        CheckpointError: if the header is not that of these sections, or of another scheme.
        CandidateError: if the scheme is unknown.
    """
    text = bytes(buffer.views[SCHEME].tolist())
    known = {} if schemes is None else schemes
    candidate = known.get(text) or known.setdefault(text, _scheme(text, where))
    try:
        form = layout.header(buffer.data)
        _check_numbers(form, buffer)
        found = {name: (tuple(one.shape), one.dtype, one.data_ptr()) for name, one in _sections(buffer.data).items()}
    except (ValueError, RuntimeError, KeyError) as problem:  # LayoutError is a ValueError
        raise CheckpointError("a weight's header and sections fit", where=where, got=str(problem)) from problem
    wanted = {name: (tuple(one.shape), one.dtype, one.data_ptr()) for name, one in buffer.views.items()}
    if wanted | found != wanted or len(found) != len(wanted) - 2:
        raise CheckpointError("the sections are those the header names", where=where, got=", ".join(sorted(wanted)))
    if not candidate.fits(form):
        raise CheckpointError(f"the header is one of {candidate.scheme}", where=where, got=form)
    return Packed(buffer.data), candidate


def _scheme(text: bytes, where: str) -> Candidate:
    value = parse_json(text, CheckpointError, what="a layer's scheme", where=where)
    if not isinstance(value, dict):
        raise CheckpointError("a layer's scheme is a JSON object", where=where, got=shown(value))
    return candidates.parse(value)


def assemble(sections: Mapping[str, Tensor], *, where: str) -> tuple[Packed, Candidate]:
    """A packed weight from its named sections, checked: the inverse of ``QuantLinear.sections``.

    Args:
        sections: header, scheme and sections by name, on one device.
        where: the layer's name, for error messages.

    Raises:
        CheckpointError: if a section is missing, unknown or of another size than the header says.
        CandidateError: if the scheme is unknown.
    """
    forms = {name: (tuple(one.shape), one.dtype) for name, one in sections.items()}
    device = sections[HEADER].device if HEADER in sections else "cpu"
    buffer = allocate(forms, where=where, device=device)
    for name, view in buffer.views.items():
        view.copy_(sections[name])
    return finished(buffer, where=where)


def _check_numbers(form: layout.Header, buffer: Unfilled) -> None:
    """Refuse a header with numbers that no weight of this size has: kernels trust them."""
    total = len(buffer.data)
    most = 8 * total  # a weight has at least a bit
    small = form.n > 0 and form.k > 0 and form.n * form.k <= most and 0 <= form.group_size <= _MAX_GROUP
    if not small or form.total_bytes != total:
        raise layout.LayoutError(f"{total} bytes hold another weight than {form}")
    made = _bytes_of(form)
    groups = -(-form.k // form.group_size) if form.group_size else 0
    if made != total or form.groups != groups:
        raise layout.LayoutError(f"a weight of {form} has {made} bytes and {groups} groups, not {total}")


@lru_cache(maxsize=256)
def _bytes_of(form: layout.Header) -> int:
    """What a weight of these fields takes; fields that contradict each other are refused with a LayoutError."""
    made = layout.allocate(
        kind=form.kind,
        bits=form.bits,
        n=form.n,
        k=form.k,
        group_size=form.group_size,
        activation_bits=form.activation_bits,
        m_switch=form.m_switch,
        has_column_scale=form.column_scale_offset != 0,
        device="meta",
    )
    return len(made)


def _sections(data: Tensor) -> dict[str, Tensor]:
    return {f"weight_{name}": one for name, one in layout.sections(data).items()}


def _nbytes(form: tuple[tuple[int, ...], torch.dtype]) -> int:
    count = 1
    for size in form[0]:
        count *= size
    return count * form[1].itemsize
