import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations, prune

from autoq import candidates
from autoq.errors import CheckpointError, ModelError
from autoq.modules import (
    QuantLinear,
    evaluating,
    find_linears,
    quantized_layers,
    replace_module,
    unwrap,
)
from autoq.other_weights import other_weights
from autoq.sections import assemble
from autoq_kernels import layout

SCHEMES = (
    "none",
    "int8wo",
    "int8dq",
    "int4wo-hqq(group_size=64)",
    "sinq(bits=3,group_size=64)",
    "fp6(format=e3m2)",
    "fp6(format=e2m3)",
)


def quantize(linear, scheme="int8wo", **options):
    candidate = candidates.parse(scheme)
    return QuantLinear(
        candidate,
        candidate.pack(linear.weight),
        linear.bias,
        linear.in_features,
        linear.out_features,
        dtype=linear.weight.dtype,
        **options,
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- finding ---------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.block = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.again = self.block[0]
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.block(self.embed(tokens)))


def test_linears_are_listed_once_in_definition_order_with_aliases_and_ties():
    sites = find_linears(Tied())
    assert [site.name for site in sites] == ["block.0", "block.2", "head"]
    assert [site.aliases for site in sites] == [("again",), (), ()]
    assert [site.tied_to for site in sites] == [None, None, "embed.weight"]
    assert [site.reason for site in sites] == [None, None, None]


def test_wrappers_are_looked_through_and_leave_no_prefix():
    model = Tied()
    compiled = torch.compile(nn.DataParallel(model))
    assert unwrap(compiled) is model
    assert [site.name for site in find_linears(compiled)] == ["block.0", "block.2", "head"]
    inner = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(8, 8))), nn.Linear(8, 8))
    assert [site.name for site in find_linears(inner)] == ["0.0", "1"]


class OwnForward(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


class SameForward(nn.Linear):
    pass


def _weight_norm_with_hook(linear):
    return torch.nn.utils.weight_norm(linear)


def _offloaded(linear):
    linear.to("meta")
    linear._hf_hook = object()
    return linear


def _replaced_forward(linear):
    linear.forward = lambda x: x
    return linear


def _integer(linear):
    linear.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return linear


def _sharded(linear):
    linear.weight = nn.Parameter(torch.zeros(0))
    return linear


class Subclass(torch.Tensor):
    pass


def _tensor_subclass(linear):
    linear.weight = nn.Parameter(torch.zeros(8, 8).as_subclass(Subclass))
    return linear


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (parametrizations.weight_norm, "its weight is parametrized"),
        (lambda one: prune.l1_unstructured(one, "weight", 0.5), "its weight is computed from other parameters"),
        (lambda one: one.to("meta"), "its weight is on the meta device"),
        (lambda one: one.double(), "its weight is float64"),
        (_offloaded, "its weight is offloaded"),
        (_replaced_forward, "its forward is replaced on the instance"),
        (_integer, "its weight is int8"),
        (_sharded, "its weight has shape [0]"),
        (_tensor_subclass, "its weight is a Subclass, not a plain parameter"),
        (lambda one: OwnForward(8, 8), "OwnForward is a subclass of nn.Linear with its own forward"),
        (lambda one: SameForward(8, 8), None),
    ],
    ids=[
        "parametrized",
        "pruned",
        "meta",
        "float64",
        "offloaded",
        "forward",
        "int8",
        "sharded",
        "subclass",
        "own",
        "ok",
    ],
)
def test_layers_that_cannot_be_replaced_are_left_alone_with_the_reason(change, reason):
    (site,) = find_linears(nn.Sequential(change(nn.Linear(8, 8))))
    assert (site.reason is None) if reason is None else site.reason.startswith(reason)


def test_old_style_weight_norm_is_left_alone():
    with pytest.warns(FutureWarning):
        layer = torch.nn.utils.weight_norm(nn.Linear(8, 8))
    assert find_linears(layer)[0].reason.startswith("its weight is computed")


def test_fsdp_is_recognised_by_name():
    class FullyShardedDataParallel(nn.Sequential):
        pass

    sites = find_linears(nn.Sequential(FullyShardedDataParallel(nn.Linear(8, 8)), nn.Linear(8, 8)))
    assert [site.reason for site in sites] == ["its weight is sharded by FullyShardedDataParallel", None]


def test_the_output_projection_of_multihead_attention_is_left_alone():
    (site,) = find_linears(nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4)}))
    assert (site.name, site.reason) == ("attention.out_proj", "nn.MultiheadAttention reads its weight directly")


def test_filter_fn_gets_name_and_module():
    model = Tied()
    seen = []
    sites = find_linears(model, lambda name, module: seen.append((name, module)) or name != "head")
    assert [name for name, _ in seen] == ["block.0", "block.2", "head"]
    assert seen[2][1] is model.head
    assert sites[2].reason == "left alone by filter_fn"


def test_other_weights_are_named_with_their_share_of_bytes():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(3, 10, 10))

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(10, 10))
            self.token = nn.Parameter(torch.zeros(1, 1, 5))  # a vector

    convolution, double = nn.Conv1d(5, 5, 3, bias=False), nn.Linear(5, 5, bias=False).double()
    parts = {"r": Router(), "e": Experts(), "c": convolution, "d": double, "l": nn.Linear(10, 60, bias=False)}
    model = nn.ModuleDict(parts)
    total = 400 + 20 + 1200 + 300 + 200 + 2400
    found = other_weights(model, {"l": "never called"})
    assert [(one.name, one.kind, one.size_bytes, one.share) for one in found] == [
        ("l.weight", "linear layers: never called", 2400, 2400 / total),
        ("e.gate_up_proj", "experts (3-D parameters)", 1200, 1200 / total),
        ("r.weight", "parameters of other modules", 400, 400 / total),
        ("c.weight", "convolutions", 300, 300 / total),
        ("d.weight", "linear layers: its weight is float64", 200, 200 / total),
    ]


def test_replacing_keeps_hooks_mode_and_every_name():
    model = Tied().eval()
    calls = []
    handle = model.block[0].register_forward_hook(lambda *_: calls.append(1))
    new = quantize(model.block[0])
    replace_module(model, "again", new)
    assert model.block[0] is new
    assert model.again is new
    assert not new.training
    model(torch.zeros(1, 2, dtype=torch.long))
    assert calls == [1]
    handle.remove()
    model(torch.zeros(1, 2, dtype=torch.long))
    assert calls == [1]
    assert quantized_layers(model) == {"block.0": new}


def test_evaluating_restores_each_modules_own_mode():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        _ = 1 / int(model[0].training)
    assert [one.training for one in (model, *model)] == [True, True, False]


# --- the quantized layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_is_the_candidates_product(scheme):
    linear = nn.Linear(96, 40)
    layer = quantize(linear, scheme)
    x = torch.randn(2, 3, 96)
    reference = layer.candidate.reference(x, candidates.Packed(layer.packed), linear.bias).float()
    error = (layer(x) - reference).norm() / reference.norm()
    assert error < 1e-5
    assert layer(x[0, 0]).shape == (40,)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_round_trips_bit_equal(scheme):
    layer = quantize(nn.Linear(96, 40).bfloat16(), scheme)
    state = layer.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert {"bias", "weight_header", "weight_scheme"} < set(state)
    assert "weight" not in state
    assert "packed" not in state
    assert "head" not in state
    other = quantize(nn.Linear(96, 40).bfloat16(), "int8wo")
    other.load_state_dict({name: value.clone() for name, value in state.items()})
    assert torch.equal(other.packed, layer.packed)
    assert torch.equal(other.bias, layer.bias)
    assert other.candidate == layer.candidate
    x = torch.randn(2, 96).bfloat16()
    assert torch.equal(other(x), layer(x))


def test_loading_reports_missing_unexpected_and_wrong_sections():
    layer = quantize(nn.Linear(64, 32))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_header"):
        layer.load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match="sections"):
        layer.load_state_dict({name: value for name, value in state.items() if name != "weight_scale"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(state | {"other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"shape \[32, 64\]"):
        layer.load_state_dict(quantize(nn.Linear(32, 32)).state_dict())
    assert layer.scheme == "int8wo"


@pytest.mark.parametrize("field", range(16))
@pytest.mark.parametrize("value", [-1, 3, 2**62])
def test_a_forged_header_is_refused(field, value):
    layer = quantize(nn.Linear(64, 32), "sinq(bits=4,group_size=32)")
    sections = {name: one.clone() for name, one in layer.sections().items()}
    sections["weight_header"].view(torch.int64)[field] = value
    with pytest.raises(CheckpointError):
        assemble(sections, where="fc")


def test_conversions_of_dtype_leave_the_codes_alone():
    layer = quantize(nn.Linear(64, 32))
    before = layer.packed.clone()
    for convert in (layer.half, layer.bfloat16, layer.double, layer.float, lambda: layer.type(torch.float16)):
        convert()
        assert torch.equal(layer.packed, before)
        assert layer.bias.dtype == layer.weight.dtype == layer.dtype
        assert layer.head.untyped_storage().data_ptr() == layer.packed.untyped_storage().data_ptr()
    assert layer.dtype == torch.float16


def test_to_empty_is_refused_until_a_state_is_loaded():
    layer = quantize(nn.Linear(64, 32))
    state, x = {name: value.clone() for name, value in layer.state_dict().items()}, torch.randn(2, 64)
    y = layer(x)
    layer.to("meta")
    assert layer.head.is_meta
    assert layer(x.to("meta")).shape == (2, 32)
    layer.to_empty(device="cpu")
    with pytest.raises((RuntimeError, ValueError), match="packed weight"):
        layer(x)
    layer.load_state_dict(state)
    assert torch.equal(layer(x), y)


def test_a_state_loads_into_a_layer_on_the_meta_device_with_assign():
    layer = quantize(nn.Linear(64, 32))
    empty = copy.deepcopy(layer).to("meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 64)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "share_memory"])
def test_a_copys_head_is_a_view_of_its_own_buffer(how):
    layer = nn.Sequential(quantize(nn.Linear(64, 32), "int4wo-hqq(group_size=64)"))
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(layer).share_memory()
    mine, theirs = layer[0], other[0]
    assert theirs.head.data_ptr() == theirs.packed.data_ptr() != mine.packed.data_ptr()
    assert theirs.head.untyped_storage().nbytes() >= theirs.packed.nbytes
    assert torch.equal(theirs.packed, mine.packed)
    x = torch.randn(3, 64)
    before = mine(x)
    theirs.packed.zero_()
    assert torch.equal(mine(x), before)


@pytest.mark.parametrize("scheme", ["int8wo", "int8dq", "sinq(bits=4,group_size=64)"])
def test_the_inputs_gradient_is_that_of_the_dequantized_weight(scheme):
    layer = quantize(nn.Linear(64, 32), scheme)
    x = torch.randn(5, 64, requires_grad=True)
    grad = torch.randn(5, 32)
    layer(x).backward(grad)
    expected = grad @ layer.weight
    assert (x.grad - expected).norm() / expected.norm() < 1e-5
    assert torch.allclose(layer.bias.grad, grad.sum(dim=0), atol=1e-5)


def test_weight_is_the_dequantized_weight_and_no_parameter():
    linear = nn.Linear(64, 32).bfloat16()
    layer = quantize(linear)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, layer.candidate.unpack(candidates.Packed(layer.packed)).bfloat16())
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert layer.bias is linear.bias


def test_its_repr_has_shape_and_scheme():
    layer = quantize(nn.Linear(64, 32, bias=False), "int4wo-hqq(group_size=64)")
    text = "QuantLinear(in_features=64, out_features=32, bias=False, scheme=int4wo-hqq(group_size=64))"
    assert repr(layer) == text


def test_a_packed_weight_of_another_shape_is_refused():
    layer, candidate = quantize(nn.Linear(64, 32)), candidates.parse("int8wo")
    with pytest.raises(ModelError, match=r"shape \[32, 64\]"):
        layer.set_packed(candidate.pack(torch.randn(16, 64)), candidate)


def test_head_is_no_autograd_view():
    layer = quantize(nn.Linear(64, 32))
    assert layer.head._base is None
    assert layer.head.shape == (layout.HEADER_BYTES,)


def test_one_compiled_graph_serves_every_scheme():
    linears = [nn.Linear(96, 96) for _ in range(2)]
    model = nn.Sequential(*(quantize(one, "none") for one in linears)).eval()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(4, 96)
    recompiles = dict(counters["recompile_limit"])
    with torch.no_grad():
        for scheme in SCHEMES:
            for linear, layer in zip(linears, model, strict=True):
                candidate = candidates.parse(scheme)
                layer.set_packed(candidate.pack(linear.weight), candidate)
            assert torch.equal(compiled(x), model(x)), scheme
    assert len(graphs) == 1
    assert dict(counters["recompile_limit"]) == recompiles
