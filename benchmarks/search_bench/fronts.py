"""Fronts of (latency over none's, loss), and the area they dominate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from autoq import hypervolume as areas

LOSS_UNIT = 0.15  # the loss that counts as 1


class Plan(NamedTuple):
    """A plan on the two axes: modelled latency over that of ``none``, measured change of the NLL in nats."""

    ratio: float
    loss: float


def front(plans: Iterable[Plan]) -> list[Plan]:
    """The plans no other one beats, fastest first."""
    found: list[Plan] = []
    for plan in sorted(plans):
        if not found or plan.loss < found[-1].loss:
            found.append(plan)
    return found


def hypervolume(plans: Iterable[Plan]) -> float:
    """The area between the plans and the point (1, 1), on axes (ratio, loss / ``LOSS_UNIT``)."""
    return areas.hypervolume([(plan.ratio, plan.loss / LOSS_UNIT) for plan in plans], (1.0, 1.0))


def gain(plans: Iterable[Plan], uniform: Iterable[Plan]) -> float:
    """The area that plans add to the uniform ones'."""
    uniform = list(uniform)
    return hypervolume([*uniform, *plans]) - hypervolume(uniform)
