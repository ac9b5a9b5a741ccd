"""What every export checks: schemes that the other program lacks, and layers that it runs as one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from autoq.errors import PlanError
from autoq.plan import Plan
from autoq.plan_text import layer_path
from autoq.scheme import NONE, Scheme

# What servers run as one product, so that it needs one scheme → vLLM's name of it.
_FUSED: Mapping[tuple[str, ...], str] = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("query", "key", "value"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("w1", "w3"): "gate_up_proj",
    ("q_a_proj", "kv_a_proj_with_mqa"): "fused_qkv_a_proj",
}
_ONLY_TOGETHER = {("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa")}  # either alone is something else
_EXPERT = re.compile(r"(?P<block>.*\bexperts)\.\d+\.(?P<role>.+)")
_SPLIT = re.compile(r".*\bexperts\.\d+\.gate_up_proj")
_SHOWN = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """Layers that servers run as one.

    Attributes:
        layers: their names, of layers too that the plan does not name.
        pattern: of ``ties``, which ties such layers.
        name: vLLM's name of the layer that they are there.
        experts: whether they are the experts of a block; ``name`` is then the module that holds them.
    """

    layers: tuple[str, ...]
    pattern: str
    name: str
    experts: bool = False


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
    for group in fused(plan):
        found: dict[str, list[str]] = {}
        for name in group.layers:
            found.setdefault(str(plan.layers.get(name, NONE)), []).append(name)
        if len(found) == 1:
            continue
        got = "; ".join(f"{scheme}: {_listed(members)}" for scheme, members in found.items())
        siblings = "" if group.experts else " or ties='siblings',"  # which ties experts role by role
        raise PlanError(
            f"{layer_path(group.layers[0])}: {program}'s servers run {len(group.layers)} layers as one, so they have "
            "one scheme",
            got=got,
            fix=f"Tune with ties={group.pattern!r} (--tie '{group.pattern}'),{siblings} or change them with "
            "plan.replace().",
        )


def check_names(plan: Plan, program: str) -> None:
    """Refuse layers that ``split_experts`` made: in the model that the program loads, there are none of these names.

    Args:
        plan: what to check.
        program: the target's name, for the message.

    Raises:
        PlanError: naming the first of them that is quantized.
    """
    for layer, scheme in plan.layers.items():
        if scheme != NONE and _SPLIT.fullmatch(layer):
            raise PlanError(
                f"{layer_path(layer)}: {program} finds layers by their names in the model as transformers loads it",
                got="an expert's layer that autoq.split_experts made",
                fix="Tune the model without split_experts, or take the experts out of the plan.",
            )


def fused(plan: Plan) -> list[Fused]:
    """The groups of a plan's layers that servers run as one."""
    experts: dict[str, list[str]] = {}
    parents: dict[str, set[str]] = {}
    for layer in plan.layers:
        expert = _EXPERT.fullmatch(layer)
        if expert is not None:
            experts.setdefault(expert["block"], []).append(layer)
        else:
            parent, _, role = layer.rpartition(".")
            parents.setdefault(parent, set()).add(role)
    groups = [
        Fused(
            layers=tuple(layers),
            pattern=rf"(.*\.{re.escape(block.rpartition('.')[2])})\.\d+\..*",
            name=block,
            experts=True,
        )
        for block, layers in experts.items()
    ]
    for parent, roles in parents.items():
        before = f"{parent}." if parent else ""
        for names, name in _FUSED.items():
            if _runs_as_one(names, roles):
                layers = tuple(before + one for one in names)
                groups.append(Fused(layers=layers, pattern=rf"(.*)\.(?:{'|'.join(names)})", name=before + name))
    return groups


def _runs_as_one(names: tuple[str, ...], roles: set[str]) -> bool:
    """Whether the layers of a module are fused; query, key and value are not where keys are compressed."""
    present = roles & set(names)
    if names in _ONLY_TOGETHER:
        return len(present) == len(names)
    return bool(present) and not any(role.startswith("kv_") for role in roles)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
