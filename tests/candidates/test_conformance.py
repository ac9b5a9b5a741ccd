"""What every scheme must do. A new candidate enters by being in ``candidates.ALL``."""

import math

import pytest
import torch

from autoq import candidates, numerics
from autoq.candidates import LinearOp, Packed
from autoq.errors import CandidateError

AFFINE = ("int4wo-hqq", "sinq", "int4dq", "int4mix")
# Relative error of a product against the float64 reference: float32 sums, or the rounding of the output.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
every_candidate = pytest.mark.parametrize("candidate", candidates.ALL, ids=str)


def code_bits(candidate):
    return candidate.bits if candidate.key == "sinq" else 4


def is_sinq(candidate):
    """Whether the codes are those of SINQ: rounded to nearest, with column factors."""
    return candidate.key == "sinq" or getattr(candidate, "method", "") == "sinq"


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid_values(candidate, p):
    """The values each weight could have been rounded to, float64 [N, K, codes]; from codes and scales."""
    n, k = p.shape
    if candidate.key in AFFINE:
        group = torch.arange(k) // candidate.group_size
        q = torch.arange(2 ** code_bits(candidate)).double()
        values = q * p.scale.double()[:, group, None] + p.minimum.double()[:, group, None]
        values = values * p.row_scale.double()[:, None, None]
        return values if p.column_scale is None else values * p.column_scale.double()[:, None]
    form = numerics.E3M2 if str(candidate).startswith("fp6(format=e3m2") else numerics.E2M3
    codes = numerics.fp6_values(form) if candidate.key == "fp6" else torch.arange(-128, 128)
    return (codes.double() * p.scale.double()[:, None, None]).expand(n, k, -1)


def on_grid(candidate):
    """Weights a scheme can hold exactly, and a mask of those that only pin its scale."""
    generator = torch.Generator().manual_seed(3)
    pin = torch.zeros(8, 160, dtype=torch.bool)
    if candidate.key == "none":
        return gaussian(8, 160), pin
    if candidate.key.startswith("int8"):
        w = torch.randint(-127, 127, (8, 160), generator=generator) / 32
        pin[:, 0] = True
        w[:, 0] = 127.5 / 32
        return w, pin
    if candidate.key == "fp6":
        form = numerics.E3M2 if candidate.format == "e3m2" else numerics.E2M3
        codes = torch.randint(0, 64, (8, 160), generator=generator, dtype=torch.uint8)
        codes[:, :64] = torch.arange(64)
        return numerics.decode_fp6(codes, form) / 4, pin
    top = 2 ** code_bits(candidate) - 1
    codes = torch.randint(0, top + 1, (8, 160), generator=generator)
    codes[:, 0::32], codes[:, 1::32] = 0, top
    group = torch.arange(160) // candidate.group_size
    scale = torch.randint(1, 100, (8, 5), generator=generator)[:, group] / 1024
    minimum = torch.randint(-500, 100, (8, 5), generator=generator)[:, group] / 64
    return codes * scale + minimum, pin


@every_candidate
def test_grid_points_are_exact(candidate):
    w, pin = on_grid(candidate)
    unpacked = candidate.unpack(candidate.pack(w))
    assert torch.equal(unpacked[~pin], w[~pin])
    if candidate.key in ("fp6", "none"):
        assert torch.equal(unpacked.signbit(), w.signbit())


@every_candidate
def test_every_code_is_the_nearest_and_unpack_gives_its_value(candidate):
    w = gaussian(24, 100)
    p = candidate.pack(w)
    error = (candidate.unpack(p).double() - w.double()).abs()
    if candidate.key == "none":
        assert not error.any()
        return
    distance = (grid_values(candidate, p) - w.double()[:, :, None]).abs()
    assert torch.all(error <= distance.amin(dim=2) + 1e-6)  # float32's rounding
    if candidate.key.startswith("int8"):
        assert torch.all(error <= p.scale[:, None].double() / 2 * (1 + 1e-4))
    if is_sinq(candidate):
        step = p.scale.double().repeat_interleave(candidate.group_size, 1)[:, :100] * p.row_scale[:, None]
        assert torch.all(error <= step * p.column_scale / 2 * (1 + 1e-4))


@every_candidate
@pytest.mark.parametrize(("n", "k"), [(1, 33), (5, 100), (3, 32), (17, 1), (16, 129), (40, 64)])
@pytest.mark.parametrize("m", [1, 5])
def test_odd_shapes(candidate, n, k, m):
    w, x, bias = gaussian(n, k), gaussian(m, k, seed=1), gaussian(n, seed=2)
    p = candidate.pack(w)
    assert p.shape == (n, k)
    assert candidate.unpack(p).shape == (n, k)
    assert numerics.relative_rms(candidate.unpack(p), w) < 0.25
    y = candidate.linear(x, p, bias)
    assert y.shape == (m, n)
    assert numerics.relative_rms(y, candidate.reference(x, p, bias)) < TOLERANCE[torch.float32]


@every_candidate
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_activation_dtypes_shapes_and_strides(candidate, dtype):
    p = candidate.pack(gaussian(48, 96).to(dtype))
    bias = gaussian(48, seed=2).to(dtype)
    for x in (
        gaussian(96, seed=1),
        gaussian(2, 3, 96, seed=1),
        gaussian(96, 7, seed=1).T,
        gaussian(7, 2, 96, seed=1)[:, 1],
        gaussian(0, 96),
    ):
        y = candidate.linear(x.to(dtype), p, bias)
        assert y.shape == (*x.shape[:-1], 48)
        assert y.dtype == dtype
        assert numerics.relative_rms(y, candidate.reference(x.to(dtype), p, bias)) < TOLERANCE[dtype]


@every_candidate
def test_zero_weights_stay_zero(candidate):
    w = gaussian(20, 100)
    w[7] = 0.0
    p = candidate.pack(w)
    assert not candidate.unpack(p)[7].any()
    assert not candidate.linear(gaussian(3, 100), p)[:, 7].any()
    assert not candidate.unpack(candidate.pack(torch.zeros(20, 100))).any()


@every_candidate
@pytest.mark.parametrize("value", [1e-6, 0.437, -3.3, 1e4])
def test_constant_rows(candidate, value):
    w = gaussian(8, 100) * value  # 8 rows: with column factors a constant row is constant no longer
    w[3] = value
    unpacked = candidate.unpack(candidate.pack(w))[3]
    limit = 0.5 / 127 if candidate.key.startswith("int8") else 2**-11
    assert (unpacked / value - 1).abs().max() <= limit


@every_candidate
@pytest.mark.parametrize("exponent", [-60, -20, 20, 60])
def test_error_does_not_depend_on_the_magnitude(candidate, exponent):
    w = gaussian(32, 100) * 0.02
    scaled = candidate.pack(w * 2.0**exponent)
    assert torch.equal(
        scaled.codes * 1.0, candidate.pack(w).codes * (2.0**exponent if candidate.key == "none" else 1.0)
    )
    error = numerics.relative_rms(candidate.unpack(scaled), w * 2.0**exponent)
    assert error == pytest.approx(numerics.relative_rms(candidate.unpack(candidate.pack(w)), w), rel=1e-4)


@every_candidate
def test_half_precision_weights_pack_as_their_float32_values(candidate):
    for dtype in (torch.bfloat16, torch.float16):
        w = gaussian(32, 100).to(dtype)
        p, wide = candidate.pack(w), candidate.pack(w.float())
        assert torch.equal(candidate.unpack(p), candidate.unpack(wide))
        if candidate.key != "none":
            assert torch.equal(p.data, wide.data)


@every_candidate
def test_strides_and_grad_do_not_matter_and_the_weight_is_left_alone(candidate):
    w = torch.nn.Parameter(gaussian(100, 40).T)
    before = w.detach().clone()
    p = candidate.pack(w)
    assert torch.equal(p.data, candidate.pack(before.contiguous()).data)
    assert torch.equal(w, before)
    assert not p.data.requires_grad


@pytest.mark.parametrize("candidate", [c for c in candidates.ALL if not is_sinq(c)], ids=str)
def test_rows_are_packed_alike_in_any_chunk(candidate):  # SINQ's column factors depend on all rows
    w = gaussian(700, 400)  # several chunks
    assert torch.equal(candidate.pack(w).codes[650:], candidate.pack(w[650:]).codes)


@every_candidate
def test_packing_in_inference_mode_gives_an_ordinary_tensor(candidate):
    w = gaussian(500, 96)
    with torch.inference_mode():
        p = candidate.pack(w.clone())
    assert not p.data.is_inference()
    assert torch.equal(p.data, candidate.pack(w).data)


@every_candidate
def test_a_copied_buffer_gives_the_same_bits(candidate):
    p, x = candidate.pack(gaussian(33, 96)), gaussian(4, 96)
    copy = Packed(p.data.clone())
    assert torch.equal(candidate.linear(x, copy), candidate.linear(x, p))
    assert torch.equal(candidate.unpack(copy), candidate.unpack(p))


@every_candidate
@pytest.mark.parametrize(("n", "k"), [(48, 128), (5, 100), (16, 33)])
def test_bytes_are_those_predicted(candidate, n, k):
    p = candidate.pack(gaussian(n, k).bfloat16())
    assert candidate.weight_bytes(p) == candidate.weight_bytes_for(n, k)
    assert p.data.numel() >= candidate.weight_bytes(p) + 128
    assert p.head.numel() == 128


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("none", 16.0),
        ("int8wo", 8 + 32 / 4096),
        ("int8dq", 8 + 32 / 4096),
        ("int4wo-hqq(group_size=64)", 4.5 + 32 / 4096),
        ("int4wo-hqq(group_size=128)", 4.25 + 32 / 4096),
        ("sinq(bits=4,group_size=64)", 4.5 + 64 / 4096),
        ("sinq(bits=3,group_size=64)", 3.5 + 64 / 4096),
        ("sinq(bits=5,group_size=32)", 6.0 + 64 / 4096),
        ("fp6(format=e2m3)", 6 + 32 / 4096),
        ("int4dq(group_size=128)", 4.25 + 32 / 4096),
        ("int4dq(group_size=64,method=sinq)", 4.5 + 64 / 4096),
        ("int4mix(group_size=32)", 5.0 + 32 / 4096),
        ("int8mix(m_switch=8)", 8 + 32 / 4096),
    ],
)
def test_bits_per_weight(text, bits):
    assert candidates.parse(text).weight_bytes_for(4096, 4096) * 8 == bits * 4096**2


@every_candidate
@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.tensor([[1.0, math.nan]]), "NaN"),
        (torch.tensor([[1.0, -math.inf]]), "an infinity"),
        (torch.zeros(3), r"shape \(3,\)"),
        (torch.zeros(0, 32), r"shape \(0, 32\)"),
        (torch.zeros(2, 32, device="meta"), "a meta tensor"),
        (torch.zeros(2, 32, dtype=torch.float64), "float64"),
        (torch.eye(32).to_sparse(), "sparse_coo"),
    ],
    ids=["nan", "inf", "1-D", "empty", "meta", "float64", "sparse"],
)
def test_impossible_weights_are_refused_by_layer_name(candidate, weight, said):
    with pytest.raises(CandidateError, match=rf"model\.layers\.3\.up: .*{said}"):
        candidate.pack(weight, layer="model.layers.3.up")


@every_candidate
def test_opcheck(candidate):
    p = candidate.pack(gaussian(8, 64))
    # The whole buffer stands for its head: opcheck copies arguments, and a copied view has no weight behind it.
    args = (gaussian(3, 64).requires_grad_(), p.data, gaussian(8), 8)
    torch.library.opcheck(torch.ops.autoq.linear.default, args)


@every_candidate
def test_linear_traces_in_one_graph(candidate):
    torch.compiler.reset()  # every class of candidates is a recompilation of the same lambda
    p, x = candidate.pack(gaussian(16, 64)), gaussian(3, 64)
    compiled = torch.compile(lambda x: candidate.linear(x * 2, p), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), candidate.linear(x * 2, p))


def test_one_compiled_graph_serves_every_scheme():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def multiply(x, head, bias):
        return torch.ops.autoq.linear(torch.relu(x), head, bias, 16)

    compiled = torch.compile(multiply, fullgraph=True, backend=count)
    inductor = torch.compile(multiply, fullgraph=True)
    x, bias, w = gaussian(3, 64), gaussian(16, seed=2), gaussian(16, 64, seed=1)
    for candidate in candidates.ALL:
        p = candidate.pack(w)
        want = candidate.linear(torch.relu(x), p, bias)
        assert torch.equal(compiled(x, p.head, bias), want)
        assert torch.equal(inductor(x, p.head, bias), want)
    assert len(graphs) == 1


@every_candidate
def test_input_gradient_is_that_of_the_unpacked_weight(candidate):
    p, x = candidate.pack(gaussian(16, 64)), gaussian(3, 64).requires_grad_()
    out = candidate.linear(x, p)
    out.backward(torch.ones_like(out))
    want = torch.ones(3, 16, dtype=torch.float64) @ candidate.unpack(p).double()
    assert numerics.relative_rms(x.grad, want) < TOLERANCE[torch.float32]


class TestWhyNot:
    @every_candidate
    def test_runs_on_an_ordinary_layer(self, candidate):
        for dtype in TOLERANCE:
            assert candidate.why_not(LinearOp(m=1, k=576, n=1536, dtype=dtype, device="cuda:0")) is None

    @every_candidate
    def test_reasons(self, candidate):
        op = {"m": 1, "k": 576, "n": 1536, "dtype": torch.bfloat16, "device": "cpu"}
        assert "device 'mps'" in candidate.why_not(LinearOp(**op | {"device": "mps"}))
        assert "float64" in candidate.why_not(LinearOp(**op | {"dtype": torch.float64}))
        if candidate.key == "none":
            return
        assert "K=16" in candidate.why_not(LinearOp(**op | {"k": 16}))
        if candidate.key == "int4wo-hqq" and candidate.group_size == 128:
            assert "bytes, not fewer than the 101376 of bfloat16" in candidate.why_not(LinearOp(**op | {"k": 33}))

    @pytest.mark.parametrize("scheme", ["int8dq", "int8mix"])
    def test_int8_products_refuse_sums_that_could_overflow(self, scheme):
        op = LinearOp(m=1, k=200_000, n=64, dtype=torch.float32)
        assert "overflow" in candidates.parse(scheme).why_not(op)

    def test_impossible_op(self):
        with pytest.raises(CandidateError, match="at least one row"):
            LinearOp(m=0, k=1, n=1, dtype=torch.float32)
