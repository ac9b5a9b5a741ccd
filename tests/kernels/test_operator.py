"""autoq::linear as PyTorch sees it: schema, tracing, gradient, compilation."""

import importlib
import subprocess
import sys

import pytest
import torch

from autoq_kernels import layout, ops
from autoq_kernels.cpu import build, probe
from autoq_kernels.layout import Kind

N, K = probe.N, probe.K


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    build.load()


def head_of(data):
    return data[: layout.HEADER_BYTES]


def weights():
    dense = layout.build(kind=Kind.DENSE, bits=32, n=N, k=K, codes=torch.randn(N, K))
    return probe.sample_weights() | {"none": dense}


@pytest.mark.parametrize("name", ["int4", "int4dq", "int8wo", "int8dq", "int8mix", "fp6_e3m2"])
def test_opcheck(name):
    """The whole buffer stands in for its head: opcheck copies its arguments, and a copied head has no weight."""
    data = weights()[name]
    x, bias = torch.randn(3, K, requires_grad=True), torch.randn(N, requires_grad=True)
    torch.library.opcheck(torch.ops.autoq.linear.default, (x, data, bias, N))
    torch.library.opcheck(torch.ops.autoq.linear.default, (x.detach(), data, None, N))
    torch.library.opcheck(torch.ops.autoq.dequantize.default, (data, N, K))


def test_the_default_definition_agrees_with_float64():
    x, bias = torch.randn(4, K), torch.randn(N)
    for name, data in weights().items():
        w = ops.dequantize(head_of(data), N, K).double()
        if name in ("int8dq", "int4dq"):
            column = layout.sections(data).get("column_scale", torch.ones(K))
            q, scale = ops.quantize_rows(x * column)
            expected = (q.double() * scale.double()) @ (w / column).T + bias.double()
        else:
            expected = x.double() @ w.T + bias.double()
        assert probe.relative_rms(ops.linear(x, head_of(data), bias, N), expected) <= 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_goes_through_the_dequantized_weight(dtype):
    for name, data in weights().items():
        if name == "none" and dtype != torch.float32:
            continue
        x = torch.randn(2, 3, K, dtype=dtype, requires_grad=True)
        bias = torch.randn(N, dtype=dtype, requires_grad=True)
        y = torch.ops.autoq.linear(x, head_of(data), bias, N)
        grad = torch.randn_like(y)
        y.backward(grad)
        expected = (grad.double() @ ops.dequantize(head_of(data), N, K).double()).to(dtype)
        assert probe.relative_rms(x.grad, expected) <= (1e-6 if dtype == torch.float32 else 3e-3), name
        assert torch.allclose(bias.grad, grad.sum(dim=(0, 1)), atol=0.02), name


def test_forward_mode_gradients_are_refused_not_dropped():
    x = torch.randn(2, K)
    head = head_of(weights()["int4"])
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: torch.ops.autoq.linear(x, head, None, N), (x,), (x,))


def test_one_graph_serves_every_scheme():
    """The head has one shape whatever the scheme: a new plan must not recompile."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Layer(torch.nn.Module):
        def __init__(self, data):
            super().__init__()
            self.register_buffer("data", data)
            self.head = head_of(data)

        def forward(self, x):
            return torch.ops.autoq.linear(x, self.head, None, N).relu()

    x = torch.randn(3, K)
    layer = Layer(weights()["int4"])
    compiled = torch.compile(layer, backend=counting, fullgraph=True)
    for data in weights().values():
        layer.data, layer.head = data, head_of(data)
        assert torch.equal(compiled(x), torch.ops.autoq.linear(x, head_of(data), None, N).relu())
    assert len(graphs) == 1


def test_inductor_compiles_it_whole_with_its_gradient():
    head = head_of(weights()["int4"])

    def f(x, bias):
        return torch.ops.autoq.linear(x * 2, head, bias, N).sin()

    x, bias = torch.randn(3, K, requires_grad=True), torch.randn(N)
    y = torch.compile(f, fullgraph=True)(x, bias)
    assert torch.allclose(y, f(x, bias), atol=1e-4)
    (got,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(f(x, bias).sum(), x)
    assert probe.relative_rms(got, expected) <= 1e-4


def test_a_second_import_defines_nothing_twice():
    importlib.reload(ops)
    assert torch.ops.autoq.linear(torch.ones(1, K), head_of(weights()["int4"]), None, N).shape == (1, N)


def test_the_kernels_import_nothing_of_autoq():
    code = "import sys, autoq_kernels.cpu.build; sys.exit('autoq' in {m.partition('.')[0] for m in sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
