"""autoq::linear with the Triton implementation under it, registered for CPU tensors in this process only."""

import functools
import itertools
import subprocess
import sys

import pytest
import torch

from autoq import candidates
from autoq.candidates.base import load_cpu_kernels
from autoq.numerics import relative_rms
from autoq_kernels import layout, ops
from autoq_kernels.layout import Kind
from autoq_kernels.tolerance import TOLERANCE
from autoq_kernels.triton import products, register
from autoq_kernels.triton.library_kernels import INT4PACKED

N, K = 16, 96
SCHEMES = ("none", "int8wo", "int8dq", "int4wo-hqq(group_size=32)", "fp6(format=e2m3)", "int4mix(m_switch=8)")
SCHEMES += ("sinq(bits=3,group_size=64)", "int4dq(group_size=32,method=sinq)")
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(scope="module", autouse=True)
def _triton_on_cpu():
    load_cpu_kernels()  # these would be registered over ours, were they loaded later
    library = torch.library.Library("autoq", "IMPL")
    library.impl("linear", register.linear, "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels that were launched."""
    from autoq_kernels.triton.launching import Launch

    seen, original = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (seen.append(self.kernel.__name__), original(self)))
    return seen


def gaussian(*shape, seed=1, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(scheme, dtype=torch.bfloat16, n=N, k=K):
    candidate = candidates.parse(scheme)
    return candidate, candidate.pack(gaussian(n, k, seed=0, dtype=dtype))


def linear(x, p, bias=None):
    return torch.ops.autoq.linear(x, p.head, bias, p.shape[0])


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        *((scheme, torch.bfloat16) for scheme in SCHEMES),
        *itertools.product(("none", *SCHEMES[2:4]), list(TOLERANCE)[1:]),
    ],
    ids=str,
)
def test_shapes_strides_and_addresses_of_x(scheme, dtype):
    candidate, p = packed(scheme, dtype)
    bias = gaussian(N, seed=2, dtype=dtype)
    make = functools.partial(gaussian, dtype=dtype)
    for x in (
        make(K),
        make(2, 3, K),
        make(K, 7).T,
        make(5, 2, K)[:, 1],
        make(3 * K + 1)[1:].reshape(3, K),
        make(20, K),
        make(1, 1, K).expand(2, 2, K),
    ):
        y = linear(x, p, bias)
        assert (y.shape, y.dtype) == ((*x.shape[:-1], N), dtype)
        assert y.is_contiguous()
        assert relative_rms(y, candidate.reference(x, p, bias)) <= TOLERANCE[dtype]


@every_scheme
def test_no_rows_give_no_rows(scheme):
    _, p = packed(scheme)
    for shape in ((0, K), (2, 0, K)):
        y = linear(gaussian(*shape), p, gaussian(N))
        assert (y.shape, y.dtype) == ((*shape[:-1], N), torch.bfloat16)


@pytest.mark.parametrize("m", [1, 20])
@every_scheme
def test_the_bias_may_have_another_dtype_and_start_anywhere(scheme, m):
    candidate, p = packed(scheme)
    if scheme == "none":
        return  # torch.nn.functional.linear wants one dtype
    bias, x = gaussian(N + 1, seed=2, dtype=torch.float32)[1:], gaussian(m, K)
    assert relative_rms(linear(x, p, bias), candidate.reference(x, p, bias)) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("m", [1, 20])
def test_the_bias_may_be_strided_or_one_number_for_all(m):
    candidate, p = packed("int4wo-hqq(group_size=32)")
    x = gaussian(m, K)
    for bias in (gaussian(2 * N, seed=2)[::2], gaussian(1, seed=2).expand(N), gaussian(1, seed=2)):
        y = linear(x, p, bias)
        assert torch.equal(y, linear(x, p, bias.expand(N).clone()))
        assert relative_rms(y, candidate.reference(x, p, bias)) <= TOLERANCE[torch.bfloat16]
    with pytest.raises(RuntimeError, match="expand"):
        linear(x, p, gaussian(N - 1))


def test_tensors_on_several_devices_are_refused():
    _, p = packed("int8wo")
    with pytest.raises(ValueError, match="one device; got cpu, meta"):
        register.linear(gaussian(1, K), p.head, torch.empty(N, device="meta"), N)


def test_a_choice_whose_copy_of_the_weight_was_not_made_is_not_taken(monkeypatch):
    _, p = packed("int4wo-hqq(group_size=32)", n=16, k=64)
    tuned = products.Choice(method=products.INT4PACK)
    monkeypatch.setattr(register, "_tuned", lambda weight, m, dtype: tuned)
    before = register.kernel_name(p.head, 1, torch.bfloat16)
    assert before.startswith("triton.gemv")
    register.weights().of(p.head).prepared[INT4PACKED] = (p.data,)
    assert register.kernel_name(p.head, 1, torch.bfloat16) == products.INT4PACK


@every_scheme
def test_float32_with_many_rows_is_the_plain_definition_to_float32s_accuracy(scheme):
    candidate, p = packed(scheme, torch.float32)
    x = gaussian(70, K, dtype=torch.float32)
    assert relative_rms(linear(x, p), candidate.reference(x, p)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize(
    ("bits", "group_size", "activation_bits", "parts"),
    [(4, 96, 0, True), (4, 160, 0, True), (6, 256, 0, False), (4, 96, 8, True), (3, 512, 8, True), (8, 64, 8, False)],
)
def test_weights_that_no_scheme_makes(bits, group_size, activation_bits, parts, m):
    """Other groups, other bits with rounded activations, and without minima, row and column scales."""
    n, k, generator = 5, 416, torch.Generator().manual_seed(bits)
    groups = -(-k // group_size)
    data = layout.build(
        kind=Kind.AFFINE,
        bits=bits,
        n=n,
        k=k,
        group_size=group_size,
        activation_bits=activation_bits,
        codes=torch.randint(0, 1 << bits, (n, groups * group_size), generator=generator, dtype=torch.uint8),
        scale=(torch.rand(n, groups, generator=generator) + 0.5).half(),
        minimum=(torch.randn(n, groups, generator=generator) - 0.5 * (1 << bits)).half() if parts else None,
        row_scale=torch.exp2(torch.randint(-8, 0, (n,), generator=generator).float()) if parts else None,
        column_scale=torch.rand(k, generator=generator) + 0.5 if parts else None,
    )
    head, x = data[: layout.HEADER_BYTES], gaussian(m, k)
    want = ops.linear(x.float(), head, None, n)
    assert relative_rms(torch.ops.autoq.linear(x, head, None, n), want) <= TOLERANCE[x.dtype]
    assert torch.equal(register.dequantize(head, n, k), ops.dequantize(head, n, k))


@pytest.mark.parametrize("m", [1, 3, 20])
@every_scheme
def test_the_kernel_that_runs_is_the_one_that_is_named(scheme, m, calls):
    _, p = packed(scheme)
    name = register.kernel_name(p.head, m, torch.bfloat16)
    linear(gaussian(m, K), p)
    if name.startswith("triton.gemv"):
        assert "gemv_rows" in calls
    assert bool(calls) == name.startswith("triton")


@pytest.mark.parametrize(
    ("scheme", "m"),
    [("none", 2), ("int8wo", 1), ("int8dq", 20), ("int4mix(m_switch=8)", 9), ("sinq(bits=3,group_size=64)", 20)],
)
def test_opcheck(scheme, m):
    """The whole buffer stands in for its head: opcheck copies its arguments, and a copied head has no weight."""
    _, p = packed(scheme)
    x, bias = gaussian(m, K).requires_grad_(), gaussian(N, seed=2)
    torch.library.opcheck(torch.ops.autoq.linear.default, (x, p.data, bias, N))
    torch.library.opcheck(torch.ops.autoq.linear.default, (x.detach(), p.data, None, N))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_compiled_graph_runs_every_scheme(backend, calls):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    def multiply(x, head, bias):
        return torch.ops.autoq.linear(torch.relu(x), head, bias, N)

    compiled = torch.compile(multiply, fullgraph=True, backend=counting)
    x, bias = gaussian(3, K), gaussian(N, seed=2)
    for scheme in SCHEMES:
        _, p = packed(scheme)
        before = len(calls)
        got = compiled(x, p.head, bias)
        assert scheme == "none" or len(calls) > before
        assert torch.equal(got, multiply(x, p.head, bias))
    assert len(graphs) == 1


@every_scheme
def test_the_gradient_goes_through_the_dequantized_weight(scheme):
    if scheme == "none":
        return  # differentiated by torch
    candidate, p = packed(scheme)
    x, bias = gaussian(2, 3, K).requires_grad_(), gaussian(N, seed=2).requires_grad_()
    grad = gaussian(2, 3, N, seed=3)
    linear(x, p, bias).backward(grad)
    assert relative_rms(x.grad, grad.double() @ candidate.unpack(p).double()) <= TOLERANCE[x.dtype]
    assert relative_rms(bias.grad, grad.double().sum(dim=(0, 1))) <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("m", [7, 8])
@pytest.mark.parametrize("scheme", ["int8mix(m_switch=8)", "int4mix(m_switch=8,method=sinq,group_size=32)"])
def test_mixes_round_x_from_their_number_of_rows_on(scheme, m, calls):
    candidate, p = packed(scheme)
    x = gaussian(2, m, K)[1]
    assert relative_rms(linear(x, p), candidate.reference(x, p)) <= TOLERANCE[x.dtype]
    assert ("round_rows" in calls) == (m == 8)


def test_wrong_arguments_are_refused():
    _, p = packed("int4wo-hqq(group_size=32)")
    x = gaussian(2, K)
    for wrong in (
        (x[:, :64], p.head, None, N),
        (x, p.head, None, N + 1),
        (x, p.head.clone(), None, N),
        (x, torch.zeros(4096, dtype=torch.uint8)[:128], None, N),
    ):
        with pytest.raises(layout.LayoutError):
            torch.ops.autoq.linear(*wrong)


def test_another_weight_in_reused_memory_is_multiplied_by_its_own_codes():
    x, addresses, reused = gaussian(1, K), set(), 0
    for turn in range(12):
        candidate, p = packed(("int8wo", "int8dq", "int8mix(m_switch=8)")[turn % 3])
        reused += p.data.data_ptr() in addresses
        addresses.add(p.data.data_ptr())
        assert relative_rms(linear(x, p), candidate.reference(x, p)) <= TOLERANCE[x.dtype]
        del p
    assert reused > 0
    assert len(register.weights()) <= 12


def test_importing_and_registering_need_no_gpu():
    code = """
import os, pkgutil
os.environ.pop("TRITON_INTERPRET", None)
import torch, autoq_kernels.triton
for module in pkgutil.iter_modules(autoq_kernels.triton.__path__):
    __import__(f"autoq_kernels.triton.{module.name}")
from autoq_kernels.triton import products, register
from autoq_kernels.triton.library_kernels import INT4PACKED
assert not torch._C._dispatch_has_kernel_for_dispatch_key("autoq::linear", "CUDA")
register.load()
register.load()
assert torch._C._dispatch_has_kernel_for_dispatch_key("autoq::linear", "CUDA")
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
