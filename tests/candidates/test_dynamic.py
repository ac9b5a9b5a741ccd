"""int8 activations on 4-bit weights, and the mixes that switch to them at some rows."""

import pytest
import torch

from autoq import candidates, numerics
from autoq.candidates import parse
from autoq_kernels import layout, ops

DYNAMIC = ["int8dq", "int4dq(group_size=32)", "int4dq(group_size=64,method=sinq)"]
# A mix, what it is below its m_switch, and from there on.
MIXES = [
    ("int8mix(m_switch=8)", "int8wo", "int8dq"),
    ("int8mix(m_switch=32)", "int8wo", "int8dq"),
    ("int4mix(group_size=64,m_switch=8)", "int4wo-hqq(group_size=64)", "int4dq(group_size=64)"),
    ("int4mix(group_size=128,m_switch=16)", "int4wo-hqq(group_size=128)", "int4dq(group_size=128)"),
    (
        "int4mix(group_size=32,m_switch=8,method=sinq)",
        "sinq(bits=4,group_size=32)",
        "int4dq(group_size=32,method=sinq)",
    ),
]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("candidate", candidates.ALL, ids=str)
def test_only_a_mix_is_another_scheme_at_other_rows(candidate):
    assert bool(candidate.m_switch) == candidate.key.endswith("mix")
    forms = {candidate.at_rows(m) for m in (0, 1, 7, 8, 31, 32, 512)}
    assert len(forms) == (2 if candidate.m_switch else 1)
    assert all(form.at_rows(m) is form for form in forms for m in (1, 512))
    if not candidate.m_switch:
        assert forms == {candidate}


@pytest.mark.parametrize(("mix", "few", "many"), MIXES)
def test_a_mix_switches_at_its_rows_and_holds_the_codes_of_both(mix, few, many):
    mix, few, many = parse(mix), parse(few), parse(many)
    assert (mix.at_rows(mix.m_switch - 1), mix.at_rows(mix.m_switch)) == (few, many)
    w = gaussian(40, 200)
    packed = mix.pack(w)
    sections = layout.sections(packed.data)
    for form in (few, many):
        other = layout.sections(form.pack(w).data)
        assert other.keys() == sections.keys()
        assert all(torch.equal(other[name], sections[name]) for name in sections)
        assert form.weight_bytes_for(40, 200) == mix.weight_bytes_for(40, 200)
    assert (layout.header(packed.data).activation_bits, layout.header(packed.data).m_switch) == (8, mix.m_switch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mix", "few", "many"), MIXES)
def test_a_mix_is_bit_equal_to_the_scheme_it_is_at_those_rows(mix, few, many, dtype):
    mix, few, many = parse(mix), parse(few), parse(many)
    w, bias = gaussian(40, 200), gaussian(40, seed=2).to(dtype)
    packed = mix.pack(w)
    half = mix.m_switch // 2
    shapes = [(few, (mix.m_switch - 1,)), (many, (mix.m_switch,)), (many, (2, half)), (few, (2, half - 1)), (few, ())]
    for form, shape in shapes:
        x = gaussian(*shape, 200, seed=1).to(dtype)
        same = form.pack(w)
        assert torch.equal(mix.linear(x, packed, bias), form.linear(x, same, bias))
        assert torch.equal(ops.linear(x, packed.head, bias, 40), ops.linear(x, same.head, bias, 40))
        assert torch.equal(mix.reference(x, packed, bias), form.reference(x, same, bias))
        other = few if form is many else many
        assert not torch.equal(mix.reference(x, packed, bias), other.reference(x, other.pack(w), bias))


@pytest.mark.parametrize("method", ["hqq", "sinq"])
def test_int4dq_is_its_formula(method):
    """Term by term, with whole numbers in int64; 150 inputs: the last group of 64 is short."""
    candidate = parse(f"int4dq(group_size=64,method={method})")
    p, x = candidate.pack(gaussian(17, 150)), gaussian(3, 150, seed=1)
    x_columns = x if p.column_scale is None else x * p.column_scale
    s = x_columns.abs().amax(dim=1) / 127
    x_q = torch.round(x_columns / s[:, None]).long()
    assert x_q.abs().max() == 127
    q = p.codes.long()
    expected = torch.zeros(3, 17, dtype=torch.float64)
    for g in range(3):
        part = slice(64 * g, 64 * (g + 1))
        product = (x_q[:, None, part] * q[None, :, part]).sum(dim=2).double()
        expected += p.scale[:, g].double() * product
        expected += p.minimum[:, g].double() * x_q[:, part].sum(dim=1, keepdim=True).double()
    expected *= s[:, None].double() * p.row_scale.double()
    assert numerics.relative_rms(candidate.reference(x, p), expected) < 1e-14
    assert numerics.relative_rms(ops.linear(x, p.head, None, 17), expected) < 1e-6
    assert numerics.relative_rms(candidate.linear(x, p), expected) < 1e-6


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_rounding_gaussian_activations_costs_their_step_over_root_12(scheme):
    """In the output as in the input: the weights stand between both alike. From above and below."""
    candidate = parse(scheme)
    p, x = candidate.pack(gaussian(256, 1024)), gaussian(64, 1024, seed=1)
    scaled = x.double() if p.column_scale is None else x.double() * p.column_scale.double()
    step = scaled.abs().amax(dim=1) / 127
    expected = (step.square().mean() / 12).sqrt() / scaled.square().mean().sqrt()
    exact = x.double() @ candidate.unpack(p).double().T
    found = numerics.relative_rms(candidate.reference(x, p), exact)
    assert found == pytest.approx(float(expected), rel=0.03)
    assert 0.006 < found < 0.009


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_a_zero_row_and_a_tiny_one_give_their_products(scheme):
    candidate = parse(scheme)
    p, x = candidate.pack(gaussian(20, 96)), gaussian(3, 96, seed=1)
    x[1], x[2] = 0.0, x[2] * 1e-30
    y = candidate.linear(x, p)
    assert not y[1].any()
    assert numerics.relative_rms(y[2] * 1e30, candidate.reference(x, p)[2] * 1e30) < 1e-5


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_over_16384_inputs_of_the_largest_size_are_exact(sign):
    """float64 holds the whole result: 16384·127·15 and the minima's sums are whole numbers."""
    n, k, group = 4, 16_384, 128
    data = layout.build(
        kind=layout.Kind.AFFINE,
        bits=4,
        n=n,
        k=k,
        codes=torch.full((n, k), 15, dtype=torch.uint8),
        scale=torch.ones(n, k // group).half(),
        minimum=torch.full((n, k // group), -8.0).half(),
        group_size=group,
        activation_bits=8,
    )
    x = torch.full((2, k), 127.0 * sign)
    wanted = torch.full((2, n), sign * 127.0 * k * 7)
    assert torch.equal(torch.ops.autoq.linear(x, data[: layout.HEADER_BYTES], None, n), wanted)
    assert torch.equal(ops.linear(x, data[: layout.HEADER_BYTES], None, n), wanted)
