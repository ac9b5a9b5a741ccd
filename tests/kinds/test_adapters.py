import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

import autoq
from autoq.errors import ModelError
from autoq.modules import find_linears, quantized_layers

peft = pytest.importorskip("peft")

PLAN = autoq.Plan(layers={"up": "int8wo", "down": "int8wo"})


def adapted(**settings):
    torch.manual_seed(0)
    layers = {"up": nn.Linear(64, 96), "act": nn.ReLU(), "down": nn.Linear(96, 64), "head": nn.Linear(64, 32)}
    config = peft.LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False, **settings)
    return peft.get_peft_model(nn.Sequential(OrderedDict(layers)), config).eval()


@pytest.fixture
def x():
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "checked": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter(),
}


@pytest.mark.parametrize("how", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merging_into_a_packed_weight_is_refused(x, settings, merge, how):
    """PEFT would write to a dequantized copy and throw the adapter away."""
    model = adapted(**settings)
    autoq.apply(model, PLAN, keep_float=True)
    model = how(model)
    before = model(x)
    with pytest.raises(ModelError, match=r"merged before its layer is quantized.*merge_and_unload\) into the float"):
        merge(model)
    assert torch.equal(model(x), before)


def test_a_loaded_model_refuses_it_too(tmp_path):
    model = adapted()
    autoq.apply(model, PLAN)
    autoq.save_quantized(model, tmp_path / "saved")
    with pytest.raises(ModelError, match="merged before its layer is quantized"):
        autoq.load_quantized(adapted, tmp_path / "saved").merge_and_unload()


def test_what_was_merged_before_is_not_taken_out_again():
    model = adapted()
    model.merge_adapter()
    autoq.apply(model, PLAN)
    with pytest.raises(ModelError, match=r"got sub_ on a dequantized copy"):
        model.unmerge_adapter()


def test_a_restored_model_is_merged(x):
    model, other = adapted(), adapted().merge_and_unload()
    autoq.apply(model, PLAN, keep_float=True)
    autoq.restore(model)
    assert torch.equal(model.merge_and_unload()(x), other(x))


def test_unloading_gives_the_quantized_base_model(x):
    model = adapted()
    autoq.apply(model, PLAN)
    with model.disable_adapter():
        without = model(x)
    assert torch.equal(model.unload()(x), without)


def test_the_weight_under_an_adapter_can_be_read(x):
    model = adapted()
    autoq.apply(model, PLAN)
    weight = quantized_layers(model)["up"].weight
    for made in (
        weight + 0,
        weight.detach(),
        weight.clone(),
        copy.deepcopy(weight),
        pickle.loads(pickle.dumps(weight)),
    ):
        assert type(made) is torch.Tensor
        assert torch.equal(made, weight)
    (weight.data.clone() + 1).zero_()
    for write in (
        lambda: weight.copy_(made),
        lambda: weight.data.mul_(2),
        lambda: weight.__setitem__(0, 1),
        lambda: torch.add(made, 1, out=weight),
        lambda: nn.init.zeros_(weight),
        lambda: setattr(weight, "data", made),
    ):
        with pytest.raises(ModelError, match="the packed weight cannot be added to"):
            write()
    assert torch.equal(weight, made)
    compiled = torch.compile(lambda x: x @ model.base_model.model.up.weight.t(), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), x @ made.t())


def test_what_peft_trains_in_full_is_left_alone(x):
    model = adapted(modules_to_save=["head"])
    reasons = {site.name: site.reason for site in find_linears(model)}
    assert reasons["head.modules_to_save.default"] == "PEFT trains it (modules_to_save)"
    plan = autoq.Plan(layers=dict(PLAN.layers) | {"head.modules_to_save.default": "int8wo"})
    report = autoq.apply(model, plan)
    assert [one.name for one in report.skipped] == ["head.modules_to_save.default"]
    model(x).sum().backward()
    assert model.base_model.model.head.modules_to_save.default.weight.grad is not None
