import math

import pytest
import torch

from autoq import numerics
from autoq.numerics import E2M3, E3M2


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestRelativeRms:
    def test_is_the_norm_of_the_error_over_the_norm_of_the_truth(self):
        assert numerics.relative_rms(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0])) == pytest.approx(0.08)

    def test_sees_a_scale_error_that_cosine_similarity_does_not(self):
        w = gaussian(64, 64)
        assert numerics.relative_rms(1.2 * w, w) == pytest.approx(0.2)

    def test_zero_truth(self):
        zero = torch.zeros(3)
        assert numerics.relative_rms(zero, zero) == 0.0
        assert numerics.relative_rms(torch.ones(3), zero) == math.inf

    @pytest.mark.parametrize("truth", [torch.ones(2), torch.zeros(2)])
    def test_nan_is_not_hidden(self, truth):
        assert math.isnan(numerics.relative_rms(torch.tensor([math.nan, 1.0]), truth))


class TestPowerOfTwoRows:
    @pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 0.02, 1.0, 65504.0, 1e30])
    def test_brings_the_largest_weight_between_2_11_and_2_12(self, magnitude):
        w = gaussian(16, 100) * magnitude
        row = numerics.power_of_two_rows(w)
        peak = (w / row[:, None]).abs().amax(dim=1)
        assert torch.all((peak >= 2**11) & (peak < 2**12))
        assert torch.equal(torch.frexp(row).mantissa, torch.full((16,), 0.5))

    def test_division_is_exact(self):
        w = gaussian(4, 64)
        row = numerics.power_of_two_rows(w)
        assert torch.equal(w / row[:, None] * row[:, None], w)

    def test_zero_row_has_one(self):
        assert numerics.power_of_two_rows(torch.zeros(2, 3)).tolist() == [1.0, 1.0]


class TestRtn:
    @pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
    @pytest.mark.parametrize("offset", [0.0, 3.0, -500.0, 2000.0])
    def test_error_is_at_most_half_a_stored_step(self, bits, offset):
        w = gaussian(50, 64) + offset
        grid = numerics.rtn(w, bits)
        error = (grid.dequantize().double() - w.double()).abs()
        assert torch.all(error <= grid.scale[:, None].double() / 2 + 2e-7 * abs(offset))

    @pytest.mark.parametrize("value", [0.1, -0.1, 7.3, -1999.9, 2048.0])
    def test_constant_group_is_kept_to_float16_precision(self, value):
        w = torch.full((1, 64), value)
        assert numerics.relative_rms(numerics.rtn(w, 4).dequantize(), w) <= 2**-11

    def test_zero_group_is_exactly_zero(self):
        grid = numerics.rtn(torch.zeros(2, 32), 4)
        assert not grid.dequantize().any()
        assert not grid.scale.any()

    def test_integer_zero_points_cost_what_the_reference_table_says(self):
        # ALGORITHMS.md's RTN rows round the zero point to a whole number. Ours keeps a float16 minimum,
        # which is 1 to 3 % better; this is why SINQ undercuts its row of the table at group size 32.
        for group, table in ((32, 0.0807), (64, 0.0910), (128, 0.1006)):
            w = gaussian(1024, 1024).view(-1, group)
            low = w.amin(1, keepdim=True)
            scale = (w.amax(1, keepdim=True) - low) / 15
            zero = torch.round(-low / scale)
            rounded = (torch.round(w / scale + zero).clamp(0, 15) - zero) * scale
            assert numerics.relative_rms(rounded, w) == pytest.approx(table, rel=0.02)
            ours = numerics.relative_rms(numerics.rtn(w, 4).dequantize(), w)
            assert 0.96 * table < ours < numerics.relative_rms(rounded, w)


class TestHqq:
    @pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
    @pytest.mark.parametrize("group", [32, 64, 128])
    def test_error_is_a_little_below_rounding_to_nearest(self, bits, group):
        w = gaussian(65_536 // group, group) * 20
        rtn, hqq = numerics.rtn(w, bits), numerics.hqq(w, bits)
        ratio = numerics.relative_rms(hqq.dequantize(), w) / numerics.relative_rms(rtn.dequantize(), w)
        assert 0.90 <= ratio <= 0.99
        assert torch.equal(hqq.scale, rtn.scale)

    def test_no_group_is_worse_than_under_rtn(self):
        w = gaussian(4096, 64)
        mean_error = [(g.dequantize() - w).abs().mean(1) for g in (numerics.hqq(w, 4), numerics.rtn(w, 4))]
        assert torch.all(mean_error[0] <= mean_error[1] * (1 + 1e-6))

    def test_shrinkage_acts(self):
        w = gaussian(256, 64) * 0.02
        inert = numerics.hqq(w, 4, beta=1e-9)  # the threshold is then above every residual
        acting = numerics.hqq(w, 4)
        assert not torch.equal(acting.minimum, inert.minimum)
        assert numerics.relative_rms(acting.dequantize(), w) < numerics.relative_rms(inert.dequantize(), w)

    def test_codes_belong_to_the_minimum_kept_with_them(self):
        w = gaussian(512, 64)
        grid = numerics.hqq(w, 4)
        code = (w - grid.minimum.float()[:, None]) / grid.scale.float()[:, None]
        assert torch.all((code.clamp(0, 15) - grid.codes).abs() <= 0.5 + 1e-4)

    @pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 2000.0])
    def test_constant_group(self, value):
        w = torch.full((3, 64), value)
        assert numerics.relative_rms(numerics.hqq(w, 4).dequantize(), w) <= 2**-11

    def test_group_far_from_zero(self):
        w = 2000 + gaussian(64, 64)
        ratio = numerics.relative_rms(numerics.hqq(w, 4).dequantize(), w) / numerics.relative_rms(
            numerics.rtn(w, 4).dequantize(), w
        )
        assert ratio <= 1.0

    def test_fast_power_is_the_power(self):
        x = torch.linspace(0.12, 1.0, 10_001)
        got = numerics._power(x, 0.1, torch.empty_like(x), torch.empty_like(x))
        assert numerics.relative_rms(got, 0.1 * x.double() ** -0.3) < 5e-5
        small = torch.tensor([0.0, 1e-38, 1e-6, 0.05, 0.1])
        got = numerics._power(small, 0.08, torch.empty_like(small), torch.empty_like(small))
        assert torch.all(got > small)


def imbalance(tile):
    deviations = torch.cat([tile.std(0), tile.std(1)])
    return deviations.max() / deviations.min().clamp_min(1e-12)


def published_sinkhorn(m, order=16):
    """The pseudo-code of ALGORITHMS.md 1.1, on a tile already divided by its standard deviation."""
    m = m / m.std()
    target = min(m.std(0).clamp(1e-3, 1e3).min(), m.std(1).clamp(1e-3, 1e3).min()) + 1e-6
    v, u = torch.zeros(m.shape[1]), torch.zeros(m.shape[0])
    best, t, r, gate = imbalance(m), torch.ones(m.shape[1]), torch.ones(m.shape[0]), 0.0
    for _ in range(order):
        current = m / v.exp() / u.exp()[:, None]
        now = imbalance(current)
        if now <= best:
            best, t, r = now, v.exp(), u.exp()
        if now > best:
            gate = 1.0
        step_v = (current.std(0) / target).clamp(0.7, 2.0).log()
        step_u = (current.std(1) / target).clamp(0.7, 2.0).log()
        v, u = (v + (1 - gate) * step_v).clip(-0.3, 10), (u + (1 - gate) * step_u).clip(-0.3, 10)
    return t, r


class TestSinkhorn:
    @pytest.mark.parametrize("seed", range(4))
    def test_finds_the_published_factors(self, seed):
        w = gaussian(96, 64, seed=seed) * gaussian(64, seed=seed + 9).mul(0.4).exp()
        t, r = numerics.sinkhorn(w)
        published_t, published_r = published_sinkhorn(w)
        torch.testing.assert_close(t, published_t / published_t.mean(), rtol=1e-4, atol=0)
        torch.testing.assert_close(r, published_r * published_t.mean(), rtol=1e-4, atol=0)
        assert t.mean() == pytest.approx(1, rel=1e-6)

    @pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e-3, 1e3, 1e6, 1e30])
    def test_factors_do_not_depend_on_the_magnitude(self, factor):
        w = gaussian(64, 64) * gaussian(64, seed=1).mul(0.4).exp()
        torch.testing.assert_close(numerics.sinkhorn(w * factor)[0], numerics.sinkhorn(w)[0], rtol=1e-4, atol=0)

    def test_evens_out_columns(self):
        spread = gaussian(64, seed=1).mul(0.4).exp()
        t, _ = numerics.sinkhorn(gaussian(1024, 64) * spread)
        ratio = t / spread
        assert (ratio.std() / ratio.mean()).item() < 0.1  # of 0.4

    @pytest.mark.parametrize("value", [0.0, 3.0])
    def test_constant_rows_and_columns_are_left_out(self, value):
        w = gaussian(66, 66) * gaussian(66, seed=1).mul(0.4).exp()
        w[5] = value
        w[:, 7] = value
        t, r = numerics.sinkhorn(w)
        rows, columns = [i for i in range(66) if i != 5], [k for k in range(66) if k != 7]
        inner_t, inner_r = numerics.sinkhorn(w[rows][:, columns])
        assert t[7] == 1
        assert r[5] == 1
        assert torch.equal(t[columns], inner_t)
        assert torch.equal(r[rows], inner_r)
        assert inner_t.std() > 0.1

    def test_rows_that_vary_only_in_constant_columns_are_left_out(self):
        w = gaussian(40, 32)
        w[:, 3] = 7.0
        w[11] = 2.0  # constant but for column 3
        t, r = numerics.sinkhorn(w)
        assert r[11] == 1
        assert t[3] == 1
        assert t.std() > 0

    @pytest.mark.parametrize("shape", [(15, 64), (1, 64), (64, 1)])
    def test_too_few_rows_or_columns_give_ones(self, shape):
        t, r = numerics.sinkhorn(gaussian(*shape))
        assert torch.all(t == 1)
        assert torch.all(r == 1)

    def test_constant_tile_gives_ones(self):
        assert torch.all(numerics.sinkhorn(torch.full((64, 64), 0.3))[0] == 1)


@pytest.mark.parametrize("form", [E3M2, E2M3], ids=["e3m2", "e2m3"])
class TestFp6:
    def test_all_64_codes_round_trip(self, form):
        codes = torch.arange(64, dtype=torch.uint8)
        assert torch.equal(numerics.encode_fp6(numerics.decode_fp6(codes, form), form), codes)

    def test_rounds_to_nearest(self, form):
        x = torch.linspace(-form.max, form.max, 20_011)
        values = numerics.fp6_values(form)
        got = numerics.decode_fp6(numerics.encode_fp6(x, form), form)
        nearest = (x[:, None] - values[None]).abs().amin(dim=1)
        assert torch.equal((got - x).abs(), nearest)

    def test_ties_go_to_the_even_mantissa(self, form):
        values = numerics.fp6_values(form)[:32]
        ties = (values[:-1] + values[1:]) / 2
        codes = numerics.encode_fp6(ties, form).int()
        assert torch.all(codes % 2 == 0)
        assert torch.equal(numerics.encode_fp6(-ties, form).int(), codes + 32)

    def test_saturates(self, form):
        x = torch.tensor([form.max, form.max * 1.01, 1e30, math.inf, -1e30])
        assert numerics.encode_fp6(x, form).tolist() == [31, 31, 31, 31, 63]

    def test_zeros_keep_their_sign(self, form):
        assert numerics.encode_fp6(torch.tensor([0.0, -0.0, 1e-40, -1e-40]), form).tolist() == [0, 32, 0, 32]

    def test_agrees_with_the_table_of_the_kernels(self, form):
        from autoq_kernels.layout import Kind, fp6_values

        kind = Kind.FP6_E3M2 if form is E3M2 else Kind.FP6_E2M3
        assert torch.equal(numerics.fp6_values(form), fp6_values(kind))


def test_fp6_extremes():
    assert numerics.fp6_values(E3M2)[[1, 4, 31]].tolist() == [0.0625, 0.25, 28.0]
    assert numerics.fp6_values(E2M3)[[1, 8, 31]].tolist() == [0.125, 1.0, 7.5]


def test_int8_rows_use_both_ends_and_half_a_step():
    codes, scale = numerics.int8_rows(torch.tensor([[-127.5, 127.5, 63.6, 0.0]]))
    assert codes.tolist() == [[-128, 127, 64, 0]]
    assert scale.tolist() == [1.0]
