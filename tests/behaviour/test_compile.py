"""A tuned model under torch.compile: every mode, any shape, and changes of the plan under compiled code."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import autoq
from autoq.calibration import compile_key
from autoq.modules import compile_arguments, quantized_layers

MODES = {
    "default": {},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
    "dynamic": {"dynamic": True},
}
modes = pytest.mark.parametrize("arguments", MODES.values(), ids=MODES)


def graphs():
    return counters["stats"]["unique_graphs"]


@modes
def test_it_compiles_to_one_graph_and_gives_the_same_outputs(tuned, arguments):
    model, before = tuned(), graphs()
    compiled = torch.compile(model, fullgraph=True, **arguments)
    rows = (5, 2, 40) if arguments.get("dynamic") else (5, 5)
    with torch.no_grad():
        for number, m in enumerate(rows):
            x = torch.randn(m, 64, generator=torch.Generator().manual_seed(number))
            assert torch.equal(compiled(x), model(x))
    assert graphs() - before == 1


@modes
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_autoquant_keeps_how_a_model_is_compiled(net, plan, arguments, how):
    wrapper = torch.compile(nn.Identity(), **arguments)
    if how == "wrapped":
        model = torch.compile(net(), **arguments)
        context = model.dynamo_ctx
    else:
        model = net()
        model.compile(**arguments)
        context = model._compiled_call_impl
    assert autoq.autoquant(model, plan=plan) is model
    assert (model.dynamo_ctx if how == "wrapped" else model._compiled_call_impl) is context
    kept = compile_arguments(model)
    assert kept["backend"] == compile_arguments(wrapper)["backend"]
    assert kept.get("dynamic") == arguments.get("dynamic")


def test_calibrations_are_kept_by_what_compile_does_not_by_its_objects():
    keys = [compile_key(compile_arguments(torch.compile(nn.Identity(), **one))) for one in (*MODES.values(), {})]
    assert len({str(key) for key in keys}) == len(MODES)
    assert keys[-1] == keys[0]
    assert "0x" not in str(keys)
    assert compile_key({}) == []


def test_compiled_code_follows_the_plan(net, plan, x):
    model = net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        unquantized = compiled(x)
        assert torch.equal(unquantized, model(x))
        autoq.apply(model, plan, keep_float=True)
        quantized, seen = compiled(x), graphs()
        assert not torch.equal(quantized, unquantized)
        assert torch.equal(quantized, model(x))
        autoq.apply(model, plan.replace({"up": "int8wo"}))
        assert torch.equal(compiled(x), model(x))
        assert not torch.equal(compiled(x), quantized)
        assert graphs() == seen  # another scheme is no other graph
        autoq.restore(model)
        assert torch.equal(compiled(x), unquantized)


def test_a_state_loaded_under_compiled_code_is_what_runs(net, tuned, plan, x):
    model, other = tuned(), net()
    autoq.apply(other, plan.replace({"up": "int8wo", "head": "fp6(format=e3m2)"}))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        seen = graphs()
        model.load_state_dict(other.state_dict())
        assert torch.equal(compiled(x), other(x))
    assert graphs() == seen


def test_it_is_exported_and_traced(tuned, x):
    model, file = tuned(), io.BytesIO()
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(torch.export.export(model, (x,)).module()(x), wanted)
        torch.jit.save(torch.jit.trace(model, (x,)), file)
        file.seek(0)
        assert torch.equal(torch.jit.load(file)(x), wanted)


def test_the_gradient_of_the_inputs_is_compiled(tuned, x):
    model = tuned().requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True)
    grads = []
    for call in (compiled, model):
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model_copies_and_pickles(tuned, x, how):
    model = tuned()
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    with torch.no_grad():
        wanted = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), wanted)
            assert len(quantized_layers(other)) == 3
            assert autoq.plan_of(other) == autoq.plan_of(model)
