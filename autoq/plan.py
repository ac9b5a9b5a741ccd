"""The plan: which scheme each layer gets, why, and what was measured. A JSON file people may edit."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq._files import read_json, shown, write_atomic
from autoq.errors import AutoqError, PlanError
from autoq.plan_names import plain_name, renamed_groups, renaming
from autoq.plan_schema import SCHEMA, SECTIONS, check_scheme, check_sections, upgraded, without_figures
from autoq.plan_text import content_hash, layer_path, plain, text_of, unit_path
from autoq.scheme import Scheme, Value

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Plan", "plain_name", "whole_units"]

_log = logging.getLogger(__name__)
_LIMIT_BYTES = 16 << 20
_FIX = "Correct or restore the file, or tune again."
_SHOWN = 5  # names in a message


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

    ``Plan(layers={"fc": "int8wo"})`` accepts schemes in any form. The other sections are copied, in JSON's types.

    Raises:
        PlanError: if a section holds what a plan file may not, with the JSON path.
    """

    layers: Mapping[str, Scheme]
    units: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    phases: Mapping[str, float] = field(default_factory=dict)
    kernels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_distinct(self.layers)
        layers = {plain_name(name): Scheme.of(scheme) for name, scheme in self.layers.items()}
        units = {name: tuple(map(plain_name, group)) for name, group in self.units.items()}
        _check_units(units, layers)
        plain({"layers": {name: scheme.to_json() for name, scheme in layers.items()}, "units": units})
        rest = {name: plain(getattr(self, name), f"$.{name}") for name in SECTIONS[2:]}
        check_sections(rest)
        _check_model(rest["provenance"], layers)
        rest["phases"] = {name: float(calls) for name, calls in rest["phases"].items()}
        for name, section in {**rest, "layers": layers, "units": units}.items():
            object.__setattr__(self, name, section)

    def replace(self, changes: Mapping[str, Scheme | str | Mapping[str, Value]]) -> Plan:
        """A new plan with some layers' schemes changed; its measured and predicted figures are dropped.

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
        return self.edited(dict(self.layers) | {plain_name(k): Scheme.of(v) for k, v in changes.items()})

    def edited(self, layers: Mapping[str, Scheme]) -> Plan:
        """A new plan with another assignment, of these layers only, and nothing that held for the old one."""
        provenance = without_figures(self.provenance)
        model = dict(provenance.get("model", {}))
        if "layers" in model:
            known = {name: one for name, one in model.pop("layers").items() if name in layers}
            # Not where a layer has another name than when the shapes were noted.
            provenance["model"] = {**model, "layers": known} if known.keys() == layers.keys() else model
        return replace(self, layers=layers, units=whole_units(self.units, layers), provenance=provenance)

    def rebase(self, model: nn.Module) -> Plan:
        """The same plan under the names that a model has for the layers.

        They are the same ones but for wrappers' prefixes (``_orig_mod.``, ``module.``, PEFT's), or all have one prefix
        more or one less (``model.layers.0.…`` and ``layers.0.…``). Shapes are compared where the provenance has them.
        The figures stay: they are those of the same layers.

        Args:
            model: the float or the quantized model, plain or wrapped. Layers of it that the plan lacks stay so.

        Raises:
            PlanError: if a layer is not in the model, if several prefixes fit, or if a layer has another shape.
        """
        known = self.provenance.get("model", {}).get("layers", {})
        names = renaming(list(self.layers), {name: (one["n"], one["k"]) for name, one in known.items()}, model)
        provenance = dict(self.provenance)
        if known and self.layers:
            provenance["model"] = provenance["model"] | {"layers": {names[name]: one for name, one in known.items()}}
        return replace(
            self,
            layers={names[name]: scheme for name, scheme in self.layers.items()},
            units=renamed_groups(self.units, names),
            provenance=provenance,
        )

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
        """The file's JSON object, with the hash of all the rest of it."""
        value = plain(
            {
                "schema": SCHEMA,
                "layers": {name: scheme.to_json() for name, scheme in self.layers.items()},
                **{name: getattr(self, name) for name in SECTIONS[1:]},
            }
        )
        return {**value, "hash": content_hash(value)}

    @classmethod
    def from_json(cls, value: Any, *, where: str = "plan") -> Plan:
        """Read ``to_json``'s object, strictly.

        An object whose hash does not fit the rest was edited: its measured and predicted figures are dropped, and
        ``provenance["edited"]`` is set.

        Raises:
            PlanError: with the JSON path of the first thing that is wrong.
        """
        try:
            return _read(cls, value, where)
        except AutoqError as problem:
            raise PlanError(problem.rule, where=where, got=problem.got, fix=problem.fix or _FIX) from problem

    def save(self, path: str | Path) -> None:
        """Write the plan as canonical JSON, atomically: the old file stays until the new one is complete.

        The same plan always gives the same bytes.

        Raises:
            PlanError: if the folder cannot be written, or a scheme is neither autoq's nor an installed plugin's.
        """
        value = self.to_json()
        for name, scheme in value["layers"].items():
            check_scheme(name, scheme)
        text = text_of(value) + "\n"
        write_atomic(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"), PlanError)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file; see ``from_json``.

        Raises:
            PlanError: if it is missing, cut, of a newer schema, or anything in it is not understood.
        """
        value = read_json(path, PlanError, what="a plan file", limit_bytes=_LIMIT_BYTES, fix=_FIX)
        return cls.from_json(value, where=str(path))


def whole_units(units: Mapping[str, tuple[str, ...]], layers: Mapping[str, Scheme]) -> dict[str, tuple[str, ...]]:
    """The units whose layers are all among ``layers``, under one scheme."""
    return {
        unit: group
        for unit, group in units.items()
        if layers.keys() >= set(group) and len({layers[layer] for layer in group}) == 1
    }


def _read(kind: type[Plan], given: Any, where: str) -> Plan:
    if not isinstance(given, Mapping):
        raise PlanError("a plan is a JSON object", got=type(given).__name__, fix="Pass a file that `plan.save` wrote.")
    value = plain(given)
    schema = value.pop("schema", None)
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise PlanError("$.schema is a positive integer", got=shown(schema))
    if schema > SCHEMA:
        raise PlanError(
            f"this autoq reads plans up to schema {SCHEMA}",
            got=f"schema {schema}",
            fix="Upgrade autoq, or tune again with this version.",
        )
    edited = False
    if schema == 1:
        value = upgraded(value)
    else:
        found = value.pop("hash", "")
        if not isinstance(found, str):
            raise PlanError("$.hash is text", got=shown(found), fix="Leave it out of a file that you edit.")
        # A file written by hand has neither.
        by_hand = "hash" not in given and not value.get("provenance")
        edited = not by_hand and found != content_hash({**value, "schema": schema})
    if "layers" not in value:
        raise PlanError("$.layers is an object of layer name to scheme", got="a file without it")
    check_sections(value)
    made_with = value.get("provenance", {}).get("plugins")
    for name, scheme in value["layers"].items():
        check_scheme(name, scheme, made_with)
    if edited:
        value["provenance"] = without_figures(value.get("provenance", {}))
    plan = kind(**value)
    if edited:
        _log.warning("%s was edited after autoq wrote it: its measured and predicted figures are dropped", where)
    return plan


def _check_distinct(layers: Mapping[str, Any]) -> None:
    """Refuse layers that are one layer but for wrappers' prefixes."""
    seen: dict[str, str] = {}
    for name in layers:
        first = seen.setdefault(plain_name(name), name)
        if first != name:
            raise PlanError(
                f"{layer_path(name)}: a plan names each layer once",
                got=f"{first!r} and {name!r}, which are both {plain_name(name)!r}",
            )


def _check_model(provenance: Mapping[str, Any], layers: Mapping[str, Scheme]) -> None:
    """Refuse layers that the model of the provenance lacks, and a plan that lacks some of that model's."""
    known = provenance.get("model", {}).get("layers")
    if known is None or not layers:
        return
    unknown, missing = sorted(set(layers) - set(known)), sorted(set(known) - set(layers))
    if unknown:
        raise PlanError(
            f"{layer_path(unknown[0])} is a layer of $.provenance.model.layers",
            got=f"{len(unknown)} that are not: {', '.join(unknown[:_SHOWN])}",
            fix="Correct the name; for a model with other names, use rebase() on the plan as it was.",
        )
    if missing:
        raise PlanError(
            "$.layers has all layers of $.provenance.model.layers",
            got=f"{len(missing)} missing: {', '.join(missing[:_SHOWN])}",
            fix='A layer that is to stay as it is has {"scheme": "none"}.',
        )


def _check_units(units: Mapping[str, tuple[str, ...]], layers: Mapping[str, Scheme]) -> None:
    """Refuse units of unknown layers, of layers with different schemes, or that share a layer."""
    owners: dict[str, str] = {}
    for unit, group in units.items():
        if len(set(group)) != len(group):
            raise PlanError(f"{unit_path(unit)} is a list of layers, each once", got=", ".join(group[:_SHOWN]))
        unknown = [layer for layer in group if layer not in layers]
        if unknown:
            raise PlanError(f"{unit_path(unit)} is a list of layers of the plan", got=", ".join(unknown[:_SHOWN]))
        schemes = sorted({str(layers[layer]) for layer in group})
        if len(schemes) > 1:
            raise PlanError(
                f"{unit_path(unit)}: its layers have one scheme",
                got=", ".join(schemes),
                fix="Give them the same scheme, or take the unit out of the plan.",
            )
        shared = [layer for layer in group if owners.setdefault(layer, unit) != unit]
        if shared:
            raise PlanError(f"{unit_path(unit)}: a layer is in one unit", got=", ".join(shared[:_SHOWN]))
