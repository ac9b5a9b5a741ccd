"""What an explanation is made of: the choices, what else there was, and what a change would do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Verdict = Literal["refused", "over budget", "no gain", "buys accuracy", "promising"]

VERDICTS: Mapping[Verdict, str] = {
    "refused": "the layer cannot have it",
    "over budget": "the plan would be over a limit",
    "no gain": "it gains nothing and loses accuracy",
    "buys accuracy": "it gives accuracy back that the budget does not need",
    "promising": "predicted to gain within the limits; not measured",
}


class Cost(NamedTuple):
    """One scheme on one layer, as the search took it. Losses are on the scale that adds up over layers.

    Attributes:
        reason: why the layer cannot have it; empty otherwise, and then the rest counts.
        time_us: of a request.
        loss: what it adds.
        low: lower end of the loss's 95 % interval.
        high: its upper end.
        measured: whether this layer was measured with this scheme alone.
        weight_bytes: what the layer takes.
    """

    reason: str
    time_us: float
    loss: float
    low: float
    high: float
    measured: bool
    weight_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What moving layers to other schemes would do to the plan: differences from it, predicted.

    Attributes:
        layers: layer → the scheme it would have.
        time_us: microseconds per request.
        loss: in the metric's unit.
        loss_low: lower end of its 95 % interval; that of a sum as if all layers were off to the same side.
        loss_high: its upper end.
        weight_bytes: bytes of weights.
        over: the limits that the plan would break, in words; empty when it stays within all of them.
        measured: whether every loss in it was measured, layer by layer, rather than estimated from gradients.
    """

    layers: Mapping[str, str]
    time_us: float
    loss: float
    loss_low: float
    loss_high: float
    weight_bytes: int
    over: str
    measured: bool

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return {
            "layers": dict(self.layers),
            "time_us": self.time_us,
            "loss": self.loss,
            "loss_low": self.loss_low,
            "loss_high": self.loss_high,
            "weight_bytes": self.weight_bytes,
            "in_budget": not self.over,
            "over": self.over,
            "measured": self.measured,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A scheme that was not chosen for a unit, or for a family of layers.

    Attributes:
        scheme: its display form.
        verdict: why it was not chosen, in short; ``VERDICTS`` has the words.
        refused: why it cannot be had; empty where it can.
        change: what it would do; None where it is refused.
    """

    scheme: str
    verdict: Verdict
    refused: str
    change: Change | None

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        kept = {"scheme": self.scheme, "verdict": self.verdict, "refused": self.refused}
        return kept | {"change": None if self.change is None else self.change.to_json()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The scheme of a unit: of a layer, or of layers that were decided together.

    Attributes:
        unit: its name; a layer alone is a unit of its own name.
        layers: the layers.
        family: the part of the model: attention, mlp, lm_head or other.
        scheme: what was chosen.
        time_us: its part of a request, predicted.
        loss: what it adds to the loss, in the metric's unit if it alone were quantized.
        loss_low: lower end of its 95 % interval.
        loss_high: its upper end.
        measured: whether that loss was measured rather than estimated from gradients.
        weight_bytes: what its layers take.
        alternatives: every other scheme.
    """

    unit: str
    layers: tuple[str, ...]
    family: str
    scheme: str
    time_us: float
    loss: float
    loss_low: float
    loss_high: float
    measured: bool
    weight_bytes: int
    alternatives: tuple[Alternative, ...]

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        names = ("unit", "family", "scheme", "time_us", "loss", "loss_low", "loss_high", "measured", "weight_bytes")
        return {
            **{name: getattr(self, name) for name in names},
            "layers": list(self.layers),
            "alternatives": [one.to_json() for one in self.alternatives],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A part of the model: what its units have, and what one scheme on all of them would do.

    Attributes:
        name: attention, mlp, lm_head or other.
        layers: how many it has.
        schemes: scheme → how many layers have it, the most used first.
        alternatives: each scheme on every unit that can have it, the chosen ones where they cannot; ``refused`` says
            how many layers cannot.
    """

    name: str
    layers: int
    schemes: Mapping[str, int]
    alternatives: tuple[Alternative, ...]

    def to_json(self) -> dict[str, Any]:
        """As one JSON object; changes without their lists of layers."""
        alternatives = [one.to_json() for one in self.alternatives]
        for one in alternatives:
            if one["change"] is not None:
                one["change"]["layers"] = len(one["change"]["layers"])
        return {
            "family": self.name,
            "layers": self.layers,
            "schemes": dict(self.schemes),
            "alternatives": alternatives,
        }


class LeftAlone(NamedTuple):
    """A layer that no scheme was tried on.

    Attributes:
        layer: its name.
        reason: why.
    """

    layer: str
    reason: str
