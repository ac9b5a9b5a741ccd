"""The plan: which scheme each layer gets, why, and what was measured. A JSON file people may edit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autoq._files import write_atomic
from autoq.errors import AutoqError, PlanError
from autoq.scheme import Scheme, Value

SCHEMA = 1
_SECTIONS = ("schema", "layers", "units", "phases", "kernels", "model", "provenance")
_PREFIXES = ("_orig_mod.", "module.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An assignment of schemes to layers, with its provenance.

    Attributes:
        layers: layer name → scheme. A layer that is not named stays as it is.
        units: unit name → the layers that were decided together. They have one scheme; a layer is in one unit at most.
        phases: phase name → calls per request, what the plan was tuned for.
        kernels: device → shape and M bucket → kernel, as they ran.
        model: what besides the linears was decided (KV cache, attention, lm_head).
        provenance: budget, measured and predicted figures, device, versions, model identity, seed, study.

    ``Plan(layers={"fc": "int8wo"})`` accepts schemes in any form.
    """

    layers: Mapping[str, Scheme]
    units: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    phases: Mapping[str, float] = field(default_factory=dict)
    kernels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = {plain_name(name): Scheme.of(scheme) for name, scheme in self.layers.items()}
        if len(layers) != len(self.layers):
            raise PlanError("a plan names each layer once", got=", ".join(sorted(self.layers)))
        object.__setattr__(self, "layers", layers)
        units = {name: tuple(map(plain_name, group)) for name, group in self.units.items()}
        _check_units(units, layers)
        object.__setattr__(self, "units", units)

    def replace(self, changes: Mapping[str, Scheme | str | Mapping[str, Value]]) -> Plan:
        """A new plan with some layers' schemes changed; its measured figures are dropped.

        Units whose layers have different schemes then are dropped too.

        Raises:
            PlanError: if a named layer is not in the plan.
        """
        unknown = sorted(set(map(plain_name, changes)) - set(self.layers))
        if unknown:
            raise PlanError(
                "replace() changes layers of the plan",
                got=", ".join(unknown),
                fix="See plan.layers for their names.",
            )
        layers = dict(self.layers) | {plain_name(k): Scheme.of(v) for k, v in changes.items()}
        kept = {k: v for k, v in self.provenance.items() if k not in ("measured", "predicted")}
        units = whole_units(self.units, layers)
        return replace(self, layers=layers, units=units, provenance=kept | {"edited": True})

    def counts(self) -> dict[str, int]:
        """How many layers got each scheme, the most used first."""
        names = [str(scheme) for scheme in self.layers.values()]
        return {name: names.count(name) for name in sorted(set(names), key=lambda n: (-names.count(n), n))}

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that identify the assignment (not its provenance)."""
        text = json.dumps({name: s.to_json() for name, s in self.layers.items()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """The file's JSON object."""
        return {
            "schema": SCHEMA,
            "layers": {name: scheme.to_json() for name, scheme in self.layers.items()},
            "units": {name: list(layers) for name, layers in self.units.items()},
            "phases": dict(self.phases),
            "kernels": {device: dict(rows) for device, rows in self.kernels.items()},
            "model": dict(self.model),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, value: Any, *, where: str = "plan") -> Plan:
        """Read ``to_json``'s object, strictly.

        Raises:
            PlanError: with the JSON path of the first thing that is wrong.
        """
        if not isinstance(value, dict):
            raise PlanError("a plan is a JSON object", where=where, got=type(value).__name__)
        schema = value.get("schema")
        if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
            raise PlanError("$.schema is a positive integer", where=where, got=repr(schema))
        if schema > SCHEMA:
            raise PlanError(
                f"this autoq reads plans up to schema {SCHEMA}",
                where=where,
                got=f"schema {schema}",
                fix="Upgrade autoq, or tune again with this version.",
            )
        for key in value:
            if key not in _SECTIONS:
                raise PlanError(f"$.{key} is not a section of a plan", where=where)
        if not isinstance(value.get("layers"), dict):
            raise PlanError("$.layers is an object of layer name to scheme", where=where)
        for section in _SECTIONS[2:]:
            if not isinstance(value.get(section, {}), dict):
                raise PlanError(f"$.{section} is an object", where=where)
        for unit, group in value.get("units", {}).items():
            if not isinstance(group, list) or not all(isinstance(layer, str) for layer in group):
                raise PlanError(f"{_unit_path(unit)} is a list of layers of the plan", where=where, got=repr(group))
        layers = {name: _scheme(name, scheme, where) for name, scheme in value["layers"].items()}
        phases = _numbers(value.get("phases", {}), where)
        try:
            return cls(
                layers=layers,
                units=value.get("units", {}),
                phases=phases,
                kernels=value.get("kernels", {}),
                model=value.get("model", {}),
                provenance=value.get("provenance", {}),
            )
        except PlanError as problem:
            raise PlanError(problem.rule, where=where, got=problem.got, fix=problem.fix) from problem

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically: the old file stays until the new one is complete.

        Raises:
            PlanError: if the folder cannot be written.
        """
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        write_atomic(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"), PlanError)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: if it is missing, cut, of a newer schema, or anything in it is not understood.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise PlanError("the plan file must be readable", where=str(path), got=str(problem)) from problem
        try:
            value = json.loads(text, object_pairs_hook=_no_duplicates)
        except PlanError as problem:
            raise PlanError(problem.rule, where=str(path), got=problem.got) from problem
        except ValueError as problem:
            raise PlanError(
                "a plan file holds one complete JSON object",
                where=str(path),
                got=str(problem),
                fix="The file looks cut or edited wrongly; restore it or tune again.",
            ) from problem
        except RecursionError:
            raise PlanError("a plan file is not nested this deeply", where=str(path)) from None
        return cls.from_json(value, where=str(path))


def plain_name(name: str) -> str:
    """A layer's name without the wrappers' prefixes (torch.compile's, DistributedDataParallel's)."""
    for prefix in _PREFIXES:
        name = name.replace(f".{prefix}", ".").removeprefix(prefix)
    return name


def whole_units(units: Mapping[str, tuple[str, ...]], layers: Mapping[str, Scheme]) -> dict[str, tuple[str, ...]]:
    """The units whose layers are all among ``layers``, under one scheme."""
    return {
        unit: group
        for unit, group in units.items()
        if layers.keys() >= set(group) and len({layers[layer] for layer in group}) == 1
    }


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise PlanError("a key appears once in an object", got=", ".join(twice))
    return seen


def _scheme(name: str, value: Any, where: str) -> Scheme:
    path = f"$.layers[{json.dumps(name)}]"
    if not isinstance(value, dict):
        raise PlanError(f'{path} is an object such as {{"scheme": "int8wo"}}', where=where, got=repr(value))
    try:
        return Scheme.of(value)
    except AutoqError as problem:
        raise PlanError(f"{path}: {problem.rule}", where=where, got=problem.got, fix=problem.fix) from problem


def _check_units(units: Mapping[str, tuple[str, ...]], layers: Mapping[str, Scheme]) -> None:
    """Refuse units of unknown layers, of layers with different schemes, or that share a layer."""
    owners: dict[str, str] = {}
    for unit, group in units.items():
        unknown = [layer for layer in group if layer not in layers]
        if unknown:
            raise PlanError(f"{_unit_path(unit)} is a list of layers of the plan", got=", ".join(unknown[:5]))
        schemes = sorted({str(layers[layer]) for layer in group})
        if len(schemes) > 1:
            raise PlanError(
                f"{_unit_path(unit)}: its layers have one scheme",
                got=", ".join(schemes),
                fix="Give them the same scheme, or take the unit out of the plan.",
            )
        shared = [layer for layer in group if owners.setdefault(layer, unit) != unit]
        if shared:
            raise PlanError(f"{_unit_path(unit)}: a layer is in one unit", got=", ".join(shared[:5]))


def _unit_path(unit: str) -> str:
    return f"$.units[{json.dumps(unit)}]"


def _numbers(phases: Mapping[str, Any], where: str) -> dict[str, float]:
    for name, calls in phases.items():
        if isinstance(calls, bool) or not isinstance(calls, int | float) or not calls > 0:
            raise PlanError(f"$.phases[{json.dumps(name)}] is a positive number of calls", where=where, got=repr(calls))
    return {name: float(calls) for name, calls in phases.items()}
