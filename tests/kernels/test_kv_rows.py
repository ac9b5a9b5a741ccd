"""Rows of a quantized KV cache: what rounding costs, the same bytes from every build, and attention over them."""

import math

import pytest
import torch

from autoq_kernels import kv_rows, ops
from autoq_kernels.cpu import probe

# Relative RMS of Gaussian rows of 64: uniform steps of 2 max / 254 with E max ≈ 2.4 σ; of the range over 15, ≈ 4.7 σ.
GAUSSIAN_ERROR = {"int8": (0.0050, 0.0062), "int4": (0.088, 0.098)}
PRECISIONS = ["int8", "int4"]


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def empty_cache(x, precision, length):
    return torch.zeros(*x.shape[:2], length, kv_rows.row_bytes(precision, x.shape[3]), dtype=torch.uint8)


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_costs_what_its_steps_say(precision, keys):
    x = rows(4096, 64)
    packed = kv_rows.pack(x, precision, keys=keys)
    low, high = GAUSSIAN_ERROR[precision]
    assert low <= probe.relative_rms(kv_rows.unpack(packed, precision, keys=keys), x) <= high
    assert packed.shape[1] == {"int8": 68, "int4": 36}[precision]


def test_no_number_is_off_by_more_than_half_a_step():
    x = rows(512, 96) * torch.logspace(-6, 3, 512)[:, None]
    read = kv_rows.unpack(kv_rows.pack(x, "int8", keys=True), "int8", keys=True)
    assert ((read - x).abs() <= x.abs().amax(1, keepdim=True) / 254 * 1.0001).all()
    x = rows(512, 96) * torch.logspace(-2, 2, 512)[:, None]
    read = kv_rows.unpack(kv_rows.pack(x, "int4", keys=False), "int4", keys=False)
    step = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 15
    assert ((read - x).abs() <= 0.5 * step + 2e-3 * x.abs().amax(1, keepdim=True)).all()  # the minimum is a half


@pytest.mark.parametrize("d", [32, 64, 80, 96, 128])
def test_rotation_keeps_products_and_is_its_own_inverse(d):
    x, y = rows(7, d).double().float(), rows(7, d, seed=1)
    torch.testing.assert_close(kv_rows.rotated(kv_rows.rotated(x)), x)
    torch.testing.assert_close((kv_rows.rotated(x) * kv_rows.rotated(y)).sum(1), (x * y).sum(1))


def test_a_large_channel_costs_int4_keys_little():
    x = rows(2048, 64)
    x[:, 5] *= 30
    read = kv_rows.unpack(kv_rows.pack(x, "int4", keys=True), "int4", keys=True)
    plain = kv_rows.unpack(kv_rows.pack(x, "int4", keys=False), "int4", keys=False)
    others = [i for i in range(64) if i != 5]
    assert probe.relative_rms(read[:, others], x[:, others]) <= 0.6 * probe.relative_rms(plain[:, others], x[:, others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_build_writes_the_same_bytes(operators, precision, dtype):
    k, v = rows(2, 3, 9, 96).to(dtype), rows(2, 3, 9, 64, seed=1).to(dtype)
    k[0, 0, 0], v[1, 1, 1], k[0, 1, 2], v[0, 2, 3] = 0.0, 3.0, math.inf, math.nan
    keys, values = empty_cache(k, precision, 20), empty_cache(v, precision, 20)
    expected = keys.clone(), values.clone()
    operators.store_kv(keys, values, k, v, torch.tensor(7))
    ops.store_kv(*expected, k, v, torch.tensor([7]))
    known = torch.ones(2, 3, 20, dtype=torch.bool)
    known[0, 1, 9] = known[0, 2, 10] = False  # not finite: any bytes that read as NaN
    assert torch.equal(keys[known], expected[0][known])
    assert torch.equal(values[known], expected[1][known])
    assert kv_rows.unpack(keys, precision, keys=True)[0, 1, 9].isnan().all()
    assert kv_rows.unpack(values, precision, keys=False)[0, 2, 10].isnan().all()
    assert keys[:, :, :7].eq(0).all()
    assert keys[:, :, 16:].eq(0).all()


def test_numbers_are_stored_as_they_are(operators):
    k, v = rows(1, 2, 3, 20).bfloat16(), rows(1, 2, 3, 17, seed=1).bfloat16()
    keys, values = torch.zeros(1, 2, 8, 20).bfloat16(), torch.zeros(1, 2, 8, 17).bfloat16()
    operators.store_kv(keys, values, k.transpose(1, 2).contiguous().transpose(1, 2), v, torch.tensor(4))
    assert torch.equal(keys[:, :, 4:7], k)
    assert torch.equal(values[:, :, 4:7], v)
    assert keys.count_nonzero() == k.count_nonzero()


@pytest.mark.parametrize("queries", [1, 2, 40])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_attention_reads_the_rows(operators, precision, queries):
    q, k, v = rows(2, 6, queries, 64), rows(2, 2, 150, 64, seed=1), rows(2, 2, 150, 96, seed=2)
    keys, values = kv_rows.pack(k, precision, keys=True), kv_rows.pack(v, precision, keys=False)
    mask = torch.arange(150) < 150 - queries + 1 + torch.arange(queries)[:, None]
    y = operators.attention(q, keys, values, mask[None, None], 0.125, False)
    read = kv_rows.unpack(keys, precision, keys=True), kv_rows.unpack(values, precision, keys=False)
    assert y.shape == (2, queries, 6, 96)
    assert probe.relative_rms(y, ops.attention(q, *read, mask[None, None], 0.125, False)) <= 2e-6
    assert probe.relative_rms(ops.attention(q, keys, values, None, 0.125, True), operators.attention(
        q, keys, values, None, 0.125, True)) <= 2e-6  # fmt: skip
    error = probe.relative_rms(y, ops.attention(q, k, v, mask[None, None], 0.125, False))
    assert error <= {"int8": 0.012, "int4": 0.16}[precision]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys, values, k, v: (keys[..., :40], values, k, v, torch.tensor(0)), "bytes with int8"),
        (lambda keys, values, k, v: (keys, values, k, v, torch.tensor(18)), "holds 20 tokens; got 3 more behind 18"),
        (lambda keys, values, k, v: (keys, values, k, v, torch.tensor(-1)), "holds 20 tokens"),
        (lambda keys, values, k, v: (keys, values, k, v[:, :, :2], torch.tensor(0)), "as many rows"),
        (lambda keys, values, k, v: (keys.bfloat16(), values, k, v, torch.tensor(0)), "of the same type"),
        (lambda keys, values, k, v: (keys, values, k, v, torch.tensor(0.0)), "one int64"),
        (lambda keys, values, k, v: (keys, values, k[:1], v, torch.tensor(0)), r"\[B, G, L, R\]"),
    ],
)
def test_what_does_not_fit_is_refused(operators, change, message):
    k, v = rows(2, 3, 3, 64), rows(2, 3, 3, 64)
    given = change(empty_cache(k, "int8", 20), empty_cache(v, "int8", 20), k, v)
    with pytest.raises(RuntimeError, match=message):
        operators.store_kv(*given)


def test_int4_needs_heads_of_a_multiple_of_32():
    with pytest.raises(ValueError, match="multiple of 32 numbers; got 48"):
        kv_rows.pack(rows(2, 48), "int4", keys=True)
    with pytest.raises(ValueError, match="48 numbers has 52 or 28 bytes; got 28"):
        kv_rows.precision_of(torch.zeros(1, 28, dtype=torch.uint8), 48)
