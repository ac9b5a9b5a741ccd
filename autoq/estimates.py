"""What one layer under one scheme costs in loss: measured by itself, or its score as measurements of others correct it.

A pair is a (layer, scheme). Scores come from gradients and are off by a factor, of which measured pairs tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Pair = tuple[str, str]  # layer, display form of the scheme
# Standard deviations of the logarithm of measured loss over score: of its parts, and of what is left.
_PAIR_SPREAD = 0.2
_PART_SPREAD = {"common": 1.0, "depth": 1.0, "role": 0.25, "family": 0.1, "scheme": 0.1}
_TWO_SIDED = 1.96  # standard deviations to either side of a 95 % interval


class _Part(NamedTuple):
    """A part of a logarithm of measured loss over score: common, of the depth, or of one scheme, role or family."""

    kind: str
    name: str


class Estimate(NamedTuple):
    """What a pair adds to the loss, on the additive scale.

    Attributes:
        loss: measured, or calibrated.
        low: lower end of its 95 % interval: the measurement's, or what the calibration leaves open.
        high: its upper end.
        measured: whether the pair itself was measured.
    """

    loss: float
    low: float
    high: float
    measured: bool


class _Fit(NamedTuple):
    """Parts of the logarithms, fitted, with their covariance; a part that no measurement has is not among them."""

    parts: Mapping[_Part, float]
    covariance: npt.NDArray[np.float64]

    def log(self, row: Mapping[_Part, float]) -> float:
        """The logarithm expected of a pair with these parts."""
        return sum(self.parts.get(part, 0.0) * share for part, share in row.items())

    def spread(self, row: Mapping[_Part, float]) -> float:
        """The standard deviation of a pair's logarithm about it."""
        known = np.array([row.get(part, 0.0) for part in self.parts])
        unknown = [_PART_SPREAD[part.kind] * share for part, share in row.items() if part not in self.parts]
        variance = _PAIR_SPREAD**2 + sum(one * one for one in unknown)
        return math.sqrt(variance + (float(known @ self.covariance @ known) if self.parts else 0.0))


def role(layer: str) -> str:
    """What a layer is for: the last part of its name."""
    return layer.rpartition(".")[2]


def calibrated(rows: Sequence[Mapping[str, Any]], families: Mapping[str, str] | None = None) -> dict[Pair, float]:
    """Losses of all pairs: those of ``estimates`` without their intervals."""
    return {pair: found.loss for pair, found in estimates(rows, families).items()}


def estimates(rows: Sequence[Mapping[str, Any]], families: Mapping[str, str] | None = None) -> dict[Pair, Estimate]:
    """Losses of all pairs: measured, or the score times what measured ones of their kinds were off by.

    The logarithm of measured loss over score is taken to be a sum: a common part, a slope over the model's depth (what
    early layers do wrong fades on its way through the others), and parts of the layer's role, of its family and of the
    scheme, each as small as the measurements allow. A measurement counts by its interval, and only when that is above
    zero.

    Args:
        rows: sensitivity rows, some of them measured; layers in the order in which they run.
        families: each layer's family, where there are any besides the roles (the last parts of the names).
    """
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    depth = {layer: (index + 0.5) / len(layers) - 0.5 for index, layer in enumerate(layers)}

    def parts(row: Mapping[str, Any]) -> dict[_Part, float]:
        layer = row["layer"]
        kinds = {"common": "", "scheme": row["scheme"], "role": role(layer)}
        kinds |= {} if families is None else {"family": families[layer]}
        return {_Part(kind, name): 1.0 for kind, name in kinds.items()} | {_Part("depth", ""): depth[layer]}

    counted = [
        row
        for row in rows
        if row.get("measured") is not None and row["measured_low"] > 0 and 0 < row["score"] < math.inf
    ]
    fitted = _fit([(parts(row), row) for row in counted])
    found: dict[Pair, Estimate] = {}
    for row in rows:
        mine = parts(row)
        loss = row["score"] * math.exp(fitted.log(mine))
        factor = math.exp(_TWO_SIDED * fitted.spread(mine))
        found[row["layer"], row["scheme"]] = Estimate(loss, loss / factor, loss * factor, measured=False)
    measured = {
        (row["layer"], row["scheme"]): Estimate(
            row["measured"], row["measured_low"], row["measured_high"], measured=True
        )
        for row in counted
    }
    return found | measured


def _fit(rows: Sequence[tuple[Mapping[_Part, float], Mapping[str, Any]]]) -> _Fit:
    """The parts whose sums are nearest to the logarithms of measured loss over score (ridge regression)."""
    names = list(dict.fromkeys(part for parts, _ in rows for part in parts))
    if not names:
        return _Fit({}, np.zeros((0, 0)))
    design = np.array([[parts.get(name, 0.0) for name in names] for parts, _ in rows])
    log_ratio = np.array([math.log(row["measured"] / row["score"]) for _, row in rows])
    own = np.array([math.log(row["measured_high"] / row["measured_low"]) / (2 * _TWO_SIDED) for _, row in rows])
    weight = 1.0 / (_PAIR_SPREAD**2 + own**2)
    prior = np.diag([_PART_SPREAD[name.kind] ** -2.0 for name in names])
    precision = design.T @ (weight[:, None] * design) + prior
    found = np.linalg.solve(precision, design.T @ (weight * log_ratio))
    return _Fit(dict(zip(names, found.tolist(), strict=True)), np.linalg.inv(precision))
