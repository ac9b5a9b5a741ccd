"""The float weight itself, in the same buffer as the others, so that one graph serves every plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from autoq.candidates.base import Candidate, LinearOp, Packed, load_cpu_kernels, plus_bias, section
from autoq_kernels import layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Unquantized(Candidate):
    """No quantization: the weight as it is, in autoq's own kernels where these are the faster ones."""

    key: ClassVar[str] = "none"

    def leaves_alone(self, dtype: torch.dtype, device: str) -> bool:
        """False for a bfloat16 or float16 weight on a CPU with compiled kernels: autoq multiplies those faster."""
        of_ours = device.partition(":")[0] == "cpu" and dtype in (torch.bfloat16, torch.float16)
        return not (of_ours and load_cpu_kernels())

    def _why_not_shape(self, op: LinearOp) -> str | None:
        return None

    @property
    def _header(self) -> dict[str, Any]:
        return {"kind": layout.Kind.DENSE}

    def _pack(self, w_NK: Tensor) -> Tensor:
        n, k = w_NK.shape
        bits = layout.DENSE_BITS[w_NK.dtype]
        data: Tensor = layout.build(kind=layout.Kind.DENSE, bits=bits, n=n, k=k, codes=w_NK.contiguous())
        return data

    def unpack(self, p: Packed) -> Tensor:
        """The weight in float32, exactly."""
        return section(p, "codes").float()

    def reference(self, x: Tensor, p: Packed, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T`` in float64."""
        return plus_bias(x.double() @ section(p, "codes").double().T, bias)

    def weight_bytes_for(self, n: int, k: int, *, itemsize: int = 2) -> int:
        """N·K·itemsize; a bfloat16 or float16 weight unless told."""
        return n * k * itemsize
