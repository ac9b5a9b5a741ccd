"""What a quantization scheme is: how it packs a weight, what that costs, and how it multiplies.

Legend: N output features, K input features, M rows of the activation.
"""

from __future__ import annotations

import functools
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

import autoq_kernels.ops  # noqa: F401 - defines torch.ops.autoq.linear and its plain-PyTorch default
from autoq.errors import CandidateError
from autoq.scheme import Choices, Scheme, Value
from autoq_kernels import layout

_log = logging.getLogger(__name__)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda")
BLOCK = 32  # consecutive codes of a row that the bit planes interleave

# Weights packed at once. On a CPU a chunk stays in the second-level cache through HQQ's twenty iterations, and
# below torch's threshold of 32768 its operations run in the calling thread: chunks, not operations, are spread
# over the cores, so that threads do not meet at a barrier every few microseconds.
_CPU_CHUNK = 24_576
_CUDA_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearOp:
    """One linear product as it runs: ``[m, k] @ [n, k].T``.

    Attributes:
        m: rows of the flattened activation.
        k: input features.
        n: output features.
        dtype: the activation's dtype, for example ``torch.bfloat16``.
        device: ``"cpu"`` or ``"cuda"``, with or without an index.
        bias: whether a bias is added.
    """

    m: int
    k: int
    n: int
    dtype: torch.dtype
    device: str = "cpu"
    bias: bool = False

    def __post_init__(self) -> None:
        if min(self.m, self.k, self.n) < 1:
            raise CandidateError(
                "a linear product has at least one row, input and output",
                got=f"m={self.m}, k={self.k}, n={self.n}",
            )


class Packed(NamedTuple):
    """A quantized weight: one buffer with a header and its sections (see ``autoq_kernels.layout``).

    Attributes:
        data: contiguous uint8 ``[bytes]``; the canonical form, the same on every machine.
    """

    data: Tensor

    @property
    def head(self) -> Tensor:
        """The first 128 bytes, a view: what the kernels are given."""
        return self.data[: layout.HEADER_BYTES]

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)`` of the weight."""
        header = layout.header(self.data)
        return header.n, header.k

    @property
    def codes(self) -> Tensor:
        """The codes, one a byte, ``[N, K]`` without padding; the weight itself for ``none``."""
        codes: Tensor = layout.codes(self.data)
        return codes

    @property
    def scale(self) -> Tensor | None:
        """Scales: float32 ``[N]`` or float16 ``[N, G]``; None where there are none."""
        return _part(self.data, "scale")

    @property
    def minimum(self) -> Tensor | None:
        """Group minima, float16 ``[N, G]``; None where there are none."""
        return _part(self.data, "minimum")

    @property
    def row_scale(self) -> Tensor | None:
        """Row factors, powers of two, float32 ``[N]``; None where there are none."""
        return _part(self.data, "row_scale")

    @property
    def column_scale(self) -> Tensor | None:
        """Column factors, float32 ``[K]``, to be multiplied into the activation; None without."""
        return _part(self.data, "column_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(ABC):
    """A quantization scheme. To add one, implement the abstract methods; see docs/plugins.md.

    Attributes:
        key: its name, lower case with dashes.
        choices: field of the dataclass → the values it may have.
    """

    key: ClassVar[str]
    choices: ClassVar[Choices] = MappingProxyType({})

    def __post_init__(self) -> None:
        for name, allowed in self.choices.items():
            check_field(self, name, allowed)

    @classmethod
    def variants(cls) -> tuple[Self, ...]:
        """The scheme with every combination of its fields' values."""
        made = itertools.product(*cls.choices.values())
        return tuple(cls(**dict(zip(cls.choices, values, strict=True))) for values in made)

    @property
    def scheme(self) -> Scheme:
        """The scheme as data, every field shown."""
        return Scheme(name=self.key, fields=tuple((f.name, getattr(self, f.name)) for f in fields(self)))

    def __str__(self) -> str:
        return str(self.scheme)

    @property
    def activation_bits(self) -> int:
        """8 if the activation is quantized to int8 per row, 0 if it stays as it is."""
        return 0

    @property
    def m_switch(self) -> int:
        """Rows from which on ``activation_bits`` applies; 0 where it always does."""
        return 0

    def at_rows(self, m: int) -> Candidate:
        """The scheme whose numerics this one has for ``m`` rows of the activation: itself, unless it is a mix."""
        return self

    def leaves_alone(self, dtype: torch.dtype, device: str) -> bool:
        """Whether a layer under this scheme stays the ``nn.Linear`` it is; only ``none`` may.

        Args:
            dtype: of the layer's float weight.
            device: of the weight, such as ``"cpu"``, with or without an index.
        """
        return False

    def why_not(self, op: LinearOp) -> str | None:
        """Why this scheme cannot or should not run ``op``: a sentence, or None if it can."""
        device = op.device.partition(":")[0]
        if device not in DEVICES:
            return f"no kernel for device {op.device!r}, only {' and '.join(DEVICES)}"
        if op.dtype not in FLOAT_DTYPES:
            return f"the activation must be float32, bfloat16 or float16, not {_name(op.dtype)}"
        return self._why_not_shape(op)

    def _why_not_shape(self, op: LinearOp) -> str | None:
        if op.k < BLOCK:
            return f"K={op.k} is less than one block of {BLOCK} codes"
        packed, dense = self.weight_bytes_for(op.n, op.k), op.n * op.k * op.dtype.itemsize
        if packed >= dense:
            return f"packed it would have {packed} bytes, not fewer than the {dense} of {_name(op.dtype)}"
        return None

    def pack(self, w_NK: Tensor, *, layer: str = "") -> Packed:
        """Quantize a weight.

        Args:
            w_NK: float32, bfloat16 or float16 ``[N, K]``, finite; any strides.
            layer: the layer's name, for error messages.

        Raises:
            CandidateError: if the weight is not of that kind; the message names the layer.
        """
        with torch.inference_mode(False), torch.no_grad():
            w_NK = w_NK.detach()
            _check_weight(w_NK, layer or "weight")
            return Packed(self._pack(w_NK))

    @abstractmethod
    def _pack(self, w_NK: Tensor) -> Tensor:
        """The buffer of a checked weight."""

    @property
    @abstractmethod
    def _header(self) -> dict[str, Any]:
        """What the header of every packed weight says besides the shape."""

    def fits(self, form: layout.Header) -> bool:
        """Whether a buffer with this header can be a weight of this scheme."""
        return all(getattr(form, name) == value for name, value in self._header.items())

    @abstractmethod
    def unpack(self, p: Packed) -> Tensor:
        """The float32 ``[N, K]`` weight that the kernels multiply with."""

    def linear(self, x: Tensor, p: Packed, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T + bias`` with the best kernel of x's device.

        Args:
            x: ``[..., K]``, float32, bfloat16 or float16.
            p: from :meth:`pack`.
            bias: ``[N]`` or None.

        Returns:
            ``[..., N]`` in x's dtype.
        """
        if not torch.compiler.is_compiling():
            load_kernels(x.device)
        result: Tensor = torch.ops.autoq.linear(x, p.head, bias, _rows(p.data))
        return result

    @abstractmethod
    def reference(self, x: Tensor, p: Packed, bias: Tensor | None = None) -> Tensor:
        """The same product in float64 (exactly where integers are multiplied), from codes and scales alone.

        The oracle of the kernels: slow, plain, and independent of them. Returns float64 ``[..., N]``.
        """

    def weight_bytes(self, p: Packed) -> int:
        """Bytes of the codes, scales and factors, padding of the codes included, header not."""
        return sum(part.numel() * part.element_size() for part in layout.sections(p.data).values())

    @abstractmethod
    def weight_bytes_for(self, n: int, k: int) -> int:
        """What :meth:`weight_bytes` of an ``[n, k]`` weight will be, without packing it."""


def load_kernels(device: torch.device) -> bool:
    """Register the kernels of a device over the operators' default, if there are any that work; True if so."""
    if device.type == "cpu":
        return load_cpu_kernels()
    return device.type == "cuda" and load_cuda_kernels()


def settle(head: Tensor) -> None:
    """Let the GPU's kernels make what they need for a weight that a layer was given; nothing on other devices."""
    if head.device.type == "cuda" and load_cuda_kernels():
        from autoq_kernels.triton import register

        register.settle(head)


@functools.cache
def load_cuda_kernels() -> bool:
    """Register the Triton kernels; compiled when they first run.

    Returns:
        Whether there are any: False where Triton is not installed, which is logged.
    """
    try:
        from autoq_kernels.triton import register
    except ImportError as problem:
        _log.warning("no Triton kernels, quantized layers run on PyTorch's own operators on GPUs: %s", problem)
        return False
    registered: bool = register.load().registered
    return registered


@functools.cache
def load_cpu_kernels() -> bool:
    """Compile the CPU's kernels (the first time on this machine) and register them over the default, if that works.

    Returns:
        Whether there are any.
    """
    from autoq_kernels.cpu import build

    return build.load().isa is not None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # torch leaves it unannotated
def _rows(data: Tensor) -> int:
    """N from the header: a constant of the weight, where tracing the bytes would break a graph."""
    return int(layout.header(data).n)


def _part(data: Tensor, name: str) -> Tensor | None:
    parts: dict[str, Tensor] = layout.sections(data)
    return parts.get(name)


def compiled(w_NK: Tensor, form: Mapping[str, Any], **how: Any) -> Tensor | None:
    """The buffer of a quantized weight, filled by the compiled kernels; None on other devices and without a build.

    Args:
        w_NK: the weight.
        form: what ``layout.allocate`` is given besides the shape.
        how: what ``build.quantize`` is given besides weight and buffer.
    """
    from autoq_kernels.cpu import build

    if w_NK.device.type != "cpu" or not load_cpu_kernels():
        return None
    n, k = w_NK.shape
    data: Tensor = layout.allocate(n=n, k=k, **form)
    return data if build.quantize(w_NK, data, **how) else None


def for_row_chunks(w_NK: Tensor, work: Callable[[slice, Tensor], None]) -> None:
    """Call ``work(rows, values)`` for slices of rows, with their float32 values, contiguous.

    On a CPU the slices are small and handled by as many threads as torch uses, in any order; ``work`` may
    write only to its own rows.
    """
    n, k = w_NK.shape
    on_cpu = w_NK.device.type == "cpu"
    height = max(1, (_CPU_CHUNK if on_cpu else _CUDA_CHUNK) // k)
    slices = [slice(start, min(start + height, n)) for start in range(0, n, height)]

    def handle(rows: slice) -> None:
        with torch.inference_mode(False), torch.no_grad():  # modes belong to a thread
            work(rows, w_NK[rows].float().contiguous())

    workers = min(torch.get_num_threads(), len(slices)) if on_cpu else 1
    if workers == 1:
        for rows in slices:
            handle(rows)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="autoq-pack") as pool:
        for done in [pool.submit(handle, rows) for rows in slices]:
            done.result()


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """An activation ``[..., K]`` rounded to int8 per row, for the references.

    Returns:
        Whole numbers in [−127, 127], and the scales max|row|/127 (never 0) ``[..., 1]``, both float64.
    """
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale).round().clamp(-127, 127).double(), scale.double()


def plus_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """``y + bias`` in y's float64, for the references."""
    return y if bias is None else y + bias.double()


def section(p: Packed, name: str) -> Tensor:
    """A section that the scheme always has.

    Raises:
        CandidateError: if the buffer has no such section: it was packed by another scheme.
    """
    part = _part(p.data, name)
    if part is None:
        raise CandidateError(
            f"the packed weight has a section {name!r}",
            got=f"a buffer of kind {layout.header(p.data).kind}",
            fix="Use the candidate that packed it.",
        )
    return part


def check_field(candidate: Candidate, name: str, allowed: tuple[Value, ...]) -> None:
    """Refuse a field whose value is not one of ``allowed``, by type too: 64.0 would print differently.

    Raises:
        CandidateError: with the allowed values.
    """
    value = getattr(candidate, name)
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise CandidateError(f"{name} is one of {', '.join(map(str, allowed))}", where=candidate.key, got=repr(value))


def padded(k: int, multiple: int) -> int:
    """``k`` rounded up to a multiple."""
    return -(-k // multiple) * multiple


def _check_weight(w_NK: Tensor, where: str) -> None:
    if w_NK.layout is not torch.strided or w_NK.is_meta:
        raise CandidateError(
            "the weight is a dense tensor with values",
            where=where,
            got="a meta tensor" if w_NK.is_meta else str(w_NK.layout),
            fix="Load the model's weights before quantizing it.",
        )
    if w_NK.ndim != 2 or w_NK.numel() == 0:
        raise CandidateError(
            "the weight is a matrix [out_features, in_features]", where=where, got=f"shape {tuple(w_NK.shape)}"
        )
    if w_NK.dtype not in FLOAT_DTYPES:
        raise CandidateError(
            "the weight is float32, bfloat16 or float16",
            where=where,
            got=_name(w_NK.dtype),
            fix="Convert it first, for example with model.float().",
        )
    low, high = torch.aminmax(w_NK)  # NaN spreads into both
    if not (bool(low.isfinite()) and bool(high.isfinite())):
        raise CandidateError(
            "every weight is finite",
            where=where,
            got="NaN" if bool(w_NK.isnan().any()) else "an infinity",
            fix="Repair the checkpoint, or leave the layer out with filter_fn.",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
