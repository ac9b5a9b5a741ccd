"""Rows of x rounded to int8 by the kernel, bit for bit as `ops.quantize_rows` rounds them."""

import pytest
import torch

from autoq import candidates
from autoq_kernels import ops
from autoq_kernels.triton import activation
from autoq_kernels.triton.weight import Weights

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weight_of(text, n, k):
    p = candidates.parse(text).pack(torch.randn(n, k, generator=torch.Generator().manual_seed(k)))
    return p, Weights().of(p.head)


def rounded(x_MK, weight):
    launch, out = activation.launch(x_MK, weight)
    launch.run()
    return out


def group_sums(codes_MK, form):
    size = form.group_size or form.k
    padded = torch.nn.functional.pad(codes_MK.int(), (0, -form.k % size))
    return padded.reshape(len(codes_MK), -1, size).sum(dim=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("text", "n", "k"),
    [
        ("int8dq", 3, 33),
        ("int8mix", 3, 2100),
        ("int4dq(group_size=32)", 4, 100),
        ("int4dq(group_size=64)", 4, 1024),
        ("int4dq(group_size=128)", 1, 1153),
        ("int4dq(group_size=32,method=sinq)", 33, 2048),
        ("int4mix(group_size=64,method=sinq)", 20, 257),
        ("int4dq(group_size=128,method=sinq)", 20, 40),
    ],
)
@pytest.mark.parametrize("m", [1, 5])
def test_codes_scales_and_sums_are_exact(text, n, k, dtype, m):
    p, weight = weight_of(text, n, k)
    x = (torch.randn(m, k, generator=torch.Generator().manual_seed(m)) * 3).to(dtype)
    out = rounded(x, weight)
    columns = 1.0 if p.column_scale is None else p.column_scale
    q, scale = ops.quantize_rows(x.float() * columns)
    assert torch.equal(out.codes.float(), q)
    assert torch.equal(out.scale, scale[:, 0])
    if weight.form.group_size:
        assert torch.equal(out.sums, group_sums(out.codes, weight.form))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_even(dtype):
    halves = torch.arange(-127, 128, 2) / 2  # all exact in bfloat16
    x = torch.cat([torch.tensor([127.0]), halves]).repeat(3, 1) * torch.tensor([[1.0], [2.0**-40], [2.0**5]])
    if dtype == torch.float16:
        x = x[[0, 2]]
    out = rounded(x.to(dtype), weight_of("int8dq", 2, x.shape[1])[1])
    assert torch.equal(out.codes.float()[:, 1:], torch.round(halves).expand(len(x), -1))
    assert torch.equal(out.codes.float(), ops.quantize_rows(x.to(dtype))[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", ["int8dq", "int4dq(group_size=32,method=sinq)"])
def test_a_row_that_is_not_finite_has_no_scale_and_the_others_keep_theirs(text, dtype):
    _, weight = weight_of(text, 20, 1100)
    x = torch.randn(6, 1100, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = rounded(x, weight)
    x[1, 1099], x[2, 0], x[4, 5] = torch.nan, torch.inf, -torch.inf
    x[3] = 0
    out = rounded(x, weight)
    assert out.scale[[1, 2, 4]].isnan().all()
    assert torch.equal(out.scale[[0, 5]], want.scale[[0, 5]])
    assert torch.equal(out.codes[[0, 5]], want.codes[[0, 5]])
    assert not out.codes[3].any()
    assert 0 < out.scale[3] < 2e-38


def test_the_largest_and_the_smallest_rows_keep_their_scale():
    _, weight = weight_of("int8dq", 2, 64)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e38], [1e-37], [1e-40], [1.0]])
    x = x.clamp(-3.3e38, 3.3e38)
    out, (q, scale) = rounded(x, weight), ops.quantize_rows(x)
    assert torch.equal(out.codes.float(), q)
    assert torch.equal(out.scale, scale[:, 0])
