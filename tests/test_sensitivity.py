import math

import pytest
import torch
from torch import nn

from autoq import candidates
from autoq.errors import InputError
from autoq.evaluation import LossMeter
from autoq.identity import content_hash
from autoq.losses import OutputKL, RelativeRMS, UserLoss, as_batches
from autoq.scheme import Scheme
from autoq.sensitivity import scores
from autoq.shadow import PackedStore, Shadow

INT4 = candidates.parse("int4wo-hqq(group_size=64)")
INT8DQ = candidates.parse("int8dq")


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU())
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return {"logits": 4 * self.head(self.body(x))}


def classifier():
    torch.manual_seed(0)
    return Classifier().eval()


LAYERS = ("body.0", "body.2", "head")


def test_scores_rank_and_size_what_one_layer_at_a_time_really_costs():
    model = classifier()
    batches = as_batches(list(torch.randn(16, 32, 64)))
    store = PackedStore(model, LAYERS)
    metric = OutputKL()
    meter = LossMeter(Shadow(model, store), metric, batches)
    meter.baseline()
    schemes = [INT4, INT8DQ, candidates.parse("fp6(format=e3m2)")]
    rows = scores(model, batches, metric, store, schemes, seed=0)
    assert len(rows) == 9
    for row in rows:
        measured = meter.difference({row["layer"]: Scheme.parse(row["scheme"])}).mean
        # A second-order estimate from 512 samples of noisy gradients; the search fits what factor is left.
        assert 0.5 < row["score"] / measured < 2.0, row


def test_a_relative_rms_is_predicted_as_its_square():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48)).eval()
    batches = as_batches(list(torch.randn(8, 64, 64)))
    store = PackedStore(model, ["0", "2"])
    metric = RelativeRMS()
    meter = LossMeter(Shadow(model, store), metric, batches)
    meter.baseline()
    for row in scores(model, batches, metric, store, [INT4]):
        measured = meter.difference({row["layer"]: INT4.scheme}).mean
        assert math.sqrt(row["score"]) == pytest.approx(measured, rel=0.25)


def test_the_model_is_left_as_it_was():
    model = classifier().train()
    model.head.weight.requires_grad_(False)
    batches = as_batches(torch.randn(4, 64))
    scores(model, batches, OutputKL(), PackedStore(model, LAYERS), [INT4])
    assert model.training
    assert model.body.training
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [one.requires_grad for one in (model.head.weight, model.head.bias)] == [False, True]


def test_the_probe_comes_off_after_an_error():
    model = classifier()
    broken = UserLoss(lambda outputs, batch: outputs["logits"].sum(dim=1) * math.nan)
    with pytest.raises(InputError, match="number"):
        scores(model, as_batches(torch.randn(4, 64)), broken, PackedStore(model, LAYERS), [INT4])
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_loss_that_cannot_be_differentiated_is_refused():
    model = classifier()
    flat = UserLoss(lambda outputs, batch: torch.ones(4))
    with pytest.raises(InputError, match="eval_fn"):
        scores(model, as_batches(torch.randn(4, 64)), flat, PackedStore(model, LAYERS), [INT4])


def test_the_same_seed_gives_the_same_scores():
    model = classifier()
    batches = as_batches(torch.randn(16, 64))
    store = PackedStore(model, LAYERS)
    first, again = (scores(model, batches, OutputKL(), store, [INT4], seed=3) for _ in range(2))
    other = scores(model, batches, OutputKL(), store, [INT4], seed=4)
    assert first == again
    assert [row["score"] for row in first] != [row["score"] for row in other]


def test_a_content_hash_sees_values_shapes_and_dtypes_only():
    x = torch.arange(12.0)
    assert content_hash([x]) == content_hash([x.clone()])
    assert content_hash([x]) == content_hash([torch.arange(24.0)[:12]])
    changed = [x.view(3, 4), x.double(), torch.cat([x[:-1], x[-1:] + 1])]
    assert len({content_hash([one]) for one in [x, *changed]}) == 4
