"""The compiled kernels against float64, for every kind of weight."""

import ctypes
import mmap

import pytest
import torch

from autoq_kernels import layout, ops
from autoq_kernels.cpu import probe
from autoq_kernels.layout import Kind

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-4, torch.bfloat16: 3e-3}  # relative RMS
SHAPES = [(1, 1), (5, 33), (1, 576), (37, 96), (130, 520)]  # (N, K)
NO_ACCESS = 0  # PROT_NONE
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 65, 257)


def limit(dtype, count):
    """The table, and for a handful of outputs the rounding of a single one: half a unit in the last place."""
    return TOLERANCE[dtype] if count >= 32 else max(TOLERANCE[dtype], 0.55 * torch.finfo(dtype).eps)


def reference(x, head, bias, n):
    """In float64, but for the rounding of x, which is defined in float32."""
    form = layout.header(head)
    x_MK = x.reshape(-1, form.k)
    if form.activation_bits and len(x_MK) >= form.m_switch:
        data = layout.buffer(head)
        parts = layout.sections(data)
        column = parts.get("column_scale", torch.ones(form.k))
        q, scale = ops.quantize_rows(x_MK.float() * column)
        weight = ops.dequantize(head, n, form.k).double() / column.double()
        y = q.double() @ weight.T * scale.double()
        y = y.reshape(*x.shape[:-1], n)
    else:
        y = x.double() @ ops.dequantize(head, n, form.k).double().T
    return y if bias is None else y + bias.double()


def head_of(data):
    return data[: layout.HEADER_BYTES]


def affine(bits, n, k, group_size, **parts):
    g = torch.Generator().manual_seed(1)
    groups = -(-k // group_size)
    codes = torch.randint(0, 1 << bits, (n, groups * group_size), generator=g, dtype=torch.uint8)
    scale = (torch.rand(n, groups, generator=g) + 0.5).half()
    return layout.build(kind=Kind.AFFINE, bits=bits, n=n, k=k, group_size=group_size, codes=codes, scale=scale, **parts)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_kind_meets_the_tolerance_at_every_row_count(operators, n, k, dtype):
    for name, data in probe.sample_weights(n, k).items():
        for m in ROWS:
            g = torch.Generator().manual_seed(m)
            x, bias = torch.randn(m, k, generator=g).to(dtype), torch.randn(n, generator=g).to(dtype)
            for b in (None, bias):
                y = operators.linear(x, head_of(data), b, n)
                error = probe.relative_rms(y, reference(x, head_of(data), b, n))
                assert error <= limit(dtype, y.numel()), (name, m, b is None, error)
                assert y.dtype == dtype


@pytest.mark.parametrize("group_size", [32, 64, 96, 288, 512])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_group_sizes_that_are_cut_into_blocks(operators, group_size, m):
    k, n = 600, 9
    groups = -(-k // group_size)
    minimum = torch.linspace(-8, -6, n * groups).reshape(n, groups).half()
    for parts in ({}, {"minimum": minimum}, {"row_scale": torch.full((n,), 2.0**-20)}):
        head = head_of(affine(4, n, k, group_size, **parts))
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(0))
        error = probe.relative_rms(operators.linear(x, head, None, n), reference(x, head, None, n))
        assert error <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_an_unquantized_weight_is_multiplied_as_it_is(operators, n, k, dtype):
    g = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(n, k, generator=g).to(dtype), torch.randn(n, generator=g).to(dtype)
    bits = layout.DENSE_BITS[dtype]
    head = head_of(layout.build(kind=Kind.DENSE, bits=bits, n=n, k=k, codes=weight))
    for m in (1, 2, 3, 4, 5, 12, 31, 32, 33, 100):
        x = torch.randn(m, k, generator=g).to(dtype)
        for b in (None, bias):
            expected = x.double() @ weight.double().T + (0 if b is None else b.double())
            y = operators.linear(x, head, b, n)
            assert y.dtype == dtype
            assert probe.relative_rms(y, expected) <= limit(dtype, y.numel()), m


def test_dequantize_is_the_definition(operators):
    for n, k in SHAPES:
        for name, data in probe.sample_weights(n, k).items():
            got = operators.dequantize(head_of(data), n, k)
            assert probe.relative_rms(got, ops.dequantize(head_of(data), n, k)) <= 1e-6, name


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("code", [127, -127, -128])
def test_the_largest_int8_sums_are_exact(operators, m, code):
    """16384 · 127 · 128 is 2^28: beyond int16, saturating or float16 sums, and a float32 holds it exactly."""
    n, k = 5, 16384
    codes = torch.full((n, k), code, dtype=torch.int8)
    data = layout.build(kind=Kind.INT8, bits=8, n=n, k=k, codes=codes, scale=torch.ones(n), activation_bits=8)
    y = operators.linear(torch.full((m, k), 127.0), head_of(data), None, n)
    assert torch.equal(y, torch.full((m, n), float(k * 127 * code)))


@pytest.mark.parametrize("m", [1, 2, 33])
def test_int8_sums_of_any_signs_are_exact(operators, m):
    n, k = 7, 4099
    g = torch.Generator().manual_seed(0)
    x, codes = torch.randint(-127, 128, (m, k), generator=g), torch.randint(-128, 128, (n, k), generator=g)
    x[:, 0] = 127  # so that the scale of x is one
    data = layout.build(
        kind=Kind.INT8, bits=8, n=n, k=k, codes=codes.to(torch.int8), scale=torch.ones(n), activation_bits=8
    )
    assert torch.equal(operators.linear(x.float(), head_of(data), None, n).long(), x @ codes.T)


@pytest.mark.parametrize("name", ["int4", "int8wo", "int8dq", "fp6_e3m2"])
def test_rows_of_any_shape_and_stride(operators, name):
    n, k = 6, 75
    head = head_of(probe.sample_weights(n, k)[name])
    x = torch.randn(2, 3, k, generator=torch.Generator().manual_seed(0))
    whole = operators.linear(x, head, None, n)
    assert whole.shape == (2, 3, n)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(operators.linear(strided, head, None, n), whole)
    shifted = torch.cat([torch.zeros(1), x.flatten()])[1:].reshape(2, 3, k)  # 4 bytes off any alignment
    assert torch.equal(operators.linear(shifted, head, None, n), whole)
    assert operators.linear(x[0, 0], head, None, n).shape == (n,)
    assert operators.linear(x[:0], head, None, n).shape == (0, 3, n)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_bad_token_spoils_its_own_row_only(operators, dtype, bad):
    n, k = 6, 75
    for name, data in probe.sample_weights(n, k).items():
        x = torch.randn(5, k, generator=torch.Generator().manual_seed(0)).to(dtype)
        good = operators.linear(x, head_of(data), None, n)
        x[2, 40] = bad
        y = operators.linear(x, head_of(data), None, n)
        assert not y[2].isfinite().any(), name
        assert torch.equal(y[[0, 1, 3, 4]], good[[0, 1, 3, 4]]), name


@pytest.mark.parametrize("m", [1, 4, 40])
def test_a_zero_row_gives_the_bias(operators, m):
    bias = torch.arange(6.0)
    for name, data in probe.sample_weights().items():
        y = operators.linear(torch.zeros(m, probe.K), head_of(data), bias, probe.N)
        assert torch.equal(y, bias.expand(m, -1)), name


def test_x_of_any_magnitude(operators):
    """Scales are per block of x: neither tiny nor huge activations lose digits."""
    x = torch.randn(3, probe.K, generator=torch.Generator().manual_seed(0))
    for name, data in probe.sample_weights().items():
        for factor in (1e-20, 1e20):
            y = operators.linear(x * factor, head_of(data), None, probe.N)
            error = probe.relative_rms(y / factor, reference(x, head_of(data), None, probe.N))
            assert error <= 2e-5, (name, factor)


@pytest.mark.parametrize("m", [1, 3, 40])
def test_nothing_is_read_beyond_the_buffer(operators, m):
    """The buffer ends where a page that must not be read begins."""
    page = mmap.PAGESIZE
    for n, k in ((1, 1), (3, 33), (5, 75)):
        for data in probe.sample_weights(n, k).values():
            size = -(-data.numel() // page) * page
            memory = mmap.mmap(-1, size + page)
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            guarded = torch.frombuffer(memory, dtype=torch.uint8, count=data.numel(), offset=size - data.numel())
            guarded.copy_(data)
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.mprotect(ctypes.c_void_p(address + size), page, NO_ACCESS) == 0
            x = torch.ones(m, k)
            assert operators.linear(x, head_of(guarded), None, n).isfinite().all()
            assert operators.dequantize(head_of(guarded), n, k).isfinite().all()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_dense_weight_is_the_stock_layer(operators, dtype):
    g = torch.Generator().manual_seed(0)
    w, x, b = (torch.randn(*shape, generator=g).to(dtype) for shape in ((7, 33), (3, 33), (7,)))
    data = layout.build(kind=Kind.DENSE, bits=layout.DENSE_BITS[dtype], n=7, k=33, codes=w)
    assert torch.equal(operators.linear(x, head_of(data), b, 7), torch.nn.functional.linear(x, w, b))
    assert torch.equal(operators.dequantize(head_of(data), 7, 33), w.float())


def test_wrong_arguments_are_refused(operators):
    data = probe.sample_weights()["int4"]
    x = torch.ones(1, probe.K)
    with pytest.raises(RuntimeError, match="copied without its weight"):
        operators.linear(x, head_of(data).clone(), None, probe.N)
    with pytest.raises(RuntimeError, match="the call says"):
        operators.linear(x[:, 1:], head_of(data), None, probe.N)
    with pytest.raises(RuntimeError, match="bias must be"):
        operators.linear(x, head_of(data), torch.ones(2), probe.N)
    with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16"):
        operators.linear(x.double(), head_of(data), None, probe.N)
    with pytest.raises(RuntimeError, match="mark of a packed weight"):
        operators.linear(x, torch.zeros(4096, dtype=torch.uint8)[:128], None, probe.N)


@pytest.mark.parametrize("field", range(2, 16))
def test_a_damaged_header_is_refused_or_harmless(operators, field):
    """No value of any field may crash the process."""
    refusals = []
    for whole in probe.sample_weights().values():
        for value in (-1, 0, 1, 3, 1 << 20, 1 << 62):
            data = whole.clone()
            data[: layout.HEADER_BYTES].view(torch.int64)[field] = value
            try:
                y = operators.linear(torch.ones(1, probe.K), head_of(data), None, probe.N)
            except RuntimeError as error:
                refusals.append(str(error))
            else:
                assert y.shape == (1, probe.N)
    assert all("autoq:" in refusal for refusal in refusals)


def test_kernel_names_say_what_runs(operators, isa):
    weights = probe.sample_weights()
    name = lambda key, m, dtype: operators.kernel_name(head_of(weights[key]), m, dtype)  # noqa: E731 - a shorthand
    assert name("int4", 1, torch.bfloat16) == f"{isa}.int4.gemv"
    nibbles = "int16" if isa == "portable" else "int8"  # what x is rounded to where the build multiplies bytes
    bytes_ = "int8" if isa.startswith(("avx512", "avxvnni")) else "int16"
    assert name("int8dq", 64, torch.float32) == f"{isa}.int8dq.gemm.{bytes_}"
    assert name("int4dq", 64, torch.bfloat16) == f"{isa}.int4dq.gemm.{nibbles}"
    assert name("int8mix", 7, torch.bfloat16) == f"{isa}.int8wo.gemv"
    assert name("int8mix", 8, torch.bfloat16) == f"{isa}.int8dq.gemv"
    assert name("fp6_e3m2", 512, torch.float32) == f"{isa}.fp6_e3m2.dequantize+gemm.fp32"
