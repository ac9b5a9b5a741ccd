"""What every export checks: schemes that the other program lacks, and layers that it runs as one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NoReturn

from autoq.errors import PlanError
from autoq.plan import Plan
from autoq.plan_text import layer_path
from autoq.scheme import NONE, Scheme

# Servers run these as one product, so they need one scheme.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))
_EXPERT = re.compile(r"(?P<block>.*\bexperts)\.\d+\.(?P<role>.+)")
_SHOWN = 6


def refused(program: str, layer: str, scheme: Scheme, reason: str, schemes: str) -> NoReturn:
    """Refuse a scheme by name.

    Args:
        program: the target's name.
        layer: that has the scheme.
        scheme: what the program lacks.
        reason: why nothing there is the same, as the end of a sentence that starts with the program.
        schemes: those that it has, for people.

    Raises:
        PlanError: always.
    """
    raise PlanError(
        f"{layer_path(layer)}: {program} {reason}",
        got=str(scheme),
        fix=f"It has {schemes}: tune with candidates among these, or change the layer with plan.replace().",
    )


def width(plan: Plan, layer: str) -> int | None:
    """The inputs K of a layer, where the plan knows them."""
    known = plan.provenance.get("model", {}).get("layers", {}).get(layer)
    return None if known is None else int(known["k"])


def group_size_of(plan: Plan, program: str, layer: str, scheme: Scheme) -> int:
    """The inputs in a group of an int4wo-hqq layer.

    Raises:
        PlanError: if the layer's width is no whole number of them.
    """
    size = int(dict(scheme.fields).get("group_size", 64))
    check_width(plan, program, layer, size)
    return size


def check_width(plan: Plan, program: str, layer: str, group: int) -> None:
    """Refuse a layer whose inputs are no multiple of the group: the program would leave it out, or pad it.

    Raises:
        PlanError: naming the layer.
    """
    k = width(plan, layer)
    if k is not None and k % group:
        raise PlanError(
            f"{layer_path(layer)}: {program} needs inputs in whole groups of {group}",
            got=f"{k} inputs",
            fix="Give the layer the scheme none, or a group size that divides its inputs.",
        )


def check_fused(plan: Plan, program: str) -> None:
    """Refuse layers with different schemes that the program's servers run as one.

    Query, key and value of an attention; gate and up of an MLP; all experts of a block, with their gate and up. A layer
    that the plan does not name stays as it is, and so differs from one that is quantized.

    Args:
        plan: what to check.
        program: the target's name, for the message.

    Raises:
        PlanError: naming the layers, and the pattern to tie them by.
    """
    for names, pattern in _fused(plan).items():
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(str(plan.layers.get(name, NONE)), []).append(name)
        if len(found) == 1:
            continue
        got = "; ".join(f"{scheme}: {_listed(members)}" for scheme, members in found.items())
        raise PlanError(
            f"{layer_path(names[0])}: {program}'s servers run {len(names)} layers as one, so they have one scheme",
            got=got,
            fix=f"Tune with ties={pattern!r} (--tie '{pattern}'), or ties='siblings', or change them with "
            "plan.replace().",
        )


def _fused(plan: Plan) -> Mapping[tuple[str, ...], str]:
    """Groups of layers that run as one → the pattern that ties such groups."""
    groups: dict[tuple[str, ...], str] = {}
    experts: dict[str, list[str]] = {}
    parents: dict[str, set[str]] = {}
    for layer in plan.layers:
        expert = _EXPERT.fullmatch(layer)
        if expert is not None:
            experts.setdefault(expert["block"], []).append(layer)
        else:
            parent, _, role = layer.rpartition(".")
            parents.setdefault(parent, set()).add(role)
    for block, layers in experts.items():
        groups[tuple(layers)] = rf"(.*\.{re.escape(block.rpartition('.')[2])})\.\d+\..*"
    for parent, roles in parents.items():
        for names in _FUSED:
            if _runs_as_one(names, roles):
                layers = [f"{parent}.{name}" if parent else name for name in names]
                groups[tuple(layers)] = rf"(.*)\.(?:{'|'.join(names)})"
    return groups


def _runs_as_one(names: tuple[str, ...], roles: set[str]) -> bool:
    """Whether the layers of a module are fused: w1 and w3 only where there are both; not where keys are compressed."""
    present = roles & set(names)
    if names == ("w1", "w3"):
        return len(present) == len(names)
    return bool(present) and not any(role.startswith("kv_") for role in roles)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
