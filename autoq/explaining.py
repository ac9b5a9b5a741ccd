"""Why a plan is what it is: what was chosen, what every other scheme would cost, what was refused, and what if.

Everything here is predicted from a tuning's measurements; nothing runs. A change's time, loss and bytes are sums over
the layers that it moves, as the search took them, and start from what was measured of the whole plan. Times are in
proportion to that measurement: the machine may have been faster or slower when single layers were timed.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq.errors import InputError
from autoq.explaining_text import as_text, choice_text
from autoq.explaining_values import Alternative, Change, Choice, Cost, Family, LeftAlone, Verdict
from autoq.pricing import Pricing, Request, costs_of
from autoq.result_files import Result, read_folder
from autoq.scheme import NONE, Scheme
from autoq.summary import FAMILIES, family

if TYPE_CHECKING:
    import pandas as pd

    from autoq.plan import Plan

__all__ = ["Alternative", "Change", "Choice", "Explanation", "Family", "explain", "load"]

_SHOWN = 5  # counterfactuals of either kind, and names in a message


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a plan is what it is; ``str()`` of it is the short version.

    Attributes:
        plan: the plan.
        choices: unit by unit, in the model's order.
        left_alone: layers on which no scheme was tried.
        notes: what autoq decided by itself.
        pricing: what changes are priced by.
    """

    plan: Plan
    choices: tuple[Choice, ...]
    left_alone: tuple[LeftAlone, ...]
    notes: tuple[str, ...]
    pricing: Pricing

    def choice(self, layer: str) -> Choice:
        """The choice that a layer is part of.

        Raises:
            InputError: if the layer was not decided.
        """
        for one in self.choices:
            if layer in one.layers or layer == one.unit:
                return one
        left = dict(self.left_alone)
        if layer in left:
            got = f"it was left alone: {left[layer]}"
            raise InputError("an explanation is of a layer that was decided", where=layer, got=got)
        names = list(self.pricing.costs)
        near = difflib.get_close_matches(layer, names, _SHOWN) or [one for one in names if layer in one] or names
        raise InputError(
            "an explanation is of a layer that was decided",
            where=layer,
            got=f"a name that none of the {len(names)} has",
            fix=f"Say {', '.join(near[:_SHOWN])}{' or another' if len(names) > len(near[:_SHOWN]) else ''}.",
        )

    def force(self, changes: Mapping[str, Scheme | str]) -> Change:
        """What giving layers other schemes would do to the plan, as predicted; ``autoq.measure`` tells.

        Args:
            changes: layer → scheme; its name is enough where one candidate has it. A layer that was decided together
                with others takes them along.

        Raises:
            InputError: if a layer was not decided, or cannot have the scheme.
        """
        moves: dict[str, str] = {}
        for layer, wanted in changes.items():
            one, scheme = self.choice(layer), self.pricing.candidate(Scheme.of(wanted))
            if moves.setdefault(one.unit, scheme) != scheme:
                raise InputError(
                    "layers that were decided together get one scheme",
                    where=one.unit,
                    got=f"{moves[one.unit]}, {scheme}",
                )
            refused = self.pricing.refused(one.layers, scheme)
            if refused:
                able = [name for name in self.pricing.schemes if not self.pricing.refused(one.layers, name)]
                raise InputError(
                    "a layer is forced to a scheme that it can have",
                    where=layer,
                    got=f"{scheme}: {refused}",
                    fix=f"Say {' or '.join(able)}.",
                )
        return self.pricing.change(
            {layer: moves[one.unit] for one in self.choices if one.unit in moves for layer in one.layers}
        )

    @property
    def other_weights(self) -> Mapping[str, Mapping[str, float]]:
        """Weights that no plan can quantize: kind → how many ``weights``, their ``bytes``, and their ``share`` of the
        model's bytes; empty where the plan does not tell.
        """
        found: Mapping[str, Mapping[str, float]] = self.plan.provenance.get("model", {}).get("left_alone", {})
        return found

    @property
    def families(self) -> tuple[Family, ...]:
        """Part by part of the model, what one scheme on all its layers would do."""
        found = []
        for name in FAMILIES:
            mine = [one for one in self.choices if one.family == name]
            if mine:
                schemes = Counter(one.scheme for one in mine for _ in one.layers)
                alternatives = tuple(_on_all(self.pricing, mine, scheme) for scheme in self.pricing.schemes)
                found.append(
                    Family(
                        name=name,
                        layers=sum(len(one.layers) for one in mine),
                        schemes=dict(schemes.most_common()),
                        alternatives=alternatives,
                    )
                )
        return tuple(found)

    def counterfactuals(self, count: int = _SHOWN) -> tuple[Change, ...]:
        """Single changes nearest to being made: first those that gain time (bytes, where memory is the objective) for
        the least loss, then those that gain accuracy for the least time (bytes). One per unit, ``count`` of each kind.
        """
        changes = [[other.change for other in one.alternatives if other.change is not None] for one in self.choices]

        def cost(change: Change) -> float:
            return float(change.weight_bytes) if self.pricing.objective == "memory" else change.time_us

        def best(of: Sequence[Change], *, accuracy: bool) -> tuple[float, Change] | None:
            def rate(change: Change) -> float:
                gain, price = (change.loss, cost(change)) if accuracy else (cost(change), change.loss)
                return price / -gain

            gaining = [one for one in of if (one.loss if accuracy else cost(one)) < 0]
            found = min(gaining, key=rate, default=None)
            return None if found is None else (rate(found), found)

        chosen: list[Change] = []
        for accuracy in (False, True):
            rated = [found for of in changes if (found := best(of, accuracy=accuracy)) is not None]
            chosen += [change for _, change in sorted(rated, key=lambda pair: pair[0])[:count]]
        return tuple(chosen)

    @property
    def table(self) -> pd.DataFrame:
        """A row per unit and scheme. Columns: unit, layers (how many), family, scheme, chosen, verdict, refused, then
        time_us, loss, loss_low, loss_high, weight_bytes (differences from the plan), in_budget and measured.
        """
        import pandas as pd

        rows = []
        for one in self.choices:
            kept = {"unit": one.unit, "layers": len(one.layers), "family": one.family}
            rows.append(
                kept
                | {"scheme": one.scheme, "chosen": True, "verdict": "chosen", "refused": "", "in_budget": True}
                | {"time_us": 0.0, "loss": 0.0, "loss_low": 0.0, "loss_high": 0.0, "weight_bytes": 0}
                | {"measured": one.measured}
            )
            for other in one.alternatives:
                known = {} if other.change is None else other.change.to_json()
                known = {name: value for name, value in known.items() if name not in ("layers", "over")}
                rows.append(
                    kept
                    | {"scheme": other.scheme, "chosen": False, "verdict": other.verdict, "refused": other.refused}
                    | known
                )
        names = ["unit", "layers", "family", "scheme", "chosen", "verdict", "refused", "time_us", "loss"]
        return pd.DataFrame(rows, columns=[*names, "loss_low", "loss_high", "weight_bytes", "in_budget", "measured"])

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return {
            "plan": self.plan.hash,
            "budget": dict(self.plan.provenance.get("budget") or {}),
            "base": self.pricing.to_json(),
            "choices": [one.to_json() for one in self.choices],
            "families": [one.to_json() for one in self.families],
            "counterfactuals": [one.to_json() for one in self.counterfactuals()],
            "left_alone": [one._asdict() for one in self.left_alone],
            "other_weights": {kind: dict(one) for kind, one in self.other_weights.items()},
            "notes": list(self.notes),
        }

    def text(self, layer: str | None = None) -> str:
        """For people: the whole plan by family, or one layer with every scheme.

        Raises:
            InputError: if the layer was not decided.
        """
        if layer is not None:
            return choice_text(self.choice(layer), self.pricing)
        return as_text(self.plan, self.pricing, self.families, self.counterfactuals(), self.left_alone)

    def __str__(self) -> str:
        return self.text()


def load(folder: str | Path) -> Explanation:
    """Explain the plan in a folder that ``autoq tune --output`` (``reporting.write_files``) wrote, without a model.

    Raises:
        InputError: if a file of the folder is missing, damaged or of another tuning.
        PlanError: if the plan cannot be read.
    """
    return explain(read_folder(folder))


def explain(result: Result | str | Path, *, plan: Plan | None = None) -> Explanation:
    """Why a plan is what it is, and what other schemes would cost.

    Args:
        result: what ``autoq.tune`` returned, or the folder that ``autoq tune --output`` wrote.
        plan: another plan of the same layers, such as one from ``result.retarget`` or ``plan.replace``; by default
            the result's own.

    Raises:
        InputError: if the plan has a layer or a scheme that the tuning did not measure, or the folder is not usable.
        PlanError: if the folder's plan cannot be read.
    """
    if isinstance(result, str | Path):
        result = read_folder(result)
    plan = result.plan if plan is None else plan
    costs = costs_of(result.costs)
    if not costs:
        raise InputError("an explanation needs the costs that tune() recorded", got="an empty table")
    units = _units(result, plan, costs)
    pricing = Pricing.of(plan, costs, Request.of(result.front, costs))
    left = [LeftAlone(one.name, one.reason) for one in result.workload.layers if one.reason is not None]
    left += [
        LeftAlone(one.name, "it was never called")
        for one in result.workload.layers
        if one.reason is None and one.name not in costs
    ]
    return Explanation(
        plan=plan,
        choices=tuple(_choice(pricing, unit, layers) for unit, layers in units.items()),
        left_alone=tuple(left),
        notes=tuple(result.notes),
        pricing=pricing,
    )


def _units(result: Result, plan: Plan, costs: Mapping[str, Mapping[str, Cost]]) -> dict[str, tuple[str, ...]]:
    """Unit → its layers, in the order of the costs; those of a unit that the plan tears apart are units of their own.

    Raises:
        InputError: if the plan has a layer or a scheme without costs.
    """
    unknown = [layer for layer in plan.layers if layer not in costs]
    if unknown:
        got = f"{len(unknown)} others, such as {unknown[0]}"
        raise InputError("the plan's layers are those of the tuning", got=got, fix="Explain a plan of that tuning.")
    names = dict(zip(result.costs["layer"], result.costs["unit"], strict=True))
    groups: dict[str, list[str]] = {}
    for layer, unit in names.items():
        scheme = str(plan.layers.get(layer, NONE))
        cost = costs[layer].get(scheme)
        if cost is None or cost.reason:
            got = f"{scheme}: {'not among its candidates' if cost is None else cost.reason}"
            raise InputError("the plan's schemes are those that the tuning measured", where=layer, got=got)
        groups.setdefault(unit, []).append(layer)
    found: dict[str, tuple[str, ...]] = {}
    for unit, layers in groups.items():
        together = len({plan.layers.get(layer, NONE) for layer in layers}) == 1
        found |= {unit: tuple(layers)} if together else {layer: (layer,) for layer in layers}
    return found


def _choice(pricing: Pricing, unit: str, layers: tuple[str, ...]) -> Choice:
    scheme = pricing.chosen[layers[0]]
    mine = [pricing.costs[layer][scheme] for layer in layers]
    back = pricing.scale.back
    others = [one for one in dict.fromkeys(name for layer in layers for name in pricing.costs[layer]) if one != scheme]
    return Choice(
        unit=unit,
        layers=layers,
        family=family(layers[0]),
        scheme=scheme,
        time_us=pricing.request.drift * sum(one.time_us for one in mine),
        loss=back(sum(one.loss for one in mine)),
        loss_low=back(sum(one.low for one in mine)),
        loss_high=back(sum(one.high for one in mine)),
        measured=all(one.measured for one in mine),
        weight_bytes=sum(one.weight_bytes for one in mine),
        alternatives=tuple(_alternative(pricing, layers, one) for one in others),
    )


def _alternative(pricing: Pricing, layers: Sequence[str], scheme: str) -> Alternative:
    refused = pricing.refused(layers, scheme)
    if refused:
        return Alternative(scheme=scheme, verdict="refused", refused=refused, change=None)
    change = pricing.change(dict.fromkeys(layers, scheme))
    return Alternative(scheme=scheme, verdict=_verdict(pricing, change), refused="", change=change)


def _on_all(pricing: Pricing, choices: Sequence[Choice], scheme: str) -> Alternative:
    """One scheme on every unit that can have it."""
    able = [one for one in choices if not pricing.refused(one.layers, scheme)]
    unable = sum(len(one.layers) for one in choices) - sum(len(one.layers) for one in able)
    refused = f"by {unable} layers" if unable else ""
    if not able:
        reason = pricing.refused(choices[0].layers, scheme)
        return Alternative(scheme=scheme, verdict="refused", refused=f"by all: {reason}", change=None)
    change = pricing.change({layer: scheme for one in able for layer in one.layers})
    return Alternative(scheme=scheme, verdict=_verdict(pricing, change), refused=refused, change=change)


def _verdict(pricing: Pricing, change: Change) -> Verdict:
    if change.over:
        return "over budget"
    gains = {"latency": change.time_us, "memory": change.weight_bytes, "loss": change.loss}[pricing.objective] < 0
    if gains:
        return "promising"
    return "buys accuracy" if change.loss < 0 else "no gain"
