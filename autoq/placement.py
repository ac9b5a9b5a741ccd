"""Where the labels of points go, so that none lies on another, on a point, or under the ring of the chosen plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle, in any unit.

    Attributes:
        left: smallest x.
        low: smallest y.
        right: largest x.
        high: largest y.
    """

    left: float
    low: float
    right: float
    high: float

    def overlap(self, other: Box) -> float:
        """The area that two share."""
        across = min(self.right, other.right) - max(self.left, other.left)
        up = min(self.high, other.high) - max(self.low, other.low)
        return max(0.0, across) * max(0.0, up)

    @property
    def area(self) -> float:
        """Its area."""
        return (self.right - self.left) * (self.high - self.low)


class Label(NamedTuple):
    """A text to place beside a point.

    Attributes:
        x: of the point.
        y: of the point.
        width: of the text.
        height: of the text.
        distance: from the point's middle that its mark needs free.
    """

    x: float
    y: float
    width: float
    height: float
    distance: float


def around(x: float, y: float, radius: float) -> Box:
    """The square around a mark."""
    return Box(x - radius, y - radius, x + radius, y + radius)


def placed(labels: Sequence[Label], marks: Sequence[Box], inside: Box) -> list[Box]:
    """A box for each label: of the places around its point, the one that covers least of what is there already.

    Args:
        labels: in the order in which they are placed.
        marks: what they should not cover.
        inside: what they should not leave.
    """
    taken = list(marks)
    found = []
    for label in labels:
        places = _places(label)
        best = min(range(len(places)), key=lambda one: (_cost(places[one], taken, inside), one))
        found.append(places[best])
        taken.append(places[best])
    return found


def _places(label: Label) -> list[Box]:
    """Candidates, those beside the point first, then farther ones."""
    x, y, width, height, distance = label
    found = []
    for far in (0.0, 1.0, 2.0):
        reach = distance + far * height
        for centre_x, centre_y in (
            (x + distance + width / 2, y + far * height),
            (x - distance - width / 2, y + far * height),
            (x, y + reach + height / 2),
            (x, y - reach - height / 2),
            (x + distance + width / 2, y - far * height),
            (x - distance - width / 2, y - far * height),
            (x + width / 2, y + reach + height / 2),
            (x + width / 2, y - reach - height / 2),
            (x - width / 2, y + reach + height / 2),
            (x - width / 2, y - reach - height / 2),
        ):
            found.append(Box(centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2))
    return found


def _cost(box: Box, taken: Sequence[Box], inside: Box) -> float:
    outside = box.area - box.overlap(inside)
    return sum(box.overlap(other) for other in taken) + 10.0 * outside
