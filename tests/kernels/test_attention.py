"""The compiled attention against float64: every mask, sharing of heads and length, and what it must not read."""

import ctypes
import math
import mmap

import pytest
import torch

from autoq_kernels import ops
from autoq_kernels.cpu import probe

TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}  # relative RMS
NO_ACCESS = 0  # PROT_NONE
# (B, H, G, Q, L, D, E)
SHAPES = [
    (1, 9, 3, 1, 1024, 64, 64),  # one query, many keys: divided among threads
    (2, 4, 4, 5, 77, 32, 48),
    (1, 8, 1, 33, 200, 64, 64),  # all heads share the keys
    (2, 6, 2, 128, 128, 80, 96),
    (1, 2, 2, 3, 3, 16, 16),
    (3, 71, 1, 1, 300, 64, 64),
]


def reference(q, k, v, mask, scale, causal):
    """In float64; rows that may see no key are 0."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for one in (k, v))
    queries, keys = q.shape[2], k.shape[2]
    if causal:
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    scores = q @ k.transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.nan_to_num(scores.softmax(dim=-1), nan=0.0).matmul(v).transpose(1, 2)


def sample(shape, dtype, seed=0):
    b, h, g, queries, keys, d, e = shape
    g_ = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*size, generator=g_).to(dtype) for size in ((b, h, queries, d), (b, g, keys, d), (b, g, keys, e))
    ]


def masks(shape):
    """What users have: all keys, a filled part of a cache, padding on the left, holes, one key, a mask per head."""
    b, h, _, queries, keys, _, _ = shape
    rows, columns = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    filled = (columns < max(1, keys // 2)).expand(queries, keys)
    left = torch.stack([(columns >= one) & (columns <= rows + keys - queries) for one in range(b)])[:, None]
    g = torch.Generator().manual_seed(1)
    return {
        "all": torch.ones(1, 1, queries, keys, dtype=torch.bool),
        "filled": filled[None, None],
        "left": left,
        "holes": torch.rand(b, 1, queries, keys, generator=g) > 0.3,
        "few": torch.rand(1, h, queries, keys, generator=g) > 0.97,
    }


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_meets_the_tolerance(operators, shape, dtype):
    q, k, v = sample(shape, dtype)
    scale = shape[5] ** -0.5
    cases = [(None, False), (None, True), *((mask, False) for mask in masks(shape).values())]
    for mask, causal in cases:
        y = operators.attention(q, k, v, mask, scale, causal)
        expected = reference(q, k, v, mask, scale, causal)
        assert y.dtype == dtype
        assert y.shape == expected.shape
        assert y.is_contiguous()
        assert probe.relative_rms(y, expected) <= TOLERANCE[dtype], (causal, mask is None)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_default_is_the_same_function(dtype):
    shape = (2, 4, 2, 7, 20, 16, 32)
    q, k, v = sample(shape, dtype)
    for mask, causal in [(None, False), (None, True), *((mask, False) for mask in masks(shape).values())]:
        y = ops.attention(q, k, v, mask, 0.25, causal)
        assert probe.relative_rms(y, reference(q, k, v, mask, 0.25, causal)) <= TOLERANCE[dtype]
    assert ops.attention(q, k, v, torch.zeros(1, 1, 7, 20, dtype=torch.bool), 0.25, False).eq(0).all()


def test_any_strides_are_read_in_place(operators):
    q, k, v = sample((2, 4, 2, 6, 40, 32, 32), torch.float32)
    expected = operators.attention(q, k, v, None, 0.2, True)
    apart = [one.transpose(1, 2).contiguous().transpose(1, 2) for one in (q, k, v)]
    assert torch.equal(operators.attention(*apart, None, 0.2, True), expected)
    inside = [torch.cat([one, one + 1], dim=-1)[..., : one.shape[-1]] for one in (q, k, v)]
    assert torch.equal(operators.attention(*inside, None, 0.2, True), expected)
    scattered = [one.transpose(2, 3).contiguous().transpose(2, 3) for one in (q, k, v)]
    assert torch.equal(operators.attention(*scattered, None, 0.2, True), expected)


def test_keys_behind_the_mask_are_never_touched(operators):
    """A cache whose unused part is memory that nobody may read."""
    page, d = mmap.PAGESIZE, 64
    rows = page // (4 * d)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    memory = mmap.mmap(-1, 4 * page)
    cache = torch.frombuffer(memory, dtype=torch.float32).view(1, 1, 4 * rows, d)
    cache.normal_(generator=torch.Generator().manual_seed(0))
    q = torch.randn(1, 3, 1, d, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 1, 4 * rows, dtype=torch.bool)
    mask[..., rows : 3 * rows] = True
    expected = reference(q, cache, cache, mask, 0.1, False)
    start = cache.data_ptr()
    for place in (start, start + 3 * page):
        assert libc.mprotect(place, page, NO_ACCESS) == 0
    try:
        y = operators.attention(q, cache, cache, mask, 0.1, False)
    finally:
        for place in (start, start + 3 * page):
            libc.mprotect(place, page, mmap.PROT_READ | mmap.PROT_WRITE)
    assert probe.relative_rms(y, expected) <= 1e-6


def test_what_is_masked_counts_nothing_whatever_its_score(operators):
    q, k, v = sample((1, 2, 1, 4, 70, 16, 16), torch.float32)
    mask = torch.rand(1, 1, 4, 70, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[..., 7] = mask[..., 66] = False
    expected = operators.attention(q, k, v, mask, 0.25, False)
    k[:, :, 7], k[:, :, 66], v[:, :, 66] = math.inf, math.nan, 1e30
    assert torch.equal(operators.attention(q, k, v, mask, 0.25, False), expected)


def test_scores_of_any_size_stay_finite_and_nan_stays_nan(operators):
    q, k, v = sample((1, 1, 1, 3, 130, 16, 16), torch.float32)
    y = operators.attention(q * 1e4, k * 1e4, v, None, 1.0, False)
    assert torch.equal(y[0, :, 0], v[0, 0, (q.double() @ k.double().transpose(2, 3)).argmax(dim=-1)[0, 0]])
    q[0, 0, 1, 3] = math.nan
    y = operators.attention(q, k, v, None, 0.25, False)
    assert y[0, 1].isnan().all()
    assert not y[0, [0, 2]].isnan().any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_repeat_to_the_bit(operators, threads):
    q, k, v = sample((1, 9, 3, 1, 700, 64, 64), torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = operators.attention(q, k, v, None, 0.125, False)
        assert all(torch.equal(operators.attention(q, k, v, None, 0.125, False), first) for _ in range(5))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[:, :3], k, v, None, False), "do not fit"),
        (lambda q, k, v: (q, k[..., :8], v, None, False), "do not fit"),
        (lambda q, k, v: (q[..., :8], k[..., :8], v, None, False), "multiples of 16"),
        (lambda q, k, v: (q.bfloat16(), k, v, None, False), "one type"),
        (lambda q, k, v: (q.double(), k.double(), v.double(), None, False), "float32, bfloat16 or float16"),
        (lambda q, k, v: (q[0], k, v, None, False), "4 dimensions"),
        (lambda q, k, v: (q, k, v, torch.ones(1, 1, 5, 9), False), "mask is bool"),
        (lambda q, k, v: (q, k, v, torch.ones(1, 1, 5, 9, dtype=torch.bool)[..., :8], False), "mask is bool"),
        (lambda q, k, v: (q, k, v, torch.ones(1, 1, 5, 9, dtype=torch.bool), True), "not both"),
    ],
)
def test_what_does_not_fit_is_refused(operators, change, message):
    q, k, v = sample((1, 4, 2, 5, 9, 16, 16), torch.float32)
    *tensors, mask, causal = change(q, k, v)
    with pytest.raises(RuntimeError, match=message):
        operators.attention(*tensors, mask, 0.25, causal)


def test_no_queries_and_no_keys(operators):
    q, k, v = sample((1, 4, 2, 5, 9, 16, 16), torch.float32)
    assert operators.attention(q[:, :, :0], k, v, None, 0.25, False).shape == (1, 0, 4, 16)
    assert operators.attention(q, k[:, :, :0], v[:, :, :0], None, 0.25, False).eq(0).all()
