"""What moving layers of a plan to other schemes would cost, by the additive model that the search worked with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from autoq._files import parse_json, shown
from autoq.additive import Additive
from autoq.errors import InputError
from autoq.explaining_values import Change, Cost
from autoq.scheme import NONE, Scheme

if TYPE_CHECKING:
    import pandas as pd

    from autoq.plan import Plan

_LARGEST = 1e18  # of a figure: microseconds, bytes or loss
_SLACK = 1e-9  # relative; of a limit that is just met


def costs_of(frame: pd.DataFrame) -> dict[str, dict[str, Cost]]:
    """Layer → scheme → its cost, from the columns of ``tables.COSTS``.

    Raises:
        InputError: if a row that is not refused lacks a figure.
    """
    found: dict[str, dict[str, Cost]] = {}
    figures = ("time_us", "loss", "loss_low", "loss_high", "weight_bytes")
    for row in frame.to_dict("records"):
        where = f"{row['layer']}, {row['scheme']}"
        refused = bool(row["reason"])
        values = [0.0 if refused else _number(row[name], name, where) for name in figures]
        time_us, loss, low, high, size = values
        found.setdefault(str(row["layer"]), {})[str(row["scheme"])] = Cost(
            reason=str(row["reason"] or ""),
            time_us=time_us,
            loss=loss,
            low=low,
            high=high,
            measured=not refused and bool(row["measured"]),
            weight_bytes=int(size),
        )
    return found


class Request(NamedTuple):
    """How times and bytes of layers make those of a request.

    Attributes:
        drift: the tuned plan's measured time over its predicted one. Layers are timed at another moment than whole
            plans, and the machine may be half as fast again then: ratios hold, microseconds do not.
        rest_us: what is no layer's, at the speed at which layers were timed; None where that is not known.
        rest_bytes: of weights that no plan decides.
    """

    drift: float = 1.0
    rest_us: float | None = None
    rest_bytes: int = 0

    @classmethod
    def of(cls, front: pd.DataFrame, costs: Mapping[str, Mapping[str, Cost]]) -> Request:
        """From the front's chosen plan, as far as it was timed and its layers have costs.

        Raises:
            InputError: if its assignment cannot be read.
        """
        rows: list[dict[str, Any]] = front.to_dict("records")  # type: ignore[assignment]  # columns have names
        chosen = next((row for row in rows if row["chosen"]), None)
        if chosen is None or not _is_figure(chosen["latency_predicted_us"]):
            return cls()
        measured = chosen["latency_measured_us"]
        drift = measured / chosen["latency_predicted_us"] if _is_figure(measured) else 1.0
        schemes = assignment_of(chosen)
        if not schemes:  # the unquantized model itself; the costs of none are of autoq's kernels
            chosen = next((row for row in rows if row["label"] == str(NONE)), chosen)
        known = [of.get(schemes.get(layer, str(NONE))) for layer, of in costs.items()]
        mine = [one for one in known if one is not None and not one.reason]
        if len(mine) < len(costs) or not _is_figure(chosen["latency_predicted_us"]):
            return cls(drift)
        rest_us = chosen["latency_predicted_us"] - math.fsum(one.time_us for one in mine)
        size = chosen["weight_bytes"]
        rest_bytes = int(size) - sum(one.weight_bytes for one in mine) if _is_figure(size) else 0
        return cls(drift, max(0.0, rest_us), max(0, rest_bytes))


def _is_figure(value: Any) -> bool:
    return value is not None and 0 < value < _LARGEST


def assignment_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Layer → scheme of a plan, from its row of the front's table.

    Raises:
        InputError: if it is no object of these.
    """
    where = f"front: plan {row['plan']}"
    found = parse_json(row["assignment"] or "{}", InputError, what="an assignment", where=where)
    if not isinstance(found, dict) or not all(isinstance(one, str) for one in found.values()):
        raise InputError("an assignment is an object of layer to scheme", where=where, got=shown(found))
    return found


def _number(value: Any, name: str, where: str) -> float:
    if value is None or not abs(value) < _LARGEST:  # NaN is not
        raise InputError(f"a scheme that is not refused has its {name}", where=f"costs: {where}", got=value)
    return float(value)


@dataclass(frozen=True, kw_only=True)
class Pricing:
    """Prices changes of one plan.

    Attributes:
        costs: layer → scheme → cost.
        chosen: layer → the plan's scheme; ``none`` of a layer that the plan does not name.
        objective: ``latency``, ``memory`` or ``loss``.
        scale: on which losses of layers add up.
        unit: of the loss, such as ``nats per token``.
        loss: the plan's, measured or else predicted, in the metric's unit.
        loss_high: upper end of its interval; the loss itself where it was not measured.
        time_us: the plan's request, measured or else predicted; of its layers alone where the rest is not known.
        weight_bytes: the same of its weights.
        measured: whether these were measured.
        request: how times of layers make that of a request.
        limits: ``loss``, ``time`` and ``bytes`` as far as they are limited.
    """

    costs: Mapping[str, Mapping[str, Cost]]
    chosen: Mapping[str, str]
    objective: str
    scale: Additive
    unit: str
    loss: float
    loss_high: float
    time_us: float
    weight_bytes: float
    measured: bool
    request: Request
    limits: Mapping[str, float]

    @classmethod
    def of(cls, plan: Plan, costs: Mapping[str, Mapping[str, Cost]], request: Request) -> Pricing:
        """The pricing of a plan whose layers all have costs."""
        known = plan.provenance
        budget, measured = known.get("budget") or {}, known.get("measured") or {}
        chosen = {layer: str(plan.layers.get(layer, NONE)) for layer in costs}
        scale = Additive.of(str(budget.get("metric", "")))
        mine = [costs[layer][scheme] for layer, scheme in chosen.items()]
        loss = measured.get("loss_delta")
        whole = loss is not None
        loss = scale.back(math.fsum(one.loss for one in mine)) if loss is None else loss
        high, time_us, size = (measured.get(name) for name in ("loss_high", "latency_us", "weight_bytes"))
        limits = {"loss": "max_increase", "time": "max_latency_us", "bytes": "max_weight_bytes"}
        return cls(
            costs=costs,
            chosen=chosen,
            objective=str(budget.get("objective") or "latency"),
            scale=scale,
            unit=str(budget.get("unit") or "loss"),
            loss=loss,
            loss_high=loss if high is None else high,
            time_us=request.drift * math.fsum([request.rest_us or 0.0, *(one.time_us for one in mine)])
            if time_us is None
            else time_us,
            weight_bytes=request.rest_bytes + sum(one.weight_bytes for one in mine) if size is None else size,
            measured=whole,
            request=request,
            limits={name: budget[key] for name, key in limits.items() if budget.get(key) is not None},
        )

    @property
    def schemes(self) -> tuple[str, ...]:
        """Every scheme of the costs, in their order."""
        return tuple(dict.fromkeys(scheme for one in self.costs.values() for scheme in one))

    def candidate(self, scheme: Scheme) -> str:
        """The candidate that is meant: the scheme itself, or without fields the only one of its name.

        Raises:
            InputError: if several have the name.
        """
        if scheme.fields or str(scheme) in self.schemes:
            return str(scheme)
        named = [one for one in self.schemes if one.partition("(")[0] == scheme.name]
        if len(named) > 1:
            raise InputError("a scheme's name stands for one candidate", got=scheme, fix=f"Say {' or '.join(named)}.")
        return named[0] if named else str(scheme)

    def refused(self, layers: Iterable[str], scheme: str) -> str:
        """Why layers that are decided together cannot have a scheme; empty where they can."""
        for layer in layers:
            cost = self.costs[layer].get(scheme)
            if cost is None:
                return "it was not among the candidates"
            if cost.reason:
                return cost.reason
        return ""

    def change(self, moves: Mapping[str, str]) -> Change:
        """What moving layers would do.

        Args:
            moves: layer → a scheme that it can have; the layers that have it already stay out of the change.
        """
        moved = {layer: scheme for layer, scheme in moves.items() if self.chosen[layer] != scheme}
        pairs = [(self.costs[layer][self.chosen[layer]], self.costs[layer][scheme]) for layer, scheme in moved.items()]
        time_us = self.request.drift * math.fsum(new.time_us - old.time_us for old, new in pairs)
        size = sum(new.weight_bytes - old.weight_bytes for old, new in pairs)
        middle = math.fsum(new.loss - old.loss for old, new in pairs)
        # Of one layer, the interval of a difference of two independent estimates (Zou and Donner's MOVER).
        down = math.fsum(math.hypot(new.loss - new.low, old.high - old.loss) for old, new in pairs)
        up = math.fsum(math.hypot(new.high - new.loss, old.loss - old.low) for old, new in pairs)
        start = self.scale.to(self.loss)
        loss, low, high = (self.scale.back(start + one) - self.loss for one in (middle, middle - down, middle + up))
        return Change(
            layers=moved,
            time_us=time_us,
            loss=loss,
            loss_low=low,
            loss_high=high,
            weight_bytes=size,
            over=self._over(time_us, middle, size),
            measured=all(one.measured or one.loss == 0.0 for pair in pairs for one in pair),
        )

    def _over(self, time_us: float, loss: float, size: int) -> str:
        """Which limits the plan would be over, its measured upper bound of the loss moved by the change."""
        bound = self.scale.back(self.scale.to(self.loss_high) + loss)
        found = {"loss": bound, "time": self.time_us + time_us, "bytes": self.weight_bytes + size}
        # Whole microseconds and bytes: four digits of them may be those of the limit.
        shapes = {"loss": (".4g", self.unit), "time": (",.0f", "µs a request"), "bytes": (",.0f", "bytes of weights")}
        broken = [name for name, limit in self.limits.items() if found[name] > limit + _SLACK * abs(limit)]
        texts = [(found[one], self.limits[one], *shapes[one]) for one in broken]
        return "; ".join(f"{value:{shape}} {unit}, limit {limit:{shape}}" for value, limit, shape, unit in texts)

    def to_json(self) -> dict[str, Any]:
        """What changes start from, as one JSON object."""
        names = ("objective", "unit", "loss", "loss_high", "time_us", "weight_bytes", "measured")
        kept = {name: getattr(self, name) for name in names}
        return {**kept, "drift": self.request.drift, "limits": dict(self.limits)}
