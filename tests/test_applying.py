import copy
import pickle

import pytest
import torch
from torch import nn

from autoq import candidates
from autoq.applying import apply, plan_of, restore
from autoq.errors import CandidateError, ModelError, PlanError
from autoq.modules import QuantLinear, quantized_layers
from autoq.numerics import relative_rms
from autoq.plan import Plan
from autoq.scheme import Scheme
from autoq.shadow import PackedStore, Shadow

INT8, HQQ = Scheme(name="int8wo"), Scheme.parse("int4wo-hqq(group_size=64)")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Net(nn.Module):
    """An embedding tied to the head, a layer under two names, an attention that reads its projection's weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(80, 64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)
        self.again = self.up
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.head = nn.Linear(64, 80, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.down(self.again(x).relu()))


TOKENS = torch.arange(12).view(2, 6)
PLAN = Plan(
    layers={"up": "int8wo", "down": "int4wo-hqq(group_size=64)", "head": "int8wo"},
    phases={"prefill": 1.0},
    provenance={"seed": 7, "measured": {"loss_delta": 1.0}},
)


def snapshot(model):
    """Everything about a model that ``apply`` may not change on an error."""
    return [(name, id(module), type(module)) for name, module in model.named_modules(remove_duplicate=False)]


def test_apply_replaces_the_planned_layers_and_says_so():
    model = Net().eval()
    expected = {name: model.get_submodule(name) for name in PLAN.layers}
    before = model(TOKENS)
    report = apply(model, PLAN)
    assert report.applied == {"up": INT8, "down": HQQ, "head": INT8}
    assert (report.skipped, report.unmatched, report.missing) == ((), (), ())
    assert {name: layer.scheme for name, layer in quantized_layers(model).items()} == {
        name: str(scheme) for name, scheme in report.applied.items()
    }
    assert model.again is model.up
    for name, linear in expected.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.packed, layer.candidate.pack(linear.weight).data)
        assert layer.bias is linear.bias
    error = (model(TOKENS) - before).norm() / before.norm()
    assert 0 < error < 0.1


def test_the_embedding_tied_to_a_quantized_head_keeps_its_weight():
    model = Net()
    weight, values = model.embed.weight, model.embed.weight.detach().clone()
    apply(model, PLAN)
    assert model.embed.weight is weight
    assert torch.equal(weight, values)
    assert not torch.equal(model.head.weight, values)


def test_differences_between_plan_and_model_are_reported_by_name():
    model = Net()
    plan = Plan(layers={"up": "int8wo", "gone.fc": "int8wo", "attention.out_proj": "int8wo", "down": "none"})
    report = apply(model, plan)
    assert report.applied == {"up": INT8}
    assert report.unmatched == ("gone.fc",)
    assert report.missing == ("head",)
    assert [(one.name, one.scheme, one.reason) for one in report.skipped] == [
        ("attention.out_proj", INT8, "nn.MultiheadAttention reads its weight directly")
    ]
    assert str(report).splitlines() == [
        "1 layers quantized",
        "left alone: attention.out_proj (int8wo): nn.MultiheadAttention reads its weight directly",
        "not in the model: gone.fc",
        "not in the plan: head",
        "as they are: projections of nn.MultiheadAttention, 35.9% of the model's bytes (1 weight)",
        "as they are: linear layers: nn.MultiheadAttention reads its weight directly, "
        "12.0% of the model's bytes (1 weight)",
    ]
    assert type(model.down) is nn.Linear
    assert plan_of(model).layers == {"up": INT8, "attention.out_proj": Scheme(name="none"), "down": Scheme(name="none")}


def test_strict_raises_instead_and_leaves_the_model_alone():
    model = Net()
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"gone is not in the model; down is not in the plan; head is not in the plan"):
        apply(model, Plan(layers={"up": "int8wo", "gone": "int8wo"}), strict=True)
    assert snapshot(model) == before


def test_a_plan_for_another_model_is_an_error():
    with pytest.raises(PlanError, match="another model"):
        apply(Net(), Plan(layers={"encoder.fc": "int8wo"}))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module."])
def test_wrappers_prefixes_are_understood_on_both_sides(prefix):
    plain, wrapped = Net(), torch.compile(nn.DataParallel(Net()))
    plan = Plan(layers={f"{prefix}up": "int8wo", f"{prefix}again": "int8wo"})
    for model in (plain, wrapped):
        assert apply(model, plan).applied == {"up": INT8}
    assert isinstance(wrapped._orig_mod.module.up, QuantLinear)


class Adapted(nn.Module):
    """A layer as PEFT replaces it."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.in_features, self.out_features = layer, layer.in_features, layer.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_an_adapted_model_takes_its_base_models_plan_and_keeps_its_adapters():
    base = Net().eval()
    base.down = Adapted(base.down)
    model = nn.ModuleDict({"base_model": nn.ModuleDict({"model": base})})
    with torch.no_grad():
        before = base(TOKENS)
        report = apply(model, PLAN)
        assert report.applied == {"up": INT8, "down": HQQ, "head": INT8}
        assert report.missing == ()
        assert [(one.name, one.kind) for one in report.others if "lora" in one.kind.lower()] == [
            ("down.lora_A.default.weight", "linear layers: it is a LoRA adapter"),
            ("down.lora_B.default.weight", "linear layers: it is a LoRA adapter"),
        ]
        assert isinstance(base.down.base_layer, QuantLinear)
        assert 0 < difference(base(TOKENS), before) < 0.1
    base.train()
    base(TOKENS).sum().backward()
    assert base.down.lora_B["default"].weight.grad.abs().sum() > 0


def test_two_layers_of_one_name_but_for_a_wrappers_prefix_are_refused():
    model = nn.ModuleDict({"fc": nn.Linear(64, 64), "module": nn.ModuleDict({"fc": nn.Linear(64, 64)})})
    with pytest.raises(ModelError, match=r"fc: a layer's name is its own also without the prefixes of wrappers"):
        apply(model, Plan(layers={"fc": "int8wo"}))


def test_layers_under_an_alias_of_the_plan_keep_no_shapes_of_other_names():
    layers = {"again": {"n": 96, "k": 64}, "down": {"n": 64, "k": 96}}
    plan = Plan(layers={"again": "int8wo", "down": "int8wo"}, provenance={"model": {"class": "Net", "layers": layers}})
    model = Net()
    assert apply(model, plan).applied == {"up": INT8, "down": INT8}
    assert plan_of(model).provenance == {"model": {"class": "Net"}, "edited": True}
    model.down = nn.Linear(96, 64)
    assert plan_of(model).layers == {"up": INT8, "down": Scheme(name="none")}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error_that_names_the_layer(bad):
    model = Net()
    model.down.weight.data[3, 5] = bad
    before = snapshot(model)
    with pytest.raises(CandidateError, match=r"down: every weight is finite"):
        apply(model, PLAN)
    assert snapshot(model) == before


def test_an_unknown_scheme_is_an_error_before_anything_changes():
    model = Net()
    before = snapshot(model)
    with pytest.raises(CandidateError, match="the scheme is one that autoq or an installed plugin has"):
        apply(model, Plan(layers={"up": "int8wo", "down": "int2"}))
    assert snapshot(model) == before


def test_a_layer_the_scheme_refuses_is_skipped_with_its_reason():
    model = nn.ModuleDict({"small": nn.Linear(8, 8), "large": nn.Linear(64, 64)})
    report = apply(model, Plan(layers=dict.fromkeys(model, "int4wo-hqq(group_size=64)")))
    assert report.applied == {"large": HQQ}
    assert [one.name for one in report.skipped] == ["small"]
    assert "8" in report.skipped[0].reason


def test_weights_packed_before_are_used():
    model, candidate = Net(), candidates.parse("int8wo")
    packed = {"up": candidate.pack(torch.ones(96, 64))}
    apply(model, Plan(layers={"up": "int8wo", "down": "int8wo"}), packed=packed)
    assert model.up.packed.data_ptr() == packed["up"].data.data_ptr()
    with pytest.raises(CandidateError, match=r"down: its packed weight has shape \(64, 96\)"):
        apply(Net(), PLAN, packed={"down": candidate.pack(torch.ones(64, 64))})


def test_progress_counts_the_layers():
    seen = []
    apply(Net(), PLAN, progress=lambda *event: seen.append(event))
    assert seen == [("apply", "up", 0, 3), ("apply", "down", 1, 3), ("apply", "head", 2, 3)]


# --- none ------------------------------------------------------------------------------------------------------------

TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}  # relative RMS against the float64 product


def difference(y, wanted):
    return relative_rms(y.detach(), wanted.detach().double())


MIXED = Plan(layers={"up": "none", "down": "int8wo", "head": "none"}, provenance={"measured": {"loss_delta": 1.0}})
HALVES = pytest.mark.parametrize("dtype", TOLERANCE)


@HALVES
@pytest.mark.parametrize("m", [1, 32, 33, 200])
def test_a_none_layer_runs_in_autoqs_kernel_with_the_same_weight(dtype, m):
    model = Net().to(dtype)
    linear, x = model.up, torch.randn(m, 64).to(dtype)
    report = apply(model, MIXED)
    assert report.applied == {"down": INT8}
    assert report.unquantized == ("up", "head")
    assert str(report).splitlines()[:2] == ["1 layers quantized", "2 layers unquantized in autoq's kernels"]
    assert isinstance(model.up, QuantLinear)
    assert torch.equal(model.up.weight, linear.weight)
    assert model.up.bias is linear.bias
    with torch.no_grad():
        exact = x.double() @ linear.weight.double().T + linear.bias.double()
        assert relative_rms(model.up(x), exact) < TOLERANCE[dtype]
        shadow = Shadow(nn.Sequential(linear), PackedStore(nn.Sequential(linear), ["0"]))
        assert torch.equal(shadow.model(x), model.up(x))  # what is measured is what is applied


@HALVES
def test_a_plan_of_none_alone_is_applied_carried_and_restored_bit_by_bit(dtype):
    model = Net().to(dtype).eval()
    before, output = snapshot(model), model(TOKENS)
    plan = Plan(layers=dict.fromkeys(PLAN.layers, "none"), provenance={"measured": {"loss_delta": 0.0}})
    report = apply(model, plan, keep_float=True, strict=True)
    assert (report.applied, report.unquantized) == ({}, ("up", "down", "head"))
    assert difference(model(TOKENS), output) < 3 * TOLERANCE[dtype]
    for carried in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert plan_of(carried) == plan
        assert torch.equal(carried(TOKENS), model(TOKENS))
    assert restore(model) == 3
    assert snapshot(model) == before
    assert torch.equal(model(TOKENS), output)


def test_none_changes_to_a_scheme_and_back():
    model, fresh = Net().bfloat16().eval(), Net().bfloat16().eval()
    fresh.load_state_dict(model.state_dict())
    output = fresh(TOKENS)
    apply(model, MIXED, keep_float=True)
    up, other = model.up, MIXED.replace({"up": "int8wo", "down": "none"})
    assert apply(model, other).unquantized == ("down", "head")
    apply(fresh, other)
    assert model.up is up
    assert torch.equal(model(TOKENS), fresh(TOKENS))
    assert plan_of(model) == plan_of(fresh) == other
    with pytest.raises(ModelError, match="up: a quantized layer changes its scheme"):
        apply(fresh, MIXED)
    restore(model)
    assert torch.equal(model(TOKENS), output)


@pytest.mark.parametrize("kernels", [True, False])
def test_float32_layers_and_those_without_kernels_are_left_alone(monkeypatch, kernels):
    monkeypatch.setattr("autoq.candidates.none.load_cpu_kernels", lambda: kernels)
    model = Net() if kernels else Net().bfloat16()
    before = snapshot(model)
    report = apply(model, Plan(layers=dict.fromkeys(PLAN.layers, "none")))
    assert (report.applied, report.unquantized) == ({}, ())
    assert snapshot(model) == before
    assert plan_of(model) is None


def test_layers_that_cannot_be_replaced_and_plans_without_layers_change_nothing():
    model = Net().bfloat16()
    before = snapshot(model)
    report = apply(model, Plan(layers={"attention.out_proj": "none"}))
    assert (report.unquantized, report.skipped) == ((), ())
    assert apply(model, Plan(layers={}), strict=True).missing == ()
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "convert", [nn.Module.float, nn.Module.half, nn.Module.double], ids=["float", "half", "double"]
)
def test_an_unquantized_weight_is_converted_as_that_of_a_linear_layer(convert):
    model = Net().bfloat16().eval()
    other = copy.deepcopy(model)
    apply(model, MIXED.replace({"down": "none"}), keep_float=True)
    convert(model), convert(other)
    if convert is not nn.Module.double:
        assert difference(model(TOKENS), other(TOKENS)) < 3e-3
        assert torch.equal(model.up.weight, other.up.weight)
        apply(model, MIXED)  # down changes in the new dtype
        assert difference(model(TOKENS), other(TOKENS)) < 2e-2
    restore(model)
    assert torch.equal(model(TOKENS), other(TOKENS))


# --- plan_of ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "carry",
    [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), torch.compile],
    ids=["itself", "deepcopy", "pickle", "compiled"],
)
def test_a_model_carries_its_plan(carry):
    model = Net().eval()
    apply(model, PLAN)
    carried = carry(model)
    assert plan_of(carried) == PLAN
    assert torch.equal(getattr(carried, "_orig_mod", carried)(TOKENS), model(TOKENS))


def test_nothing_is_hung_on_the_users_model():
    model = Net()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    apply(model, PLAN, keep_float=True)
    for name, module in model.named_modules():
        if not isinstance(module, QuantLinear):
            assert set(module.__dict__) == before[name]
    assert not [name for name in model.state_dict() if "original" in name or "plan" in name]
    assert "up.weight" not in dict(model.named_parameters())


def test_a_float_model_carries_no_plan():
    model = Net()
    assert plan_of(model) is None
    apply(model, Plan(layers={"up": "none"}))
    assert plan_of(model) is None


def test_a_changed_model_carries_a_changed_plan_without_its_measured_figures():
    model = Net()
    apply(model, PLAN)
    model.down = nn.Linear(96, 64)
    plan = plan_of(model)
    assert plan.layers == PLAN.layers | {"down": Scheme(name="none")}
    assert plan.provenance == {"seed": 7, "edited": True}
    assert plan.phases == PLAN.phases


# --- restore and a second plan ----------------------------------------------------------------------------------------


def test_restore_brings_back_the_same_layers():
    model = Net().eval()
    before, output = snapshot(model), model(TOKENS)
    apply(model, PLAN, keep_float=True)
    assert snapshot(model) != before
    assert restore(model) == 3
    assert snapshot(model) == before
    assert torch.equal(model(TOKENS), output)
    assert model.head.weight is model.embed.weight
    assert restore(model) == 0


def test_restore_after_a_copy_and_a_conversion():
    model = Net().eval()
    apply(model, PLAN, keep_float=True)
    other = copy.deepcopy(model).bfloat16()
    restore(other)
    restore(model)
    model.bfloat16()
    assert other.head.weight is other.embed.weight
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_restore_without_float_weights_is_an_error():
    model = Net()
    apply(model, PLAN)
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"up: restore\(\) needs the float weights; got 3 of 3"):
        restore(model)
    assert snapshot(model) == before


def test_a_second_plan_needs_the_float_weights():
    model = Net()
    apply(model, PLAN)
    other = PLAN.replace({"down": "int8wo"})
    with pytest.raises(ModelError, match="down: a quantized layer changes its scheme"):
        apply(model, other)
    assert plan_of(model) == PLAN
    assert apply(model, PLAN).applied == PLAN.layers


def test_a_second_plan_on_kept_float_weights_equals_a_first_one():
    model, fresh = Net().eval(), Net().eval()
    fresh.load_state_dict(model.state_dict())
    apply(model, PLAN, keep_float=True)
    up = model.up
    other = Plan(layers={"up": "sinq(bits=4,group_size=64)", "down": "none", "head": "int8wo"})
    apply(model, other)
    apply(fresh, other)
    assert model.up is up
    assert type(model.down) is nn.Linear
    assert torch.equal(model(TOKENS), fresh(TOKENS))
    assert plan_of(model) == plan_of(fresh) == other


def test_weights_made_in_inference_mode_can_be_applied_and_trained_through():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        apply(model, Plan(layers={"0": "int8wo"}))
    x = torch.randn(2, 64, requires_grad=True)
    model(x).sum().backward()
    assert torch.allclose(x.grad, model[0].weight.sum(dim=0).expand(2, -1), atol=1e-5)
