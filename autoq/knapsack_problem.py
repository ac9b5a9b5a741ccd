"""What the knapsack decides: units of layers, the schemes each can have, and what a plan of them adds up to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from autoq.errors import SearchError

Metric = Literal["time", "loss", "bytes"]
Assignment = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One scheme for one unit.

    Attributes:
        scheme: the scheme's display form, for example ``int4wo-hqq(group_size=64)``.
        time_us: microseconds the unit's layers take per request with it.
        loss: what it adds to the loss; negative when it measures better than none.
        bytes: bytes of weights the unit's layers take with it.
    """

    scheme: str
    time_us: float
    loss: float
    bytes: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.time_us) and math.isfinite(self.loss)):
            raise SearchError(
                "an option's time and loss must be finite",
                where=self.scheme,
                got=f"time_us={self.time_us}, loss={self.loss}",
                fix="Leave the scheme out of the unit's options.",
            )
        if self.time_us < 0 or self.bytes < 0:
            raise SearchError(
                "an option's time and bytes must not be negative",
                where=self.scheme,
                got=f"time_us={self.time_us}, bytes={self.bytes}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Layers that get one scheme together.

    Attributes:
        name: unique among the problem's units.
        layers: names of the layers it decides for.
        options: the schemes it can have, at least one, each scheme once.
    """

    name: str
    layers: tuple[str, ...]
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        if not self.options or not self.layers:
            raise SearchError("a unit needs at least one layer and one option", where=self.name)
        schemes = [option.scheme for option in self.options]
        if len(set(schemes)) != len(schemes):
            raise SearchError("a unit lists each scheme once", where=self.name, got=", ".join(schemes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Units to decide, and what a request takes besides them.

    Attributes:
        units: the decisions; an assignment holds one option index per unit, in this order.
        fixed_time_us: microseconds per request that no decision changes.
        fixed_bytes: bytes of weights that no decision changes.
    """

    units: tuple[Unit, ...]
    fixed_time_us: float = 0.0
    fixed_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.units:
            raise SearchError("a search needs at least one unit", fix="Check filter_fn.")
        for kind, names in (
            ("unit", [unit.name for unit in self.units]),
            ("layer", [layer for unit in self.units for layer in unit.layers]),
        ):
            if len(set(names)) != len(names):
                twice = sorted({name for name in names if names.count(name) > 1})
                raise SearchError(f"each {kind} must be decided once", got=", ".join(twice))

    def options(self, assignment: Assignment) -> tuple[Option, ...]:
        """The option each unit has under the assignment.

        Raises:
            SearchError: if the assignment does not have one valid option index per unit.
        """
        if len(assignment) != len(self.units) or not all(
            0 <= index < len(unit.options) for unit, index in zip(self.units, assignment, strict=False)
        ):
            raise SearchError(
                "an assignment has one valid option index per unit",
                got=f"{len(assignment)} indices for {len(self.units)} units",
            )
        return tuple(unit.options[index] for unit, index in zip(self.units, assignment, strict=True))

    def time_us(self, assignment: Assignment) -> float:
        """Microseconds per request, the fixed part included."""
        return self.fixed_time_us + math.fsum(option.time_us for option in self.options(assignment))

    def loss(self, assignment: Assignment) -> float:
        """The additive model's loss increase."""
        return math.fsum(option.loss for option in self.options(assignment))

    def bytes(self, assignment: Assignment) -> int:
        """Bytes of weights, the fixed part included."""
        return self.fixed_bytes + sum(option.bytes for option in self.options(assignment))

    def value(self, assignment: Assignment, metric: Metric) -> float:
        """``time_us``, ``loss`` or ``bytes`` by name."""
        if metric == "loss":
            return self.loss(assignment)
        return self.time_us(assignment) if metric == "time" else self.bytes(assignment)

    def schemes(self, assignment: Assignment) -> dict[str, str]:
        """The scheme of every layer under the assignment."""
        chosen = zip(self.units, self.options(assignment), strict=True)
        return {layer: option.scheme for unit, option in chosen for layer in unit.layers}

    def uniform(self, scheme: str, *, fallback: str = "none") -> Assignment:
        """The assignment with ``scheme`` wherever a unit offers it and ``fallback`` elsewhere.

        Raises:
            SearchError: if a unit offers neither.
        """
        return tuple(_first_of(unit, (scheme, fallback)) for unit in self.units)

    def assignment(self, schemes: Mapping[str, str]) -> Assignment:
        """The assignment that gives every layer its scheme: the inverse of ``schemes``.

        Raises:
            SearchError: if a layer is missing, a unit's layers differ, or a scheme is no option.
        """
        indices = []
        for unit in self.units:
            wanted = {schemes.get(layer, "") for layer in unit.layers}
            if len(wanted) != 1:
                raise SearchError("the layers of a unit share one scheme", where=unit.name, got=sorted(wanted))
            indices.append(_first_of(unit, (wanted.pop(),)))
        return tuple(indices)

    def to_json(self) -> dict[str, Any]:
        """The form kept in a study: scheme names once, a unit's options as columns."""
        schemes = list(dict.fromkeys(option.scheme for unit in self.units for option in unit.options))
        number = {scheme: index for index, scheme in enumerate(schemes)}
        return {
            "schemes": schemes,
            "units": [
                {
                    "name": unit.name,
                    **({} if unit.layers == (unit.name,) else {"layers": list(unit.layers)}),
                    "scheme": [number[option.scheme] for option in unit.options],
                    "time_us": [float(option.time_us) for option in unit.options],
                    "loss": [float(option.loss) for option in unit.options],
                    "bytes": [int(option.bytes) for option in unit.options],
                }
                for unit in self.units
            ],
            "fixed_time_us": self.fixed_time_us,
            "fixed_bytes": self.fixed_bytes,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Problem:
        """Read the form kept in a study."""
        units = []
        for one in value["units"]:
            columns = zip(one["scheme"], one["time_us"], one["loss"], one["bytes"], strict=True)
            options = [
                Option(scheme=value["schemes"][scheme], time_us=time, loss=loss, bytes=size)
                for scheme, time, loss, size in columns
            ]
            layers = one.get("layers", [one["name"]])
            units.append(Unit(name=one["name"], layers=tuple(layers), options=tuple(options)))
        return cls(units=tuple(units), fixed_time_us=value["fixed_time_us"], fixed_bytes=value["fixed_bytes"])


class Point(NamedTuple):
    """A supported point of the trade-off, with the additive model's values."""

    assignment: Assignment
    time_us: float
    loss: float
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A feasible assignment and a proof of how good it is.

    Attributes:
        assignment: one option index per unit.
        value: the objective, fixed part included, in the objective's unit.
        bound: no feasible assignment has a lower value than this.
        gap: ``(value − bound) / |value without the fixed part|``; 0 when proven optimal.
    """

    assignment: Assignment
    value: float
    bound: float
    gap: float


def _first_of(unit: Unit, schemes: Sequence[str]) -> int:
    offered = [option.scheme for option in unit.options]
    for scheme in schemes:
        if scheme in offered:
            return offered.index(scheme)
    raise SearchError(
        "a unit's scheme must be among its options",
        where=unit.name,
        got=" or ".join(map(repr, schemes)),
        fix=f"Offered: {', '.join(offered)}.",
    )
