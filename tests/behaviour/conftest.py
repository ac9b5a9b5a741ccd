import pytest
import torch
from torch import nn

import autoq


class Net(nn.Module):
    """A residual block and a head: between its linear layers nothing rounds differently when it is compiled."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.head(x + self.down(torch.relu(self.up(x))))


PLAN = autoq.Plan(layers={"up": "sinq(bits=4,group_size=64)", "down": "int8dq", "head": "int8wo"})


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """The tests' models share their code, and Dynamo compiles one code only a few times."""
    torch._dynamo.reset()


@pytest.fixture
def net():
    """Makes the float model, the same every time."""

    def make():
        torch.manual_seed(0)
        return Net().eval()

    return make


@pytest.fixture
def tuned(net):
    """Makes the quantized model, the same every time."""

    def make(**options):
        model = net()
        autoq.apply(model, PLAN, strict=True, **options)
        return model

    return make


@pytest.fixture
def plan():
    return PLAN


@pytest.fixture
def x():
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
