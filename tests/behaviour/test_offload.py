"""Weights that are not there: on the meta device, or offloaded by accelerate."""

import pytest
import torch

import autoq
from autoq.errors import ModelError

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")


@pytest.fixture
def offloaded(net, tmp_path):
    def make(where):
        model = net()
        if where == "cpu":
            return accelerate.cpu_offload(model, torch.device("cpu"))
        if where == "disk":
            return accelerate.disk_offload(model, tmp_path, torch.device("cpu"))
        devices = {"up": "cpu", "down": "disk", "head": "cpu"}
        return accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path)

    return make


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_layers_are_left_alone_with_the_reason(offloaded, net, plan, x, where):
    model = offloaded(where)
    report = autoq.apply(model, plan)
    assert {one.name: one.reason for one in report.skipped} == dict.fromkeys(plan.layers, "its weight is offloaded")
    assert report.applied == {}
    with torch.no_grad():
        assert torch.equal(model(x), net()(x))
    with pytest.raises(ModelError, match="its weight is offloaded"):
        autoq.tune(model, x)


def test_of_a_partly_offloaded_model_what_is_there_is_named_too(offloaded, plan, x, net):
    model = offloaded("partly")
    report = autoq.apply(model, plan)
    reasons = {one.name: one.reason for one in report.skipped}
    assert reasons["down"] == "its weight is offloaded"
    assert set(reasons) | set(report.applied) == set(plan.layers)
    with torch.no_grad():
        assert model(x).shape == (5, 32)


@pytest.mark.parametrize("buffers", [False, True])
def test_a_tuned_model_can_be_offloaded(tuned, x, buffers):
    model = tuned()
    with torch.no_grad():
        wanted = model(x)
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=buffers)
        assert torch.equal(model(x), wanted)
        accelerate.hooks.remove_hook_from_submodules(model)


def test_a_model_on_the_meta_device_is_not_recorded(net, x):
    with pytest.raises(ModelError, match=r"Net: recording runs the model.*got weights on the meta device\. Load them"):
        autoq.record(net().to("meta"), [x])


def test_a_model_on_the_meta_device_is_not_quantized(net, plan, x):
    model = net().to("meta")
    report = autoq.apply(model, plan)
    assert {one.reason for one in report.skipped} == {"its weight is on the meta device"}
    with pytest.raises(ModelError, match="its weight is on the meta device"):
        autoq.tune(model, x.to("meta"))
    with pytest.raises(ModelError, match="its weight is on the meta device"):
        autoq.autoquant(model, x)
