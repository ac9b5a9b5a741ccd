"""The compiled quantization of weights against its references in plain PyTorch."""

import pytest
import torch

from autoq import candidates, numerics
from autoq_kernels import layout
from autoq_kernels.cpu import build
from autoq_kernels.layout import Kind

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HQQ = (numerics.HQQ_BETA, numerics.HQQ_KAPPA, numerics.HQQ_ITERATIONS)
FP6 = {Kind.FP6_E3M2: numerics.E3M2, Kind.FP6_E2M3: numerics.E2M3}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(operators, w, kind, bits, *, group_size=0, method="rtn", column_scale=None):
    data = layout.allocate(
        kind=kind,
        bits=bits,
        n=w.shape[0],
        k=w.shape[1],
        group_size=group_size,
        has_column_scale=column_scale is not None,
    )
    operators.quantize(w, data, method, column_scale, *HQQ)
    return data


def weights():
    """Shapes with and without tails, and rows of every odd kind."""
    odd = gaussian(40, 200)
    odd[3], odd[4], odd[5] = 0.0, 0.437, -3.3
    odd[6, :64], odd[7, 64:] = 0.0, -0.0
    odd[8:12] *= torch.tensor([1e-36, 1e-30, 1e30, 1e36])[:, None]
    odd[12] = 1e-42  # below the smallest normal number
    odd[13, 1:] *= 1e-6  # one weight far above the others
    odd[14] += 1000.0
    return {"tails": gaussian(33, 100), "one row": gaussian(1, 33), "one column": gaussian(17, 1), "odd rows": odd}


every_weight = pytest.mark.parametrize("name", weights())


def typed(name, dtype):
    """The weights of a name, within the dtype's range."""
    return weights()[name].clamp(-60_000, 60_000).to(dtype)


@every_weight
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_bit_equal(operators, name, dtype):
    w = typed(name, dtype)
    codes, scale = numerics.int8_rows(w)
    data = quantized(operators, w, Kind.INT8, 8)
    assert torch.equal(layout.codes(data), codes)
    assert torch.equal(layout.sections(data)["scale"], scale)


@every_weight
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FP6)
def test_fp6_is_bit_equal(operators, name, dtype, kind):
    w = typed(name, dtype)
    codes, scale = numerics.fp6_rows(w, FP6[kind])
    data = quantized(operators, w, kind, 6)
    assert torch.equal(layout.codes(data), codes)
    assert torch.equal(layout.sections(data)["scale"], scale)


def affine_reference(w, bits, group_size, method, column_scale):
    """Codes [N, K], scale, minimum [N, G] and row factors [N], by the functions of numerics."""
    w = w.float() if column_scale is None else w.float() / column_scale
    row = numerics.power_of_two_rows(w)
    w = w / row.unsqueeze(1)
    parts = [getattr(numerics, method)(part, bits) for part in w.split(group_size, dim=1)]
    codes = torch.cat([part.codes for part in parts], dim=1)
    return codes, torch.stack([p.scale for p in parts], 1), torch.stack([p.minimum for p in parts], 1), row


@every_weight
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", layout.PLANES)
@pytest.mark.parametrize("columns", [False, True], ids=["plain", "columns"])
def test_rounding_to_nearest_is_bit_equal(operators, name, dtype, bits, columns):
    w = typed(name, dtype)
    column = gaussian(w.shape[1], seed=1).abs() + 0.5 if columns else None
    codes, scale, minimum, row = affine_reference(w, bits, 64, "rtn", column)
    data = quantized(operators, w, Kind.AFFINE, bits, group_size=64, column_scale=column)
    found = layout.sections(data)
    assert torch.equal(layout.codes(data), codes)
    assert torch.equal(found["scale"], scale)
    assert torch.equal(found["minimum"], minimum)
    assert torch.equal(found["row_scale"], row)
    if columns:
        assert torch.equal(found["column_scale"], column)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_hqq_agrees_within_rounding(operators, bits, group_size):
    w = gaussian(200, 300, seed=bits * 1000 + group_size)
    codes, scale, minimum, row = affine_reference(w, bits, group_size, "hqq", None)
    data = quantized(operators, w, Kind.AFFINE, bits, group_size=group_size, method="hqq")
    found = layout.sections(data)
    assert torch.equal(found["scale"], scale)
    assert torch.equal(found["row_scale"], row)
    # Sums in another order may tip a tie between iterates; where they do not, everything is equal.
    assert (found["minimum"] == minimum).float().mean() > 0.97
    assert (layout.codes(data) == codes).float().mean() > 0.999
    group = torch.arange(300) // group_size
    errors = [
        numerics.relative_rms((q * s[:, group] + m.float()[:, group]) * row[:, None], w)
        for q, s, m in ((layout.codes(data), found["scale"], found["minimum"]), (codes, scale, minimum))
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


@every_weight
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hqq_of_odd_rows_is_as_good_as_the_reference(operators, name, dtype):
    w = typed(name, dtype)
    wanted_codes, wanted_scale, wanted_minimum, row = affine_reference(w, 4, 64, "hqq", None)
    data = quantized(operators, w, Kind.AFFINE, 4, group_size=64, method="hqq")
    found, group = layout.sections(data), torch.arange(w.shape[1]) // 64
    assert torch.equal(found["scale"], wanted_scale)
    values = layout.codes(data) * found["scale"][:, group].float() + found["minimum"][:, group].float()
    wanted = wanted_codes * wanted_scale[:, group].float() + wanted_minimum[:, group].float()
    scaled = w.float() / row[:, None]
    error, wanted_error = ((v - scaled).abs().sum(dim=1) for v in (values, wanted))
    assert torch.all(error <= wanted_error * (1 + 1e-4) + 1e-3)  # weights here are below 2**12


def test_strides_and_threads_do_not_matter(operators):
    w = gaussian(70, 200)
    parts = {
        "transposed": w.T.contiguous().T,
        "every second": w.repeat_interleave(2, 1)[:, ::2],
        "rows": w.repeat(2, 1)[:70],
    }
    for method in ("rtn", "hqq"):
        expected = quantized(operators, w, Kind.AFFINE, 4, group_size=64, method=method)
        for strided in parts.values():
            assert torch.equal(quantized(operators, strided, Kind.AFFINE, 4, group_size=64, method=method), expected)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(quantized(operators, w, Kind.AFFINE, 4, group_size=64, method=method), expected)
            assert torch.equal(operators.sinkhorn(w, 32, 16), operators.sinkhorn(parts["transposed"], 32, 16))
        finally:
            torch.set_num_threads(threads)


def test_what_it_cannot_fill_is_refused(operators):
    w, data = gaussian(4, 64), layout.allocate(kind=Kind.INT8, bits=8, n=4, k=64)
    for weight, buffer, method, column, said in (
        (w.double(), data, "rtn", None, "float32, bfloat16 or float16"),
        (w[:3], data, "rtn", None, r"must be \[4, 64\]"),
        (w, data, "hqq", None, "hqq needs an affine buffer"),
        (w, data, "nearest", None, "rtn or hqq"),
        (w, data, "rtn", torch.ones(64), "exactly where the buffer has one"),
        (w, data[:-64], "rtn", None, "no packed weight"),
        (w, torch.zeros(4096, dtype=torch.uint8), "rtn", None, "no packed weight"),
        (w, layout.allocate(kind=Kind.DENSE, bits=32, n=4, k=64), "rtn", None, "not quantized"),
    ):
        with pytest.raises(RuntimeError, match=said):
            operators.quantize(weight, buffer, method, column, *HQQ)


def factors(w, group_size):
    return torch.cat([numerics.sinkhorn(tile.float().contiguous())[0] for tile in w.split(group_size, dim=1)])


def uneven(n, k, seed=0):
    return (
        gaussian(n, k, seed=seed)
        * (0.5 * gaussian(k, seed=seed + 1)).exp()
        * (0.3 * gaussian(n, 1, seed=seed + 2)).exp()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k", "group_size"), [(400, 300, 64), (64, 256, 128), (2000, 64, 32), (16, 33, 32)])
def test_sinkhorn_gives_the_references_factors(operators, dtype, n, k, group_size):
    w = uneven(n, k).to(dtype)
    torch.testing.assert_close(operators.sinkhorn(w, group_size, 16), factors(w, group_size), rtol=1e-4, atol=0)


def test_sinkhorn_of_even_columns_does_not_depend_on_which_iterate_rounding_picks(operators):
    """Rows and columns even out completely, and then two iterates alternate that differ by one factor."""
    w = gaussian(300, 1024)
    torch.testing.assert_close(operators.sinkhorn(w, 64, 16), factors(w, 64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_sinkhorn_leaves_out_what_is_constant_and_does_not_depend_on_the_magnitude(operators, scale):
    w = uneven(100, 64)
    w[3], w[7], w[:, 5], w[:, 40] = 0.0, 1.7, -2.0, 0.0
    w[3, 40], w[7, 5] = 0.0, 1.7  # a column that is constant but for a row left out
    t = operators.sinkhorn(w * scale, 64, 16)
    torch.testing.assert_close(t, factors(w * scale, 64), rtol=1e-4, atol=0)
    assert (t[5], t[40]) == (1.0, 1.0)
    assert not torch.equal(t, torch.ones(64))


@pytest.mark.parametrize("w", [gaussian(15, 64), torch.zeros(20, 64), gaussian(20, 1), gaussian(20, 1).expand(20, 64)])
def test_sinkhorn_of_too_few_rows_or_columns_is_one(operators, w):
    assert torch.equal(operators.sinkhorn(w, 64, 16), torch.ones(w.shape[1]))


def test_columns_of_a_large_mean_keep_their_deviation(operators):
    w = uneven(3000, 64) + 200.0 * gaussian(64, seed=5)
    torch.testing.assert_close(operators.sinkhorn(w, 64, 16), factors(w, 64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("candidate", candidates.ALL, ids=str)
def test_candidates_pack_alike_with_and_without_a_build(candidate, monkeypatch):
    if build.status().isa is None:
        pytest.skip("no compiled kernels on this machine")
    w = uneven(300, 520).half()
    compiled = candidate.pack(w)
    monkeypatch.setattr(build, "quantize", lambda *args, **options: False)
    monkeypatch.setattr(build, "sinkhorn", lambda *args: None)
    plain = candidate.pack(w)
    assert layout.header(compiled.data) == layout.header(plain.data)
    assert candidate.weight_bytes(compiled) == candidate.weight_bytes(plain)
    # t differs in its last bits, so a weight halfway between two codes may go either way; likewise HQQ's ties.
    assert (compiled.codes == plain.codes).float().mean() > 0.999
    errors = [numerics.relative_rms(candidate.unpack(p), w) for p in (compiled, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    if candidate.key in ("none", "int8wo", "int8dq", "int8mix", "fp6"):
        assert torch.equal(compiled.data, plain.data)
