"""What is different between two plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autoq.plan import Plan
from autoq.scheme import Scheme
from autoq.summary import FAMILIES, family

_SECTIONS = (
    "budget",
    "request",
    "measured",
    "predicted",
    "certificate",
    "device",
    "versions",
    "profile_from",
    "model",
    "autoq",
    "seed",
    "study",
    "edited",
    "retargeted",
    "remeasured",
    "notes",
    "comment",
    "schema_1",
)
_NOWHERE = "nowhere"  # in the place of a fact that one of the plans does not have


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDiff:
    """The differences from one plan, a, to another, b.

    Attributes:
        changed: layer → its schemes in a and in b, where they differ.
        only_a: layer → scheme, of the layers that b does not name.
        only_b: the same of a.
        units: unit → its layers in a and in b, where they differ; empty where there is none.
        facts: what else differs → its values in a and in b, None where there is none: ``phases.decode``,
            ``budget.max_increase``, ``measured.latency_us``, ``device.name``, ``kernels.….none M=1 …``, …
    """

    changed: Mapping[str, tuple[Scheme, Scheme]]
    only_a: Mapping[str, Scheme]
    only_b: Mapping[str, Scheme]
    units: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
    facts: Mapping[str, tuple[Any, Any]]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.changed or self.only_a or self.only_b or self.units or self.facts)

    @property
    def by_family(self) -> dict[str, Counter[tuple[str, str]]]:
        """Part of the model → how many of its layers went from which scheme to which; "nowhere" for one not named."""
        moves = [(name, str(a), str(b)) for name, (a, b) in self.changed.items()]
        moves += [(name, str(a), _NOWHERE) for name, a in self.only_a.items()]
        moves += [(name, _NOWHERE, str(b)) for name, b in self.only_b.items()]
        found: dict[str, Counter[tuple[str, str]]] = {}
        for part in FAMILIES:
            counts = Counter((a, b) for name, a, b in moves if family(name) == part)
            if counts:
                found[part] = counts
        return found

    def to_json(self) -> dict[str, Any]:
        """As one JSON object; each pair is a list of two."""
        return {
            "same": self.same,
            "changed": {name: [a.to_json(), b.to_json()] for name, (a, b) in self.changed.items()},
            "only_a": {name: scheme.to_json() for name, scheme in self.only_a.items()},
            "only_b": {name: scheme.to_json() for name, scheme in self.only_b.items()},
            "by_family": {
                part: [{"from": a, "to": b, "layers": count} for (a, b), count in counts.most_common()]
                for part, counts in self.by_family.items()
            },
            "units": {name: [list(a), list(b)] for name, (a, b) in self.units.items()},
            "facts": {name: list(pair) for name, pair in self.facts.items()},
        }


def compare(a: Plan, b: Plan) -> PlanDiff:
    """What is different in ``b``, compared with ``a``. When they were made is not compared."""
    here, there = dict(_facts(a)), dict(_facts(b))
    order = ("phases", "model", *_SECTIONS, "kernels")
    names = sorted({**here, **there}, key=lambda name: order.index(name.removeprefix("provenance.").split(".")[0]))
    return PlanDiff(
        changed={
            name: (scheme, b.layers[name]) for name, scheme in a.layers.items() if b.layers.get(name, scheme) != scheme
        },
        only_a={name: scheme for name, scheme in a.layers.items() if name not in b.layers},
        only_b={name: scheme for name, scheme in b.layers.items() if name not in a.layers},
        units={
            name: (a.units.get(name, ()), b.units.get(name, ()))
            for name in {**a.units, **b.units}
            if a.units.get(name) != b.units.get(name)
        },
        facts={name: (here.get(name), there.get(name)) for name in names if here.get(name) != there.get(name)},
    )


def _facts(plan: Plan) -> Iterator[tuple[str, Any]]:
    """Everything but the assignment, its units and the time of its making, by dotted path."""
    yield from _leaves("phases", plan.phases)
    yield from _leaves("model", plan.model)
    for section in _SECTIONS:
        if section in plan.provenance:
            yield from _leaves(section if section != "model" else "provenance.model", plan.provenance[section])
    yield from _leaves("kernels", plan.kernels)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield path, value
        return
    for key, one in value.items():
        yield from _leaves(f"{path}.{key}", one)
