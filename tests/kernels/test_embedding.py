"""Rows of a packed weight by index: those of the dequantized weight, in every build and dtype."""

import pytest
import torch

from autoq_kernels import layout, ops
from autoq_kernels.cpu import build, probe
from autoq_kernels.layout import Kind

N, K = 37, 75
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights():
    dense = {
        f"dense{bits}": layout.build(kind=Kind.DENSE, bits=bits, n=N, k=K, codes=torch.randn(N, K).to(dtype))
        for dtype, bits in layout.DENSE_BITS.items()
    }
    return probe.sample_weights(N, K) | dense


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_those_of_the_dequantized_weight(operators, dtype):
    indices = torch.tensor([[0, N - 1, 5], [5, 17, 0]])
    for name, data in weights().items():
        head = data[: layout.HEADER_BYTES]
        rows = operators.embedding(indices, head, N, K, dtype)
        assert rows.shape == (2, 3, K)
        assert rows.dtype == dtype
        whole = operators.dequantize(head, N, K)
        assert torch.equal(rows, whole[indices].to(dtype)), name
        assert torch.equal(operators.embedding(indices.int(), head, N, K, dtype), rows), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_default_reads_the_same_rows(dtype):
    indices = torch.tensor([[0, N - 1, 5], [5, 17, 0]])
    for name, data in weights().items():
        head = data[: layout.HEADER_BYTES]
        rows = ops.embedding(indices, head, N, K, dtype)
        assert torch.equal(rows, ops.dequantize(head, N, K)[indices].to(dtype)), name


def test_indices_of_every_shape(operators):
    head = weights()["int4"][: layout.HEADER_BYTES]
    whole = operators.dequantize(head, N, K)
    for indices in (torch.tensor(3), torch.arange(0), torch.arange(N)[::3], torch.randint(N, (500, 4)).T):
        for run in (operators.embedding, ops.embedding):
            rows = run(indices, head, N, K, torch.float32)
            assert rows.shape == (*indices.shape, K)
            assert probe.relative_rms(rows, whole[indices]) <= 1e-6


@pytest.mark.parametrize("wrong", [[N], [-1], [0, 1 << 40]])
def test_indices_outside_the_weight_are_refused(operators, wrong):
    head = weights()["int8wo"][: layout.HEADER_BYTES]
    for run in (operators.embedding, ops.embedding):
        with pytest.raises(IndexError, match=rf"\[0, {N}\)"):
            run(torch.tensor(wrong), head, N, K, torch.float32)


def test_other_arguments_are_refused(operators):
    head = weights()["int8wo"][: layout.HEADER_BYTES]
    with pytest.raises(RuntimeError, match="int64 or int32"):
        operators.embedding(torch.tensor([1.0]), head, N, K, torch.float32)
    with pytest.raises(TypeError, match="int64 or int32"):
        ops.embedding(torch.tensor([1.0]), head, N, K, torch.float32)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        operators.embedding(torch.tensor([1]), head, N, K, torch.float64)
    for run in (operators.embedding, ops.embedding):
        with pytest.raises((RuntimeError, layout.LayoutError), match="the call says"):
            run(torch.tensor([1]), head, N + 1, K, torch.float32)


@pytest.mark.parametrize("name", ["int4", "int8wo", "fp6_e3m2"])
def test_opcheck(name):
    build.load()
    arguments = (torch.tensor([[1, 2]]), weights()[name], N, K, torch.bfloat16)
    torch.library.opcheck(torch.ops.autoq.embedding.default, arguments)
