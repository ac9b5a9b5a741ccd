import itertools

import pytest
import torch

from autoq_kernels import layout
from autoq_kernels.layout import Kind, LayoutError

AFFINE_BITS = (3, 4, 5, 6, 8)


def affine(bits, n=5, k=70, group_size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    groups = -(-k // group_size)
    codes = torch.randint(0, 1 << bits, (n, groups * group_size), generator=g, dtype=torch.uint8)
    return codes, layout.build(
        kind=Kind.AFFINE,
        bits=bits,
        n=n,
        k=k,
        group_size=group_size,
        codes=codes,
        scale=torch.rand(n, groups, generator=g).half(),
        minimum=torch.randn(n, groups, generator=g).half(),
        row_scale=torch.full((n,), 0.5),
        column_scale=torch.rand(k, generator=g),
    )


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_bit_planes_give_the_codes_back(bits):
    codes, data = affine(bits)
    assert torch.equal(layout.codes(data), codes[:, :70])


@pytest.mark.parametrize("kind", [Kind.FP6_E3M2, Kind.FP6_E2M3])
def test_every_fp6_code_survives_packing(kind):
    codes = torch.arange(64, dtype=torch.uint8).repeat(2, 1)
    data = layout.build(kind=kind, bits=6, n=2, k=64, codes=codes, scale=torch.ones(2))
    assert torch.equal(layout.codes(data), codes)


def test_fp6_values_are_the_formats_numbers():
    e3m2, e2m3 = layout.fp6_values(Kind.FP6_E3M2), layout.fp6_values(Kind.FP6_E2M3)
    assert e3m2[:6].tolist() == [0, 0.0625, 0.125, 0.1875, 0.25, 0.3125]
    assert e2m3[:10].tolist() == [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1.125]
    assert (e3m2.max(), e2m3.max(), e3m2[63], e2m3[63]) == (28, 7.5, -28, -7.5)


def test_the_planes_hold_the_documented_bits():
    """One code set in a block of 32: the byte and bit it must land on, written out by hand."""
    where = {4: lambda k: (k % 16, 4 * (k // 16)), 2: lambda k: (k % 8, 2 * (k // 8)), 1: lambda k: (k // 8, k % 8)}
    for bits, k in itertools.product((4, 2, 1), range(32)):
        values = torch.zeros(1, 32, dtype=torch.uint8)
        values[0, k] = (1 << bits) - 1
        byte, shift = where[bits](k)
        expected = torch.zeros(1, 4 * bits, dtype=torch.uint8)
        expected[0, byte] = ((1 << bits) - 1) << shift
        assert torch.equal(layout.pack_plane(values, bits), expected)


def test_sections_are_aligned_views_with_readable_bytes_behind_them():
    _, data = affine(3)
    form = layout.header(data)
    parts = layout.sections(data)
    assert set(parts) == {"codes_2", "codes_1", "scale", "minimum", "row_scale", "column_scale"}
    for part in parts.values():
        assert part.untyped_storage().data_ptr() == data.untyped_storage().data_ptr()
    for name, offset in zip(form._fields, form, strict=True):
        assert not name.endswith("_offset") or offset % layout.ALIGNMENT == 0
    last = parts["column_scale"]
    end = last.storage_offset() * last.element_size() + last.nbytes
    assert end + layout.TRAILING_BYTES <= form.total_bytes == data.numel()


def test_the_buffer_is_found_behind_its_head_also_inside_a_larger_storage():
    _, data = affine(4)
    both = torch.cat([torch.zeros(64, dtype=torch.uint8), data])
    assert torch.equal(layout.buffer(both[64 : 64 + 128]), data)


def test_a_copied_head_is_refused():
    _, data = affine(4)
    with pytest.raises(LayoutError, match="copied without its weight"):
        layout.buffer(data[:128].clone())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 7}, "bits of AFFINE"),
        ({"group_size": 48}, "multiple of 32"),
        ({"activation_bits": 4}, "activation_bits"),
        ({"m_switch": 8}, "m_switch"),
        ({"activation_bits": 8, "m_switch": -1}, "m_switch"),
        ({"scale": None}, "needs scale"),
        ({"scale": torch.ones(2, 2)}, "must be torch.float16"),
        ({"codes": torch.zeros(2, 32, dtype=torch.uint8)}, "codes of AFFINE"),
        ({"k": 0}, "at least one"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    whole = {
        "kind": Kind.AFFINE,
        "bits": 4,
        "n": 2,
        "k": 64,
        "group_size": 32,
        "codes": torch.zeros(2, 64, dtype=torch.uint8),
        "scale": torch.ones(2, 2).half(),
    }
    with pytest.raises(LayoutError, match=message):
        layout.build(**(whole | change))


def test_bytes_that_are_no_packed_weight_are_refused():
    with pytest.raises(LayoutError, match="starts with"):
        layout.header(torch.zeros(128, dtype=torch.uint8))


def test_repeated_rows_are_the_weight_several_times_over():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 64, (3, 96), dtype=torch.uint8, generator=generator)
    scale, minimum = torch.rand(3, 3, generator=generator).half(), torch.rand(3, 3, generator=generator).half()
    data = layout.build(
        kind=layout.Kind.AFFINE,
        bits=6,
        n=3,
        k=80,
        group_size=32,
        codes=codes,
        scale=scale,
        minimum=minimum,
        row_scale=torch.ones(3),
        column_scale=torch.rand(80, generator=generator),
    )
    twice = layout.repeat_rows(data, 2)
    assert layout.header(twice).n == 6
    assert torch.equal(layout.codes(twice), layout.codes(data).repeat(2, 1))
    assert torch.equal(layout.sections(twice)["minimum"], minimum.repeat(2, 1))
    assert torch.equal(layout.sections(twice)["column_scale"], layout.sections(data)["column_scale"])
    assert torch.equal(layout.repeat_rows(data, 1), data)


def test_an_allocated_buffer_has_the_form_of_a_built_one():
    codes, built = affine(5)
    empty = layout.allocate(kind=Kind.AFFINE, bits=5, n=5, k=70, group_size=32, has_column_scale=True)
    assert layout.header(empty) == layout.header(built)
    assert not empty[layout.HEADER_BYTES :].any()
    for kind, bits, dtype in ((Kind.INT8, 8, torch.int8), (Kind.FP6_E2M3, 6, torch.uint8)):
        whole = layout.build(kind=kind, bits=bits, n=3, k=64, codes=codes[:3, :64].to(dtype) % 64, scale=torch.ones(3))
        assert layout.header(layout.allocate(kind=kind, bits=bits, n=3, k=64)) == layout.header(whole)
    with pytest.raises(LayoutError, match="has no column_scale"):
        layout.allocate(kind=Kind.INT8, bits=8, n=3, k=64, has_column_scale=True)
