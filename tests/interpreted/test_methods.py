"""What PyTorch's own kernels compute from autoq's packed weights, with Triton's rounding and sums around them."""

import pytest
import torch

from autoq import candidates
from autoq.numerics import relative_rms
from autoq_kernels import layout
from autoq_kernels.tolerance import TOLERANCE
from autoq_kernels.triton import products
from autoq_kernels.triton.products import Choice
from autoq_kernels.triton.weight import Weights

OTHERS = {products.DEQUANTIZE, products.INT4PACK, products.INT_MM, products.LINEAR, products.PLAIN}


def gaussian(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def _tinygemm(monkeypatch):
    """Tinygemm's operators for CUDA by those for CPUs, which take the codes one a number."""

    def convert(pairs, tiles):
        assert tiles in (2, 4, 8)
        assert pairs.dtype == torch.uint8
        codes_NK = torch.stack([pairs >> 4, pairs & 15], dim=2).flatten(1).int()
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK, tiles)

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", convert)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", torch.ops.aten._weight_int4pack_mm_for_cpu)


@pytest.mark.usefixtures("_tinygemm")
@pytest.mark.parametrize("candidate", candidates.ALL, ids=str)
@pytest.mark.parametrize("m", [1, 70])
def test_every_method_that_may_be_chosen(candidate, m):
    p, x, bias = candidate.pack(gaussian(32, 128, seed=0)), gaussian(m, 128), gaussian(32, seed=2)
    weight = Weights().of(p.head)
    found = products.choices(weight.form, m, x.dtype, has_column_scale=p.column_scale is not None)
    assert found[0] == products.default_choice(weight.form, m, x.dtype)
    methods = {one.method for one in found if one.config is None} | {products.PLAIN}
    for method in sorted(methods & OTHERS):
        assert products.why_not(method, weight.form, m, x.dtype) is None
        y = products.multiply(Choice(method=method), x, weight, bias)
        assert y.dtype == x.dtype
        assert relative_rms(y, candidate.reference(x, p, bias)) <= TOLERANCE[x.dtype], method


def test_which_methods_there_are():
    def methods(text, m, n=32, k=128, dtype=torch.bfloat16):
        form = layout.header(candidates.parse(text).pack(torch.randn(n, k).to(dtype)).data)
        return {one.method for one in products.choices(form, m, dtype, has_column_scale=form.column_scale_offset > 0)}

    assert methods("int4wo-hqq(group_size=32)", 1) == {products.GEMV, products.GEMM, products.INT4PACK}
    assert methods("sinq(group_size=128)", 70) == {products.GEMM, products.INT4PACK, products.DEQUANTIZE}
    assert methods("sinq(bits=3)", 1) == {products.GEMV, products.GEMM}
    assert methods("int8dq", 1) == {products.GEMV, products.GEMM}
    assert methods("int8dq", 17) == {products.GEMM, products.INT_MM}
    assert methods("int8dq", 17, n=33) == {products.GEMM}
    assert methods("int8mix(m_switch=32)", 17) == {products.GEMM}
    assert methods("int8mix(m_switch=32)", 32) == {products.GEMM, products.INT_MM}
    assert methods("none", 3) == {products.LINEAR}
    assert methods("int4wo-hqq(group_size=32)", 2, dtype=torch.float16) == {products.GEMV, products.GEMM}
    assert methods("int4wo-hqq(group_size=32)", 8, dtype=torch.float32) == {products.DEQUANTIZE}
