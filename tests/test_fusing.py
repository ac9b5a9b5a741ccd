"""Fused siblings: the same numbers and the same files as unfused ones, in one product, however they are called."""

import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import autoq
from autoq.errors import InputError, ModelError
from autoq.fused import FusedPart
from autoq.modules import QuantLinear, quantized_layers

K, Q, V = 96, 72, 40  # none a multiple of a kernel's tile
SCHEMES = [
    "none",
    "int8wo",
    "int8dq",
    "int8mix(m_switch=16)",
    "int4wo-hqq(group_size=32)",
    "int4dq(group_size=64)",
    "fp6",
    "sinq(bits=5,group_size=64)",
]
LINEAR = torch.ops.autoq.linear


class Attention(nn.Module):
    """Calls its layers as models do; ``order`` says how."""

    def __init__(self, bias):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(K, Q, bias), nn.Linear(K, V, bias), nn.Linear(K, V, bias)
        self.o = nn.Linear(V, K, bias)

    def forward(self, x):
        x = torch.nn.functional.rms_norm(x, (K,))
        return self.o(self.k(x) * self.v(x)) + self.q(x).mean(dim=-1, keepdim=True)


class Net(nn.Module):
    def __init__(self, bias=True, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(Attention(bias) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def tuned(scheme="int8wo", dtype=torch.float32, bias=True, **options):
    torch.manual_seed(0)
    model = Net(bias).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    autoq.apply(
        model,
        autoq.Plan(layers={name: scheme for name, one in model.named_modules() if isinstance(one, nn.Linear)}),
        **options,
    )
    return model


def inputs(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.fixture
def pair():
    """An unfused and a fused model of the same weights."""

    def make(*arguments, **options):
        model = tuned(*arguments, **options)
        fused = copy.deepcopy(model)
        report = autoq.fuse(fused, inputs(1))
        return model, fused, report

    return make


@pytest.fixture
def products(monkeypatch):
    """Rows of the weights of the products that are computed."""
    seen = []
    real = torch.ops.autoq.linear

    def counted(x, head, bias, n):
        seen.append(n)
        return real(x, head, bias, n)

    monkeypatch.setattr(torch.ops.autoq, "linear", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", [one for one in SCHEMES if not one.startswith("sinq")])
def test_outputs_are_bit_equal(pair, scheme, bias, dtype):
    if scheme == "none" and dtype == torch.float32:
        pytest.skip("stays nn.Linear")
    model, fused, report = pair(scheme, dtype, bias)
    assert report.fused == tuple((f"layers.{i}.q", f"layers.{i}.k", f"layers.{i}.v") for i in range(2))
    assert not report.left
    attention, whole = model.layers[0], fused.layers[0]
    for m in (*range(1, 10), 64):
        x = inputs(m, dtype=dtype, seed=m)
        with torch.no_grad():
            for name in ("q", "k", "v"):
                assert torch.equal(getattr(whole, name)(x), getattr(attention, name)(x)), (m, name)


def test_layers_with_column_scales_of_their_own_stay(pair):
    _, fused, report = pair("sinq(bits=5,group_size=64)")
    assert report.fused == ()
    assert set(report.left.values()) == {"each has column scales of its own"}
    assert "each has column scales of its own" in str(report)
    assert not [one for one in fused.modules() if isinstance(one, FusedPart)]


def test_siblings_of_other_schemes_stay():
    torch.manual_seed(0)
    model = Net().eval()
    schemes = {"layers.0.q": "int8wo", "layers.0.v": "int8wo", "layers.0.k": "fp6", "layers.1.q": "fp6"}
    autoq.apply(model, autoq.Plan(layers=schemes))
    report = autoq.fuse(model, inputs(1))
    assert report.fused == (("layers.0.q", "layers.0.v"),)
    assert report.left == {("layers.0.k",): "none of its siblings has its scheme, dtype and bias"}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_one_product_serves_all_siblings(pair, products, mode):
    model, fused, _ = pair()
    with mode():
        wanted, found = model(inputs(3)), None
        products.clear()
        found = fused(inputs(3))
    assert torch.equal(found, wanted)
    assert products == [Q + 2 * V, K] * 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_order_of_calls_gives_the_right_numbers(pair, mode):
    model, fused, _ = pair()
    alone, whole = model.layers[0], fused.layers[0]
    with mode():
        x, other = inputs(4), inputs(4, seed=2)
        for name, given in [
            ("v", x), ("q", other), ("k", x), ("k", x), ("v", other), ("q", x), ("q", x), ("k", other), ("v", x),
        ]:  # fmt: skip
            assert torch.equal(getattr(whole, name)(given), getattr(alone, name)(given))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_in_place_is_noticed(pair, mode):
    model, fused, _ = pair()
    with mode():
        x = inputs(4)
        fused.layers[0].q(x)
        x.mul_(2)
        assert torch.equal(fused.layers[0].k(x), model.layers[0].k(x))
        fused.layers[0].q(x).zero_()  # a view of the product: only its own part
        assert torch.equal(fused.layers[0].v(x), model.layers[0].v(x))
        assert torch.equal(fused.layers[0].q(x), model.layers[0].q(x))


def test_nothing_is_kept_after_the_last_sibling(pair):
    _, fused, _ = pair()
    x = inputs(4)
    with torch.no_grad():
        for name in "kqv":
            getattr(fused.layers[0], name)(x)
    assert all(one is None for one in vars(x).values())


def test_a_product_without_gradient_is_not_taken_where_one_is_wanted(pair):
    _, fused, _ = pair()
    x = inputs(4).requires_grad_() * 1
    with torch.no_grad():
        fused.layers[0].q(x)
    assert fused.layers[0].k(x).requires_grad


def test_autocast_between_siblings_is_noticed(pair):
    model, fused, _ = pair()
    x = inputs(4)
    with torch.no_grad():
        assert fused.layers[0].q(x).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(fused.layers[0].k(x), model.layers[0].k(x))


def test_gradients_are_those_of_separate_layers(pair):
    model, fused, _ = pair()
    found = []
    for one in (model, fused):
        for leaf in (True, False):
            x = inputs(4).requires_grad_()
            one.zero_grad()
            one(x if leaf else x * 1).square().sum().backward()
            found.append((x.grad, one.layers[1].k.bias.grad, one.layers[0].q.bias.grad))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b)


def nodes(graph):
    return sum(node.target in (LINEAR, LINEAR.default) for node in graph.nodes)


@pytest.mark.parametrize("bias", [True, False])
def test_a_compiled_graph_has_one_product_a_group(pair, bias):
    model, fused, _ = pair(bias=bias)
    counts = []

    def backend(graph, _):
        counts.append(nodes(graph.graph))
        return graph.forward

    compiled = torch.compile(fused, backend=backend, fullgraph=True)
    with torch.no_grad():
        for m in (3, 3, 3):
            assert torch.equal(compiled(inputs(m)), model(inputs(m)))
        autoq.unfuse(fused)
        compiled(inputs(3))
    assert counts == [4, 8]


def test_siblings_at_a_graphs_own_input_are_one_product_too(pair):
    model, fused, _ = pair()
    counts = []

    def backend(graph, _):
        counts.append(nodes(graph.graph))
        return graph.forward

    def call(one, x):
        return one.q(x), one.k(x), one.v(x)

    compiled = torch.compile(lambda x: call(fused.layers[0], x), backend=backend, fullgraph=True)
    with torch.no_grad():
        for seed in range(3):
            x = inputs(2, seed=seed)
            assert all(map(torch.equal, compiled(x), call(model.layers[0], x)))
            assert all(one is None for one in vars(x).values())
    assert counts == [1]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_by_inductor(pair, mode):
    model, fused, _ = pair("int4wo-hqq(group_size=32)", torch.bfloat16)
    plain, compiled = torch.compile(model, fullgraph=True), torch.compile(fused, fullgraph=True)
    with mode():
        for _ in range(2):
            x = inputs(2, dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x), plain(x))


def test_compiled_training(pair):
    model, fused, _ = pair()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    found = []
    for one in (model, compiled):
        x = inputs(4).requires_grad_()
        one(x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_export(pair):
    model, fused, _ = pair()
    with torch.no_grad():
        program = torch.export.export(fused, (inputs(3),))
        assert nodes(program.graph) == 4
        assert torch.equal(program.module()(inputs(3)), model(inputs(3)))


def test_threads_do_not_meet(pair):
    model, fused, _ = pair()
    xs = [inputs(2, seed=seed) for seed in range(2)]
    with torch.no_grad():
        wanted = [model(x) for x in xs]
    barrier = threading.Barrier(2)

    def work(number):
        barrier.wait()
        with torch.no_grad():
            return [fused(xs[number]) for _ in range(50)]

    with ThreadPoolExecutor(2) as pool:
        for number, outputs in enumerate(pool.map(work, range(2))):
            assert all(torch.equal(one, wanted[number]) for one in outputs)


def test_threads_may_share_an_activation(pair):
    model, fused, _ = pair()
    x = inputs(2)
    names = ["q", "k", "v"] * 30
    with torch.no_grad():
        wanted = {name: getattr(model.layers[0], name)(x) for name in "qkv"}

    def work(shift):
        with torch.no_grad():
            return [(name, getattr(fused.layers[0], name)(x)) for name in names[shift:]]

    with ThreadPoolExecutor(2) as pool:
        for outputs in pool.map(work, range(2)):
            assert all(torch.equal(y, wanted[name]) for name, y in outputs)


def same_states(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("scheme", ["int8wo", "int4wo-hqq(group_size=32)", "int4dq(group_size=64)", "fp6"])
def test_state_dicts_are_the_same(pair, scheme):
    model, fused, _ = pair(scheme)
    assert same_states(model, fused)
    other = tuned(scheme)
    with torch.no_grad():
        for layer in quantized_layers(other).values():
            layer.bias.zero_()
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(inputs(2)), model(inputs(2)))


def test_another_state_is_loaded_into_fused_layers(pair):
    model, fused, _ = pair()
    torch.manual_seed(5)
    other = Net().eval()
    autoq.apply(other, autoq.plan_of(model))
    with torch.no_grad():
        before = fused(inputs(2))
        fused.load_state_dict(other.state_dict())
        assert not torch.equal(fused(inputs(2)), before)
        assert torch.equal(fused(inputs(2)), other(inputs(2)))
    with pytest.raises(RuntimeError, match="unfuse"):
        fused.load_state_dict(tuned("fp6").state_dict())


def test_checkpoints_are_the_same(pair, tmp_path):
    model, fused, _ = pair()
    assert autoq.plan_of(fused) == autoq.plan_of(model)
    for name, one in (("model", model), ("fused", fused)):
        autoq.save_quantized(one, tmp_path / name)
    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "fused")]
    assert contents[0] == contents[1]
    loaded = autoq.load_quantized(Net, tmp_path / "fused")
    assert torch.equal(loaded(inputs(2)), fused(inputs(2)))


def test_unfuse_is_exact(pair):
    model, fused, report = pair("int4wo-hqq(group_size=32)")
    assert autoq.unfuse(fused) == 6
    for name, layer in quantized_layers(fused).items():
        assert type(layer) is QuantLinear
        assert torch.equal(layer.packed, model.get_submodule(name).packed)
        assert torch.equal(layer.bias, model.get_submodule(name).bias)
    assert autoq.unfuse(fused) == 0
    assert autoq.fuse(fused, inputs(1)) == report


def test_fused_twice_is_fused_once(pair):
    _, fused, _ = pair()
    assert autoq.fuse(fused, inputs(1)).fused == ()


def test_the_separate_weights_are_gone(pair):
    model, fused, _ = pair(bias=False)

    def size(one):
        return sum(buffer.untyped_storage().nbytes() for name, buffer in one.named_buffers() if "packed" in name)

    assert size(fused) < size(model)
    assert len([name for name, _ in fused.named_buffers() if "packed" in name]) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: torch.load(saved(one), weights_only=False)])
def test_copies_are_whole_and_apart(pair, copied):
    model, fused, _ = pair()
    other = copied(fused)
    assert torch.equal(other(inputs(2)), model(inputs(2)))
    parts = [one for one in other.modules() if isinstance(one, FusedPart)]
    assert len({id(one._shared[0]) for one in parts}) == 2
    assert parts[0].fused.packed.data_ptr() != fused.layers[0].q.fused.packed.data_ptr()
    assert same_states(other, model)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_conversions_of_dtype(pair):
    model, fused, _ = pair()
    model, fused = model.bfloat16(), fused.bfloat16()
    x = inputs(2, dtype=torch.bfloat16)
    assert torch.equal(fused(x), model(x))
    assert fused.layers[0].q.weight.dtype == torch.bfloat16
    assert torch.equal(fused.layers[0].k.weight, model.layers[0].k.weight)


def test_restore_and_other_plans():
    model = tuned(keep_float=True)
    autoq.fuse(model, inputs(1))
    with pytest.raises(ModelError, match="unfuse"):
        autoq.apply(model, autoq.Plan(layers={"layers.0.q": "fp6"}))
    autoq.apply(model, autoq.plan_of(model))  # changes nothing
    assert autoq.restore(model) == 8
    assert torch.equal(model.layers[0].q.weight, restored().layers[0].q.weight)


def restored():
    model = tuned(keep_float=True)
    autoq.restore(model)
    return model


def test_hooks_move_along(pair):
    model, _, _ = pair()
    seen = []
    model.layers[0].k.register_forward_hook(lambda *_: seen.append("k"))
    autoq.fuse(model, inputs(1))
    model(inputs(1))
    autoq.unfuse(model)
    model(inputs(1))
    assert seen == ["k", "k", "k"]  # once in the run of fuse itself


def test_groups_by_name():
    model = tuned()
    autoq.fuse(model, groups=[["layers.0.q", "layers.0.v"]])
    assert isinstance(model.layers[0].q, FusedPart)
    assert type(model.layers[0].k) is QuantLinear
    assert torch.equal(model(inputs(2)), tuned()(inputs(2)))
    for groups in (
        [["layers.1.q"]],
        [["layers.1.q", "layers.0.k"]],
        [["layers.1.q", "layers.1.x"]],
        [["layers.1.q", "layers.1.o"]],
        [["layers.0.q", "layers.0.k"]],
        [["layers.1.q", "layers.1.k"], ["layers.1.q", "layers.1.v"]],
    ):
        with pytest.raises(ModelError):
            autoq.fuse(model, groups=groups)


def test_refusals():
    with pytest.raises(ModelError, match="quantized layers"):
        autoq.fuse(Net(), inputs(1))
    with pytest.raises(InputError, match="batch"):
        autoq.fuse(tuned())
    with pytest.raises(InputError, match="both"):
        autoq.fuse(tuned(), inputs(1), groups=[])


def test_layers_called_with_equal_but_other_tensors_are_no_siblings():
    class Copies(Attention):
        def forward(self, x):
            return self.o(self.k(x.clone()) * self.v(x)) + self.q(x * 1).mean(dim=-1, keepdim=True)

    model = Copies(bias=True).eval()
    autoq.apply(model, autoq.Plan(layers=dict.fromkeys("qkvo", "int8wo")))
    assert autoq.fuse(model, inputs(1)).fused == ()


def test_layers_between_whose_calls_the_tensor_changes_are_no_siblings():
    class Changes(Attention):
        def forward(self, x):
            x = x * 1
            q = self.q(x)
            x.add_(1)
            return self.o(self.k(x) * self.v(x)) + q.mean(dim=-1, keepdim=True)

    model = Changes(bias=True).eval()
    autoq.apply(model, autoq.Plan(layers=dict.fromkeys("qkvo", "int8wo")))
    assert autoq.fuse(model, inputs(1)).fused == (("k", "v"),)
