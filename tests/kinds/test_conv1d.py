"""transformers' Conv1D, whose weight is stored transposed, is a linear layer like any other."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from autoq import candidates
from autoq.applying import apply, restore
from autoq.checkpoint import load_quantized, save_quantized
from autoq.modules import QuantLinear, find_linears
from autoq.other_weights import other_weights
from autoq.plan import Plan
from autoq.recorder import record

PLAN = Plan(layers={"up": "int8wo", "down": "int4wo-hqq(group_size=64)"})


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = Conv1D(192, 64), Conv1D(64, 192)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x=x)))


@pytest.fixture
def block():
    return Block().eval()


X = torch.linspace(-1, 1, 3 * 5 * 64).view(3, 5, 64)


def test_it_is_found_and_recorded_with_its_outputs_first(block):
    assert [(site.name, site.reason) for site in find_linears(block)] == [("up", None), ("down", None)]
    recording = record(block, X)
    assert [(one.name, one.n, one.k, one.bias) for one in recording.workload.quantizable] == [
        ("up", 192, 64, True),
        ("down", 64, 192, True),
    ]
    assert recording.samples["up"]["forward"].shape == (15, 64)
    assert other_weights(block) == ()


def test_the_packed_weight_is_that_of_the_transposed_weight(block):
    with torch.no_grad():
        before, weight = block(X), block.up.weight.detach().clone()
        report = apply(block, PLAN)
        assert [str(one) for one in report.applied.values()] == ["int8wo", "int4wo-hqq(group_size=64)"]
        assert isinstance(block.up, QuantLinear)
        assert torch.equal(block.up.packed, candidates.parse("int8wo").pack(weight.t().contiguous()).data)
        error = (block(X) - before).norm() / before.norm()
    assert 0 < error < 0.02


def test_restoring_brings_the_same_module_back(block):
    with torch.no_grad():
        before, layer = block(X), block.up
        apply(block, PLAN, keep_float=True)
        assert restore(block) == 2
        assert block.up is layer
        assert torch.equal(block(X), before)


def test_a_saved_model_loads_into_it(block, tmp_path):
    apply(block, PLAN)
    save_quantized(block, tmp_path / "saved")
    loaded = load_quantized(Block, tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(loaded(X), block(X))


def test_a_plan_finds_it_under_another_prefix(block):
    outer = nn.ModuleDict({"part": block})
    assert set(PLAN.rebase(outer).layers) == {"part.up", "part.down"}


def test_the_copy_that_losses_are_measured_on_leaves_it_alone(block):
    from autoq.shadow import PackedStore, Shadow

    store = PackedStore(block, ["up", "down"])
    shadow = Shadow(block, store)
    with torch.no_grad():
        before = block(X)
        assert torch.allclose(shadow.model(X), before, atol=1e-6)
        shadow.assign(PLAN.layers)
        quantized = copy.deepcopy(block)
        apply(quantized, PLAN)
        assert torch.equal(shadow.model(X), quantized(X))
        assert torch.equal(block(X), before)


def test_a_subclass_with_its_own_forward_is_left_alone():
    class Scaled(Conv1D):
        def forward(self, x):
            return 2 * super().forward(x)

    (site,) = find_linears(nn.Sequential(Scaled(64, 64)))
    assert site.reason == "Scaled is a subclass of Conv1D with its own forward"


def test_a_foreign_class_of_that_name_is_not_taken_for_one():
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.nf, self.nx, self.weight = 64, 64, nn.Parameter(torch.zeros(64, 64))

    Foreign.__name__ = "Conv1D"
    model = nn.Sequential(Foreign())
    assert find_linears(model) == ()
    assert [(one.name, one.kind) for one in other_weights(model)] == [("0.weight", "parameters of other modules")]
