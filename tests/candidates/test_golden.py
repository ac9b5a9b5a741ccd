"""Errors that a right implementation has, from shared/ALGORITHMS.md: pinned from above and below."""

import functools

import pytest
import torch

from autoq import candidates, numerics

# W ~ N(0, 0.02), 1024×1024: relative Frobenius error, within 2 %.
GAUSSIAN_TABLE = {
    "int8wo": 0.0079,
    "int8dq": 0.0079,
    "fp6(format=e3m2)": 0.0526,
    "fp6(format=e2m3)": 0.0280,
    "int4wo-hqq(group_size=64)": 0.0870,
    "sinq(bits=3,group_size=64)": 0.1953,  # on independent weights SINQ is rounding to nearest
    "sinq(bits=4,group_size=64)": 0.0910,
    "sinq(bits=4,group_size=128)": 0.1006,
    "sinq(bits=5,group_size=64)": 0.0441,
    "sinq(bits=6,group_size=64)": 0.0217,
    "int8mix": 0.0079,
    "int4dq(group_size=64)": 0.0870,
    "int4dq(group_size=128,method=sinq)": 0.1006,
    "int4mix(group_size=64,method=sinq)": 0.0910,
}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(text, w):
    candidate = candidates.parse(text)
    return numerics.relative_rms(candidate.unpack(candidate.pack(w)), w)


@functools.cache
def round_to_nearest(bits, group):
    """Min/max rounding of N(0, 1) in float64: the oracle for the sizes the table has not."""
    w = gaussian(256, 1024).double().view(-1, group)
    low = w.amin(1, keepdim=True)
    scale = (w.amax(1, keepdim=True) - low) / (2**bits - 1)
    return numerics.relative_rms(torch.round((w - low) / scale) * scale + low, w)


@pytest.mark.parametrize(("text", "table"), GAUSSIAN_TABLE.items())
def test_gaussian_weights(text, table):
    assert error(text, gaussian(1024, 1024) * 0.02) == pytest.approx(table, rel=0.02)


@pytest.mark.parametrize("candidate", [c for c in candidates.ALL if c.key == "sinq"], ids=str)
def test_sinq_of_independent_weights_is_rounding_to_nearest(candidate):
    oracle = round_to_nearest(candidate.bits, candidate.group_size)
    assert error(str(candidate), gaussian(256, 1024) * 0.02) == pytest.approx(oracle, rel=0.01)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_hqq_is_between_0_90_and_1_00_of_rounding_to_nearest(group):
    ratio = error(f"int4wo-hqq(group_size={group})", gaussian(256, 1024) * 0.02) / round_to_nearest(4, group)
    assert 0.90 <= ratio <= 1.00


@pytest.mark.parametrize(("group", "table"), [(64, 0.0624), (128, 0.0642)])
def test_hqq_zero_point_has_the_right_sign(group, table):
    # torch.nn.Linear's initial weights. With the zero point's sign flipped the error is 2·|minimum|, about
    # 3.9 at any bit width (pytorch/ao#3156).
    w = (torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1) / 512**0.5
    assert 0.97 * table <= error(f"int4wo-hqq(group_size={group})", w) <= 1.02 * table
    p = candidates.parse(f"int4wo-hqq(group_size={group})").pack(w)
    columns = torch.arange(512) // group
    minimum = p.minimum.float()[:, columns]
    flipped = (p.codes * p.scale.float()[:, columns] - minimum) * p.row_scale[:, None]
    assert ((flipped - w).abs().mean() / w.abs().mean()).item() == pytest.approx(3.9, rel=0.03)


@pytest.mark.parametrize(("bits", "table"), [(3, 0.1959), (4, 0.0915)])
def test_sinq_beats_rounding_on_column_structured_weights(bits, table):
    spread = gaussian(1024, seed=7).mul(0.4).exp()
    w, x = gaussian(1024, 1024) * spread, gaussian(256, 1024, seed=8) / spread
    groups = w / numerics.power_of_two_rows(w)[:, None]
    plain = numerics.rtn(groups.view(1024, -1, 64), bits).dequantize().view(1024, 1024)
    truth = x.double() @ w.double().T
    rtn = numerics.relative_rms(x.double() @ (plain * numerics.power_of_two_rows(w)[:, None]).double().T, truth)
    sinq = candidates.parse(f"sinq(bits={bits},group_size=64)")
    got = numerics.relative_rms(sinq.reference(x, sinq.pack(w)), truth)
    assert got <= 0.75 * rtn
    assert got == pytest.approx(table, rel=0.03)


@pytest.mark.parametrize("rows", [1, 2, 8, 15])
def test_sinq_below_16_rows_is_rounding_to_nearest(rows):
    w = gaussian(rows, 256) * gaussian(256, seed=1).mul(0.4).exp()
    p = candidates.parse("sinq").pack(w)
    assert torch.all(p.column_scale == 1)


def test_sinq_normalises_from_16_rows_on():
    w = gaussian(16, 256) * gaussian(256, seed=1).mul(0.4).exp()
    assert candidates.parse("sinq").pack(w).column_scale.std() > 0.1


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e6])
def test_sinq_does_not_depend_on_the_magnitude(factor):
    w = gaussian(128, 256) * gaussian(256, seed=1).mul(0.4).exp() * 0.02
    assert error("sinq", w * factor) == pytest.approx(error("sinq", w), rel=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.05])
def test_one_constant_row_does_not_turn_sinq_off(value):
    w = gaussian(128, 256) * gaussian(256, seed=1).mul(0.4).exp() * 0.02
    before = error("sinq", w)
    w[3] = value
    assert error("sinq", w) <= 1.01 * before


def test_public_matrix_with_outliers():
    # The matrix of SINQ's public test, its first 128 of 4096 rows; benchmarks/golden.py has all of it.
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(128, 11_008, generator=generator) * 0.02
    w = torch.where(torch.rand(128, 11_008, generator=generator) < 0.01, 5 * w, w)
    assert 0.12 < error("sinq(bits=4,group_size=128)", w) <= 0.1394
    assert 0.12 < error("int4wo-hqq(group_size=128)", w) <= 0.1352
