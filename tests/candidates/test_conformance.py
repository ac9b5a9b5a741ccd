"""What every scheme must do: the suite that plugins inherit too, and what holds for autoq's own only."""

import pytest
import torch

from autoq import candidates, numerics
from autoq.candidates import LinearOp
from autoq.errors import CandidateError
from autoq.testing import Conformance, IndependentRows, NearestCodes, gaussian

every_candidate = pytest.mark.parametrize("candidate", candidates.ALL, ids=str)


def is_sinq(candidate):
    """Whether the codes are those of SINQ: rounded to nearest, with column factors."""
    return candidate.key == "sinq" or getattr(candidate, "method", "") == "sinq"


class TestEveryScheme(Conformance):
    candidates = candidates.ALL


class TestRounding(NearestCodes):
    candidates = candidates.ALL


class TestRows(IndependentRows):
    candidates = tuple(one for one in candidates.ALL if not is_sinq(one))  # its column factors depend on all rows


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
    top = 2**candidate.code_bits - 1
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
def test_no_error_exceeds_half_a_step(candidate):
    w = gaussian(24, 100)
    p = candidate.pack(w)
    error = (candidate.unpack(p).double() - w.double()).abs()
    if candidate.key.startswith("int8"):
        assert torch.all(error <= p.scale[:, None].double() / 2 * (1 + 1e-4))
    if is_sinq(candidate):
        step = p.scale.double().repeat_interleave(candidate.group_size, 1)[:, :100] * p.row_scale[:, None]
        assert torch.all(error <= step * p.column_scale / 2 * (1 + 1e-4))


@every_candidate
def test_a_buffer_is_its_sections_and_a_head(candidate):
    p = candidate.pack(gaussian(16, 33).bfloat16())
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


class TestWhyNot:
    def test_a_weight_that_packing_does_not_shrink(self):
        op = LinearOp(m=1, k=33, n=1536, dtype=torch.bfloat16)
        reason = candidates.parse("int4wo-hqq(group_size=128)").why_not(op)
        assert "bytes, not fewer than the 101376 of bfloat16" in reason

    @pytest.mark.parametrize("scheme", ["int8dq", "int8mix"])
    def test_int8_products_refuse_sums_that_could_overflow(self, scheme):
        op = LinearOp(m=1, k=200_000, n=64, dtype=torch.float32)
        assert "overflow" in candidates.parse(scheme).why_not(op)

    def test_impossible_op(self):
        with pytest.raises(CandidateError, match="at least one row"):
            LinearOp(m=0, k=1, n=1, dtype=torch.float32)
