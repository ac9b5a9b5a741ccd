"""A tuned model in inference mode, under autocast, and with gradients."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import autoq
from autoq import candidates
from autoq.modules import QuantLinear, quantized_layers
from autoq.shadow import PackedStore, Shadow

SCHEMES = (
    "none", "int8wo", "int8dq", "int8mix", "int4wo-hqq(group_size=64)", "sinq(bits=3,group_size=64)", "fp6(format=e3m2)"
)  # fmt: skip
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def layer(scheme, dtype=torch.float32):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, dtype=dtype)
    candidate = candidates.parse(scheme)
    return QuantLinear(candidate, candidate.pack(linear.weight), linear.bias, 96, 40, dtype=dtype)


def rows(m, dtype=torch.float32):
    return torch.randn(m, 96, generator=torch.Generator().manual_seed(m)).to(dtype)


# --- inference mode --------------------------------------------------------------------------------------------------


def test_inference_mode_changes_no_output(tuned, x):
    model = tuned()
    with torch.no_grad():
        wanted = model(x)
    with torch.inference_mode():
        y = model(x)
    assert y.is_inference()
    assert torch.equal(y, wanted)


def test_what_was_converted_in_inference_mode_can_be_differentiated(tuned, x):
    model = tuned().requires_grad_(False)
    with torch.inference_mode():
        model.half().float()
    for module in quantized_layers(model).values():
        module.bias = None  # an inference tensor now, like nn.Linear's
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    assert leaf.grad.isfinite().all()


# --- autocast --------------------------------------------------------------------------------------------------------


@HALF
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("m", [1, 40])
def test_autocast_converts_the_inputs_as_for_a_linear_layer(scheme, dtype, m):
    module, x = layer(scheme), rows(m)
    with torch.no_grad():
        wanted = module(x.to(dtype))
        with torch.autocast("cpu", dtype=dtype):
            y = module(x)
            assert module(x.double().float()[:0]).dtype == dtype
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(module(x), layer(scheme)(x))
    assert y.dtype == dtype
    assert torch.equal(y, wanted)
    exact = module.candidate.reference(x.to(dtype), candidates.Packed(module.packed), module.bias)
    limit = {torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    assert (y.double() - exact).norm() <= limit * exact.norm()


def test_a_tuned_model_under_autocast_has_the_float_models_dtypes(net, tuned, x):
    dtypes = []
    for model in (net(), tuned()):
        found = []
        for module in (model.up, model.down, model.head):
            module.register_forward_hook(lambda _, args, y, found=found: found.append((args[0].dtype, y.dtype)))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            model(x)
        dtypes.append(found)
    assert dtypes[0] == dtypes[1]
    assert {after for _, after in dtypes[1]} == {torch.bfloat16}


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast_is_compiled(tuned, x, where):
    model = tuned().requires_grad_(False)

    def inside(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    compiled = torch.compile(inside if where == "inside" else model, backend="aot_eager", fullgraph=True)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "outside"):
        y = compiled(leaves[0])
        wanted = inside(leaves[1])
    assert torch.equal(y, wanted)
    for result in (y, wanted):
        result.float().sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert leaves[0].grad.dtype == torch.float32


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gradient_is_not_rounded_by_an_autocast_around_backward(scheme):
    module, leaf = layer(scheme), rows(3).requires_grad_()
    grad = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    y = module(leaf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y.backward(grad)
    exact = grad.double() @ module.weight.double()
    assert (leaf.grad - exact).norm() <= 1e-6 * exact.norm()


def test_the_structure_copy_that_tuning_measures_runs_under_autocast(net, x):
    model = net()
    shadow = Shadow(model, PackedStore(model, ["up", "down", "head"]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(shadow.model(x), model(x))


# --- gradients -------------------------------------------------------------------------------------------------------


# Rounded activations (int8dq) have a straight-through gradient, which is no derivative of the outputs.
WEIGHT_ONLY = autoq.Plan(layers={"up": "sinq(bits=4,group_size=64)", "down": "fp6(format=e2m3)", "head": "int8wo"})


def dequantized(net, model):
    """The float model with the quantized model's weights."""
    other = net()
    with torch.no_grad():
        for name, module in quantized_layers(model).items():
            other.get_submodule(name).weight.copy_(module.weight)
    return other


@pytest.mark.parametrize("through", ["plain", "checkpoint", "checkpoint, reentrant"])
def test_the_inputs_gradient_is_that_of_the_dequantized_model(net, x, through):
    model = net()
    autoq.apply(model, WEIGHT_ONLY)
    grads = []
    for one in (model, dequantized(net, model)):
        leaf = x.clone().requires_grad_()
        y = one(leaf) if through == "plain" else checkpoint(one, leaf, use_reentrant="reentrant" in through)
        y.square().sum().backward()
        grads.append(leaf.grad)
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()


def test_weights_are_frozen_and_biases_train(tuned, x):
    model = tuned().train()
    assert [name for name, _ in model.named_parameters()] == ["up.bias", "down.bias", "head.bias"]
    before = {name: module.packed.clone() for name, module in quantized_layers(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model(x).square().mean()
    first.backward()
    optimizer.step()
    assert model(x).square().mean() < first
    for name, module in quantized_layers(model).items():
        assert module.bias.grad.abs().sum() > 0
        assert torch.equal(module.packed, before[name])


def test_second_derivatives_are_those_of_the_dequantized_model(net, x):
    model = net()
    autoq.apply(model, WEIGHT_ONLY)
    found = []
    for one in (model, dequantized(net, model)):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(one(leaf).square().sum(), leaf, create_graph=True)
        grad.square().sum().backward()
        found.append(leaf.grad)
    assert (found[0] - found[1]).norm() <= 1e-5 * found[1].norm()


def test_functional_derivatives_are_refused_and_vmap_is_right(tuned, x):
    model = tuned()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(model, (x,), (x,))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: model(x).sum())(x)
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(model)(x[:, None]), model(x)[:, None])


@pytest.mark.parametrize("kind", [torch.float64, torch.int64])
def test_inputs_of_other_types_are_refused(tuned, x, kind):
    with torch.no_grad(), pytest.raises((RuntimeError, TypeError), match="x must be float32, bfloat16 or float16"):
        tuned().up(x.to(kind))
