"""Copies, pickles, states, and conversions of a tuned model."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import autoq
from autoq.errors import InputError
from autoq.modules import quantized_layers


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": through_a_file}


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_copy_is_a_model_of_its_own(tuned, x, plan, how):
    model = tuned(keep_float=True)
    with torch.no_grad():
        wanted = model(x)
        other = how(model)
        assert torch.equal(other(x), wanted)
        assert autoq.plan_of(other) == plan
        autoq.restore(other)
        assert quantized_layers(other) == {}
        assert torch.equal(model(x), wanted)


def test_a_state_goes_into_a_model_of_another_plan_and_takes_its_schemes_along(net, tuned, plan, x):
    model, other = tuned(), net()
    autoq.apply(other, plan.replace(dict.fromkeys(plan.layers, "int8wo")))
    assert other.load_state_dict(model.state_dict()) == ([], [])
    assert autoq.plan_of(other).layers == plan.layers
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


def test_a_saved_state_is_tensors_alone(tuned, x):
    model, file = tuned(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    empty = copy.deepcopy(model).to("meta")
    assert empty.load_state_dict(state, assign=True) == ([], [])
    with torch.no_grad():
        assert torch.equal(empty(x), model(x))


@pytest.mark.parametrize("strict", [True, False])
def test_a_float_state_is_refused_by_a_quantized_model(net, tuned, x, strict):
    model = tuned()
    with torch.no_grad():
        wanted = model(x)
        with pytest.raises(
            RuntimeError, match="down: a float weight cannot be loaded into a layer quantized as int8dq"
        ):
            model.load_state_dict(net().state_dict(), strict=strict)
        assert torch.equal(model(x), wanted)


def test_a_quantized_state_is_refused_by_a_float_model(net, tuned):
    with pytest.raises(RuntimeError, match=r'Missing key.*"up.weight"[^$]*Unexpected key.*"up.weight_header"'):
        net().load_state_dict(tuned().state_dict())


def test_an_unquantized_weight_is_converted_to_the_layers_dtype_when_it_is_loaded(net, x):
    plan = autoq.Plan(layers=dict.fromkeys(("up", "down", "head"), "none"))
    model, other = net().bfloat16(), net().half()
    for one in (model, other):
        autoq.apply(one, plan, strict=True)
    other.load_state_dict(model.state_dict())
    assert other.up.weight.dtype == torch.float16
    assert torch.equal(other.up.weight, model.up.weight.half())
    with torch.no_grad():
        assert other(x.half()).dtype == torch.float16


CONVERSIONS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to(dtype)": lambda m: m.to(torch.float16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.bfloat16),
    "to(tensor)": lambda m: m.to(torch.zeros((), dtype=torch.float16)),
    "type": lambda m: m.type(torch.bfloat16),
    "half, float": lambda m: m.half().float(),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_conversions_change_the_outputs_dtype_and_no_code(net, tuned, x, convert):
    model, other = convert(tuned()), convert(net())
    dtype = other.up.weight.dtype
    with torch.no_grad():
        y = model(x.to(dtype))
        assert y.dtype == other(x.to(dtype)).dtype == dtype
        assert (y.float() - tuned()(x)).norm() <= 0.02 * y.float().norm()
    for name, module in quantized_layers(tuned()).items():
        assert torch.equal(model.get_submodule(name).packed, module.packed)
        assert model.get_submodule(name).bias.dtype == dtype


def test_a_double_model_is_refused_when_it_is_called(tuned, x):
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"x must be float32, bfloat16 or float16; got Double"):
        tuned().double()(x.double())


def test_moves_that_change_nothing_share_the_weights(tuned):
    model = tuned()
    before = {name: module.packed.data_ptr() for name, module in quantized_layers(model).items()}
    model.cpu().to("cpu").float().to(memory_format=torch.channels_last)
    model.eval().requires_grad_(False)
    assert {name: module.packed.data_ptr() for name, module in quantized_layers(model).items()} == before


def test_a_weight_moved_apart_from_its_header_is_refused(tuned, x):
    """As device mappers do that move buffers one by one."""
    model = tuned()
    model.up._buffers["head"] = model.up.head.clone()
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match="copied without its weight"):
        model(x)


def test_a_weight_is_not_overwritten_in_silence(tuned):
    model = tuned()
    with pytest.raises(KeyError, match="weight"):
        model.up.weight = nn.Parameter(torch.zeros(96, 64))
    with pytest.raises(AttributeError):
        model.up.weight = torch.zeros(96, 64)


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_a_model_that_waits_for_its_tuning_is_not_copied(net, copied, manual):
    for model in (net(), torch.compile(net(), backend="eager")):
        autoq.autoquant(model, manual=manual)
        with pytest.raises(InputError, match=r"tuning waits for its first call.*Call the model once"):
            copied(model)
