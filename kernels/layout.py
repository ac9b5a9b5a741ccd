"""The packed weight: one buffer of bytes that every kernel of every device reads.

A buffer is a header of sixteen little-endian int64 followed by sections that start at multiples of 64 bytes:
codes, scale, minimum, row scale, column scale. Kernels receive ``head``, a view of the first 128 bytes, and
find the rest behind it: the view's shape is the same for every scheme, so one compiled graph serves them all.

Legend of shapes: N outputs, K inputs, K_pad inputs rounded up to whole groups, G groups in a row.

Codes of fewer than 8 bits lie in bit planes, from the low bits up: 3 = 2+1, 4 = 4, 5 = 4+1, 6 = 4+2. A plane of
b bits is a matrix [N, K_pad·b/8]; in every block of 32 consecutive inputs of a row

====== ===== ==========================================================================================
plane  bytes byte j holds
====== ===== ==========================================================================================
8      32    input j
4      16    input j in the low nibble, j+16 in the high
2      8     inputs j, j+8, j+16, j+24, from the low bits up
1      4     inputs 8j … 8j+7, from the low bit up
====== ===== ==========================================================================================

so that a block of any plane unpacks with shifts alone, and a row can be read without knowing its neighbours.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from autoq_kernels.cpu.memory import use_large_pages

HEADER_BYTES = 128
MAGIC = 0x54554F41
VERSION = 1
BLOCK = 32  # inputs per packed block
ALIGNMENT = 64  # bytes; one cache line, and the widest vector register
TRAILING_BYTES = 64  # readable bytes behind the last section: kernels load whole vectors at a row's end
MAX_INT8_K = 131_072  # 131072·127·128 < 2^31: an int32 holds any product of two int8 rows of this length

PLANES: dict[int, tuple[int, ...]] = {3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
DENSE_BITS: dict[torch.dtype, int] = {torch.bfloat16: 16, torch.float16: 17, torch.float32: 32}
_DENSE_DTYPES = {bits: dtype for dtype, bits in DENSE_BITS.items()}


class LayoutError(ValueError):
    """A packed buffer cannot be built from these tensors, or is not one."""


class Kind(IntEnum):
    """What the codes mean; the formulas give the weight W[n, k]."""

    DENSE = 0  # the float weight itself
    INT8 = 1  # q·scale[n]
    AFFINE = 2  # (q·scale[n, g] + minimum[n, g])·row_scale[n]·column_scale[k]
    FP6_E3M2 = 3  # decode(q)·scale[n]: sign, 3 exponent bits (bias 3), 2 mantissa bits; no inf, no NaN
    FP6_E2M3 = 4  # decode(q)·scale[n]: sign, 2 exponent bits (bias 1), 3 mantissa bits; no inf, no NaN


class Header(NamedTuple):
    """The sixteen numbers at the start of a buffer; offsets are bytes from its start, 0 where absent."""

    kind: Kind
    bits: int
    n: int
    k: int
    group_size: int
    groups: int
    codes_offset: int
    scale_offset: int
    minimum_offset: int
    row_scale_offset: int
    column_scale_offset: int
    activation_bits: int
    m_switch: int
    total_bytes: int

    @property
    def k_padded(self) -> int:
        """Codes in a row of the packed planes."""
        if self.kind is Kind.AFFINE:
            return self.groups * self.group_size
        if self.kind in (Kind.FP6_E3M2, Kind.FP6_E2M3):
            return _round_up(self.k, BLOCK)
        return self.k


def fp6_values(kind: Kind) -> Tensor:
    """The 64 numbers an fp6 code stands for.

    Args:
        kind: FP6_E3M2 (largest 28, smallest step 1/16) or FP6_E2M3 (largest 7.5, smallest step 1/8).

    Returns:
        float32 [64], indexed by the code.
    """
    mantissa_bits, bias = (2, 3) if kind is Kind.FP6_E3M2 else (3, 1)
    magnitude = torch.arange(32)
    exponent, fraction = magnitude >> mantissa_bits, (magnitude % (1 << mantissa_bits)).float()
    normal = torch.exp2((exponent - bias).float()) * (1 + fraction / (1 << mantissa_bits))
    subnormal = 2.0 ** (1 - bias) * fraction / (1 << mantissa_bits)
    positive = torch.where(exponent > 0, normal, subnormal)
    return torch.cat([positive, -positive])


def pack_plane(values_NK: Tensor, bits: int) -> Tensor:
    """Pack one bit plane.

    Args:
        values_NK: uint8 [N, K_pad], each below ``2**bits``; K_pad is a multiple of 32.
        bits: 1, 2, 4 or 8.

    Returns:
        uint8 [N, K_pad·bits/8].
    """
    if bits == 8:
        return values_NK.contiguous()
    n, k = values_NK.shape
    parts = _interleaved(values_NK.reshape(n, k // BLOCK, BLOCK), bits)
    shifts = torch.arange(8 // bits, dtype=torch.uint8, device=values_NK.device) * bits
    return (parts << shifts[:, None]).sum(dim=2, dtype=torch.uint8).reshape(n, k * bits // 8)


def unpack_plane(plane: Tensor, bits: int) -> Tensor:
    """Undo `pack_plane`.

    Args:
        plane: uint8 [N, K_pad·bits/8].
        bits: 1, 2, 4 or 8.

    Returns:
        uint8 [N, K_pad], one value per byte.
    """
    if bits == 8:
        return plane
    n, k = plane.shape[0], plane.shape[1] * 8 // bits
    shifts = torch.arange(8 // bits, dtype=torch.uint8, device=plane.device) * bits
    parts = (plane.reshape(n, k // BLOCK, 1, BLOCK * bits // 8) >> shifts[:, None]) & ((1 << bits) - 1)
    if bits == 1:
        parts = parts.transpose(2, 3)
    return parts.reshape(n, k)


def _interleaved(blocks: Tensor, bits: int) -> Tensor:
    """[N, B, 32] -> [N, B, values per byte, bytes]: which values share a byte."""
    n, count, _ = blocks.shape
    per_byte = 8 // bits
    if bits == 1:  # neighbours share a byte, so that the four bytes are one uint32 indexed by input
        return blocks.reshape(n, count, BLOCK // per_byte, per_byte).transpose(2, 3)
    return blocks.reshape(n, count, per_byte, BLOCK // per_byte)


def build(
    *,
    kind: Kind,
    bits: int,
    n: int,
    k: int,
    codes: Tensor,
    scale: Tensor | None = None,
    minimum: Tensor | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    group_size: int = 0,
    activation_bits: int = 0,
    m_switch: int = 0,
) -> Tensor:
    """Lay a quantized weight out as one buffer.

    Args:
        kind: what the codes mean.
        bits: of a code; of a dense weight see `DENSE_BITS`.
        n: output features.
        k: input features.
        codes: the weight [N, K] (dense), int8 [N, K] (int8), or uint8 [N, K_pad] with one code a byte.
        scale: float32 [N] (int8, fp6) or float16 [N, G] (affine).
        minimum: float16 [N, G], affine only.
        row_scale: float32 [N], affine only.
        column_scale: float32 [K], affine only.
        group_size: inputs that share an affine scale, a multiple of 32.
        activation_bits: 0 leaves activations as they are; 8 rounds them to int8 per row, int8 and affine only.
        m_switch: rows of the activation from which on they are rounded; 0: always.

    Returns:
        uint8 [total bytes] on the device of `codes`.

    Raises:
        LayoutError: shapes, dtypes or fields that do not fit together.
    """
    form = _form(
        kind=kind, bits=bits, n=n, k=k, group_size=group_size, activation_bits=activation_bits, m_switch=m_switch
    )
    parts = {
        "codes": codes,
        "scale": scale,
        "minimum": minimum,
        "row_scale": row_scale,
        "column_scale": column_scale,
    }
    for name, tensor in parts.items():
        _check_part(form, name, tensor)
    return _assembled(
        form, [None if tensor is None else _bytes_of(form, name, tensor.detach()) for name, tensor in parts.items()]
    )


def allocate(
    *,
    kind: Kind,
    bits: int,
    n: int,
    k: int,
    group_size: int = 0,
    activation_bits: int = 0,
    m_switch: int = 0,
    has_column_scale: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The buffer of a quantized weight whose sections are still zero, to be filled in place.

    Args:
        kind: what the codes mean; AFFINE gets a minimum and a row scale.
        bits: of a code; of a dense weight see `DENSE_BITS`.
        n: output features.
        k: input features.
        group_size: as in `build`.
        activation_bits: as in `build`.
        m_switch: as in `build`.
        has_column_scale: whether there is one; affine only.
        device: of the buffer.

    Returns:
        uint8 [total bytes], the header complete.

    Raises:
        LayoutError: fields that do not fit together.
    """
    form = _form(
        kind=kind, bits=bits, n=n, k=k, group_size=group_size, activation_bits=activation_bits, m_switch=m_switch
    )
    affine = form.kind is Kind.AFFINE
    if has_column_scale and not affine:
        raise LayoutError(f"{form.kind.name} has no column_scale")
    present = {
        "codes": True,
        "scale": form.kind is not Kind.DENSE,
        "minimum": affine,
        "row_scale": affine,
        "column_scale": has_column_scale,
    }
    return _framed(form, [_section_bytes(form, name) if there else None for name, there in present.items()], device)


def _form(*, kind: Kind, bits: int, n: int, k: int, group_size: int, activation_bits: int, m_switch: int) -> Header:
    """The checked header of a weight, without offsets."""
    groups = -(-k // group_size) if group_size > 0 else 0
    form = Header(Kind(kind), bits, n, k, group_size, groups, 0, 0, 0, 0, 0, activation_bits, m_switch, 0)
    _check_form(form)
    return form


def _section_bytes(form: Header, name: str) -> int:
    """Bytes of a section in the buffer."""
    shape, dtype = _part_form(form, name)
    count = math.prod(shape)
    planes = name == "codes" and form.kind not in (Kind.DENSE, Kind.INT8)
    return count * form.bits // 8 if planes else count * dtype.itemsize


def _framed(form: Header, sizes: Sequence[int | None], device: torch.device | str) -> Tensor:
    """The buffer of a form without offsets and of the bytes of its five sections, None where absent; all zero."""
    offsets, end = [], HEADER_BYTES
    for size in sizes:
        offsets.append(0 if size is None else end)
        end = _round_up(end + (size or 0), ALIGNMENT)
    total = end + TRAILING_BYTES
    data = torch.empty(total, dtype=torch.uint8, device=device)
    use_large_pages(data)
    data.zero_()
    numbers = (MAGIC, VERSION, int(form.kind), form.bits, form.n, form.k, form.group_size, form.groups, *offsets)
    packed = struct.pack("<16q", *numbers, form.activation_bits, form.m_switch, total)
    data[:HEADER_BYTES] = torch.tensor(list(packed), dtype=torch.uint8, device=device)
    return data


def _assembled(form: Header, blobs: Sequence[Tensor | None]) -> Tensor:
    """The buffer of a form whose offsets are not known yet and of its five sections' bytes, None where absent."""
    device = next(blob.device for blob in blobs if blob is not None)
    data = _framed(form, [None if blob is None else len(blob) for blob in blobs], device)
    framed = header(data)
    offsets = (
        framed.codes_offset,
        framed.scale_offset,
        framed.minimum_offset,
        framed.row_scale_offset,
        framed.column_scale_offset,
    )
    for offset, blob in zip(offsets, blobs, strict=True):
        if blob is not None:
            data[offset : offset + len(blob)] = blob
    return data


def repeat_rows(data: Tensor, times: int) -> Tensor:
    """A buffer whose weight is that of `data` several times over, one under the other.

    Args:
        data: the whole buffer of a weight [N, K].
        times: at least 1.

    Returns:
        uint8, the buffer of a weight [times·N, K]: as large and as fast as any, without the work of packing one.
    """
    form = header(data)
    parts = {
        name: part if name == "column_scale" else part.repeat(times, *[1] * (part.dim() - 1))
        for name, part in sections(data).items()
    }
    planes = [part.view(torch.uint8).flatten() for name, part in parts.items() if name.startswith("codes")]
    blobs: list[Tensor | None] = [torch.cat(planes)]
    for name in ("scale", "minimum", "row_scale", "column_scale"):
        blobs.append(parts[name].contiguous().view(torch.uint8).flatten() if name in parts else None)
    return _assembled(form._replace(n=times * form.n), blobs)


def header(data_or_head: Tensor) -> Header:
    """Read the header.

    Args:
        data_or_head: uint8, at least 128 bytes; the buffer or its head.

    Raises:
        LayoutError: the bytes are not a packed weight of this version.
    """
    if data_or_head.dtype != torch.uint8 or data_or_head.dim() != 1 or len(data_or_head) < HEADER_BYTES:
        got = f"{data_or_head.dtype} {list(data_or_head.shape)}"
        raise LayoutError(f"a packed weight is a 1-D uint8 tensor of at least {HEADER_BYTES} bytes; got {got}")
    numbers = struct.unpack("<16q", bytes(data_or_head[:HEADER_BYTES].tolist()))
    magic, version, kind, *rest = numbers
    if magic != MAGIC:
        raise LayoutError(f"a packed weight starts with {MAGIC:#x}; got {magic:#x}")
    if version != VERSION:
        raise LayoutError(f"this build reads packed weights of version {VERSION}; got {version}")
    if kind not in list(Kind):
        raise LayoutError(f"kind must be one of {[int(known) for known in Kind]}; got {kind}")
    return Header(Kind(kind), *rest)


def buffer(head: Tensor) -> Tensor:
    """The whole buffer behind a head.

    Args:
        head: the view ``data[:128]``.

    Returns:
        uint8 [total bytes], sharing memory with `head`.

    Raises:
        LayoutError: the memory behind the head is shorter than its header says, as when the head was copied.
    """
    total = header(head).total_bytes
    available = head.untyped_storage().nbytes() - head.storage_offset()
    if available < total:
        raise LayoutError(
            f"head must be a view of the packed weight's first bytes, with {total} bytes behind it; "
            f"got {available}: it was copied without its weight"
        )
    return head.as_strided((total,), (1,), head.storage_offset())


def sections(data: Tensor) -> dict[str, Tensor]:
    """Typed views of the sections of a buffer.

    Args:
        data: the whole buffer, uint8 [total bytes].

    Returns:
        ``codes`` ([N, K], dense and int8) or the planes ``codes_8``, ``codes_4``, ``codes_2``, ``codes_1``
        ([N, K_pad·b/8]), then ``scale``, ``minimum``, ``row_scale``, ``column_scale`` where present.
    """
    form = header(data)
    views: dict[str, Tensor] = {}
    if form.kind in (Kind.DENSE, Kind.INT8):
        dtype = _DENSE_DTYPES[form.bits] if form.kind is Kind.DENSE else torch.int8
        views["codes"] = _view(data, form.codes_offset, (form.n, form.k), dtype)
    else:
        start = form.codes_offset
        for bits in PLANES[form.bits]:
            shape = (form.n, form.k_padded * bits // 8)
            views[f"codes_{bits}"] = _view(data, start, shape, torch.uint8)
            start += shape[0] * shape[1]
    for name, offset in (
        ("scale", form.scale_offset),
        ("minimum", form.minimum_offset),
        ("row_scale", form.row_scale_offset),
        ("column_scale", form.column_scale_offset),
    ):
        if offset:
            part_shape, dtype = _part_form(form, name)
            views[name] = _view(data, offset, part_shape, dtype)
    return views


def codes(data: Tensor) -> Tensor:
    """The codes of a buffer, one per element, without pads.

    Args:
        data: the whole buffer, uint8 [total bytes].

    Returns:
        [N, K]: the weight itself (dense), int8 (int8) or uint8.
    """
    form, views = header(data), sections(data)
    if "codes" in views:
        return views["codes"]
    shift, total = 0, torch.zeros((), dtype=torch.uint8, device=data.device)
    for bits in PLANES[form.bits]:
        total = total | (unpack_plane(views[f"codes_{bits}"], bits) << shift)
        shift += bits
    return total[:, : form.k]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _view(data: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return data[offset : offset + count * dtype.itemsize].view(dtype).reshape(shape)


def _check_form(form: Header) -> None:
    """Refuse fields that contradict each other."""
    kind, bits = form.kind, form.bits
    allowed = {
        Kind.DENSE: tuple(DENSE_BITS.values()),
        Kind.INT8: (8,),
        Kind.AFFINE: tuple(PLANES),
        Kind.FP6_E3M2: (6,),
        Kind.FP6_E2M3: (6,),
    }[kind]
    if bits not in allowed:
        raise LayoutError(f"bits of {kind.name} must be one of {allowed}; got {bits}")
    if form.n < 1 or form.k < 1:
        raise LayoutError(f"a weight has at least one row and one column; got [{form.n}, {form.k}]")
    grouped = kind is Kind.AFFINE
    if grouped != (form.group_size > 0) or form.group_size % BLOCK:
        raise LayoutError(
            f"group_size must be a positive multiple of {BLOCK} for AFFINE and 0 for the other kinds; "
            f"got {form.group_size} for {kind.name}"
        )
    if form.activation_bits not in (0, 8) or (form.activation_bits and kind not in (Kind.INT8, Kind.AFFINE)):
        got = f"{form.activation_bits} for {kind.name}"
        raise LayoutError(f"activation_bits must be 0, or 8 for INT8 and AFFINE; got {got}")
    if form.m_switch < 0 or (form.m_switch and not form.activation_bits):
        got = f"{form.m_switch} with {form.activation_bits} activation bits"
        raise LayoutError(f"m_switch must be 0, or positive with 8 activation bits; got {got}")
    if form.activation_bits and kind is Kind.INT8 and form.k > MAX_INT8_K:
        raise LayoutError(f"int8 activations need K <= {MAX_INT8_K} for exact int32 sums; got {form.k}")


def _part_form(form: Header, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype a section has in the buffer (codes: as given to `build`)."""
    if name == "codes":
        dtype = {Kind.DENSE: _DENSE_DTYPES.get(form.bits, torch.uint8), Kind.INT8: torch.int8}
        return (form.n, form.k_padded), dtype.get(form.kind, torch.uint8)
    if form.kind is Kind.AFFINE and name in ("scale", "minimum"):
        return (form.n, form.groups), torch.float16
    return ((form.k if name == "column_scale" else form.n),), torch.float32


def _check_part(form: Header, name: str, tensor: Tensor | None) -> None:
    """Refuse a section that is missing, unexpected, or of another shape or dtype."""
    needed, optional = ["codes"], []
    if form.kind is not Kind.DENSE:
        needed.append("scale")
    if form.kind is Kind.AFFINE:
        optional = ["minimum", "row_scale", "column_scale"]
    if tensor is None:
        if name in needed:
            raise LayoutError(f"{form.kind.name} needs {name}")
        return
    if name not in needed + optional:
        raise LayoutError(f"{form.kind.name} has no {name}")
    shape, dtype = _part_form(form, name)
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        got = f"{tensor.dtype} {list(tensor.shape)}"
        raise LayoutError(f"{name} of {form.kind.name} must be {dtype} {list(shape)}; got {got}")


def _bytes_of(form: Header, name: str, tensor: Tensor) -> Tensor:
    """The bytes of a section, 1-D."""
    if name == "codes" and form.kind not in (Kind.DENSE, Kind.INT8):
        shift, planes = 0, []
        for bits in PLANES[form.bits]:
            planes.append(pack_plane((tensor >> shift) & ((1 << bits) - 1), bits).flatten())
            shift += bits
        return torch.cat(planes)
    whole = tensor.contiguous()
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)  # one element may have any stride
