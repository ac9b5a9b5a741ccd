"""The float weight, bit for bit as `ops.dequantize` has it."""

import pytest
import torch

from autoq import candidates
from autoq_kernels import layout, ops
from autoq_kernels.layout import Kind
from autoq_kernels.triton import dequantize, launching
from autoq_kernels.triton.weight import Weights

QUANTIZED = [one for one in candidates.ALL if one.key != "none"]


@pytest.mark.parametrize("candidate", QUANTIZED, ids=str)
@pytest.mark.parametrize(
    ("n", "k", "dtype"), [(17, 257, "float32"), (5, 100, "float16"), (1, 33, "bfloat16"), (16, 128, "float32")]
)
def test_weights_are_exact(candidate, n, k, dtype):
    p = candidate.pack(torch.randn(n, k, generator=torch.Generator().manual_seed(n)))
    w_NK = torch.empty(n, k, dtype=getattr(torch, dtype))
    launching.run(dequantize.launches(Weights().of(p.head), w_NK))
    assert torch.equal(w_NK, ops.dequantize(p.head, n, k).to(w_NK.dtype))


@pytest.mark.parametrize("kind", [Kind.FP6_E3M2, Kind.FP6_E2M3])
def test_every_6_bit_float(kind):
    codes = torch.arange(64, dtype=torch.uint8).repeat(2, 1)
    codes[1] = codes[1].flip(0)
    data = layout.build(kind=kind, bits=6, n=2, k=64, codes=codes, scale=torch.ones(2))
    w_NK = torch.empty(2, 64)
    launching.run(dequantize.launches(Weights().of(data[: layout.HEADER_BYTES]), w_NK))
    want = layout.fp6_values(kind)
    assert torch.equal(w_NK, torch.stack([want, want.flip(0)]))
    assert torch.equal(w_NK[0].signbit(), want.signbit())
