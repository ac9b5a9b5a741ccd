"""What cached losses depend on is seen: code, settings, functions and what they close over."""

import functools

import numpy as np
import torch
from torch import nn

from autoq.identity import content_hash, function_hash, model_hash


class Scaled(nn.Module):
    def __init__(self, scale=1.0, activation=None):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.activation = activation or nn.ReLU()
        self.scale = scale

    def forward(self, x):
        return self.scale * self.activation(self.linear(x))


class AlsoScaled(Scaled):
    def forward(self, x):
        return self.scale + self.activation(self.linear(x))


def test_equal_models_agree_and_others_differ():
    one = model_hash(Scaled())
    assert one == model_hash(Scaled().train())
    other = Scaled()
    other.linear.weight.data.zero_()
    assert model_hash(other) == one  # weights have a hash of their own
    others = [Scaled(scale=2.0), Scaled(activation=nn.Sigmoid()), AlsoScaled(), Scaled(activation=nn.LeakyReLU(0.2))]
    assert len({one, *map(model_hash, others)}) == 5
    assert model_hash(Scaled(activation=nn.LeakyReLU(0.1))) != model_hash(Scaled(activation=nn.LeakyReLU(0.2)))


class Configured(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.config = type("Config", (), {"to_dict": lambda _: settings})()


def test_a_configuration_counts_but_not_where_it_came_from():
    one = model_hash(Configured(rope={"factor": 2.0}, _name_or_path="a"))
    assert one == model_hash(Configured(rope={"factor": 2.0}, _name_or_path="b"))
    assert one != model_hash(Configured(rope={"factor": 4.0}, _name_or_path="a"))


def made(factor, weights=None):
    def loss(outputs, batch):
        return factor * outputs.mean(dim=1) if weights is None else outputs @ weights

    return loss


class Callable:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, model):
        return self.factor

    def method(self, model):
        return self.factor


def test_functions_differ_by_source_closure_defaults_and_what_they_are_bound_to():
    assert function_hash(made(1)) == function_hash(made(1))
    assert function_hash(made(1, torch.ones(3))) == function_hash(made(1, torch.ones(3)))
    different = [
        made(1),
        made(50),
        made(1, torch.ones(3)),
        made(1, torch.zeros(3)),
        lambda outputs, batch: outputs.mean(dim=1),
        lambda outputs, batch: outputs.sum(dim=1),
        Callable(1),
        Callable(2),
        Callable(1).method,
        Callable(2).method,
        functools.partial(made, 1),
        functools.partial(made, 2),
        functools.partial(made, factor=1),
    ]
    assert len({function_hash(one) for one in different}) == len(different)


def test_a_function_without_source_is_told_by_what_it_was_compiled_to():
    def compiled(text):
        scope = {}
        exec(text, scope)
        return scope["f"]

    twice = [compiled("def f(x):\n    return 2 * x") for _ in range(2)]
    assert function_hash(twice[0]) == function_hash(twice[1])
    assert function_hash(twice[0]) != function_hash(compiled("def f(x):\n    return 3 * x"))


FACTOR = 1


def reading(outputs, batch):
    return FACTOR * helping(outputs)


def helping(outputs):
    return outputs


def test_globals_and_helpers_are_followed(monkeypatch):
    one = function_hash(reading)
    assert one == function_hash(reading)
    monkeypatch.setitem(globals(), "FACTOR", 2)
    assert function_hash(reading) != one
    monkeypatch.undo()
    monkeypatch.setitem(globals(), "helping", lambda outputs: -outputs)
    assert function_hash(reading) != one
    monkeypatch.undo()
    assert function_hash(reading) == one


def test_functions_on_one_line_arrays_and_attributes_that_are_functions():
    one, two = (lambda x: x, lambda x: 2 * x)
    assert function_hash(one) != function_hash(two)
    assert function_hash(made(1, np.ones(3))) != function_hash(made(1, np.zeros(3)))
    models = Scaled(), Scaled()
    models[0].act, models[1].act = torch.relu, torch.tanh
    assert model_hash(models[0]) != model_hash(models[1])


def test_contents_within_structures_are_seen():
    x = torch.arange(6.0)
    base = content_hash([((x,), {"mask": None, "scale": 1.0})])
    assert base == content_hash([((x.clone(),), {"mask": None, "scale": 1.0})])
    assert base != content_hash([((x,), {"mask": None, "scale": 2.0})])
    assert base != content_hash([(([x + 1],), {"mask": None, "scale": 1.0})])
    assert content_hash([torch.tensor([True, False])]) != content_hash([torch.tensor([True, True])])
