"""The tuning space: small, within the kernels' rules, and filled to the device. Nothing is compiled."""

import pytest

from autoq_kernels import layout
from autoq_kernels.layout import Kind
from autoq_kernels.triton import configs
from autoq_kernels.triton.configs import Config

FORMS = {
    "int8": {"kind": Kind.INT8, "bits": 8},
    "int8 dynamic": {"kind": Kind.INT8, "bits": 8, "activation_bits": 8},
    "fp6": {"kind": Kind.FP6_E3M2, "bits": 6},
    **{f"{bits} bits, {g}": {"kind": Kind.AFFINE, "bits": bits, "group_size": g} for bits in (3, 8) for g in (32, 128)},
    **{
        f"4 bits dynamic, {g}": {"kind": Kind.AFFINE, "bits": 4, "group_size": g, "activation_bits": 8}
        for g in (32, 64, 128)
    },
}
ROWS = (1, 2, 3, 16, 17, 64, 65, 512, 5000)
every_form = pytest.mark.parametrize("how", FORMS)
every_shape = pytest.mark.parametrize(("n", "k"), [(1024, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (33, 100)])


def form(how, n, k):
    """The header of such a weight, without its bytes."""
    small = layout.header(layout.allocate(n=8, k=k, **FORMS[how]))
    return small._replace(n=n, total_bytes=small.total_bytes * n // 8)


@every_form
@every_shape
@pytest.mark.parametrize("m", ROWS)
def test_configurations_keep_the_kernels_rules(how, n, k, m):
    weight = form(how, n, k)
    found = configs.space(weight, m)
    assert 1 <= len(found) <= 12
    assert len(set(found)) == len(found)
    assert configs.default(weight, m) == found[0]
    for one in found:
        steps = -(-k // one.block_k)
        assert one.split_k == 1 or steps >= 2 * one.split_k
        assert one.split_k == 1 or 8 * one.split_k * configs.m_bucket(m) * n <= weight.total_bytes / 2
        if one.family == "gemv":
            assert m == one.block_m <= configs.GEMV_ROWS
            blocks, rest = divmod(one.block_k, 32 * one.warps * configs.unit(weight))
            assert rest == 0
            assert blocks in (1, 2)
            assert blocks == 1 or weight.group_size >= 2 * configs.unit(weight)
        else:
            assert weight.group_size % one.block_k == 0  # 0 without groups
            whole = weight.kind is Kind.AFFINE and configs.dynamic(weight, m)
            assert not whole or one.block_k == weight.group_size


def test_a_default_fills_an_h100_where_the_weight_is_large_enough():
    for n, k in ((1024, 4096), (4096, 4096), (28672, 4096)):
        for m in (1, 2):
            one = configs.default(form("4 bits dynamic, 64", n, k), m)
            assert -(-n // one.block_n) * one.split_k >= 264
        one = configs.default(form("int8", n, k), 16)
        assert -(-n // one.block_n) * one.split_k >= 128


def test_more_rows_take_wider_tiles():
    weight = form("int8", 4096, 4096)
    widths = [configs.default(weight, m).block_m for m in (3, 16, 17, 64, 129, 4096)]
    assert widths == sorted(widths)
    assert widths[0] == 16
    assert widths[-1] == 128


@pytest.mark.parametrize(("m", "bucket"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (4096, 4096), (10**6, 4096)])
def test_buckets_are_powers_of_two(m, bucket):
    assert configs.m_bucket(m) == bucket
    assert bucket in configs.BUCKETS


@pytest.mark.parametrize("change", [{"family": "other"}, {"warps": 0}, {"stages": 1.5}, {"more": 1}, {"block_m": True}])
def test_impossible_configurations_are_refused(change):
    fields = Config(family="gemm", block_m=16, block_n=64, block_k=64).to_json()
    assert Config.from_json(fields).to_json() == fields
    with pytest.raises(ValueError, match="not a configuration"):
        Config.from_json(fields | change)
