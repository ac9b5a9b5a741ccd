"""Units: which layers get one scheme together. Each decides alone, or siblings do, or what the user's patterns tie."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from autoq.candidates import Candidate, LinearOp
from autoq.errors import InputError
from autoq.knapsack_problem import Problem
from autoq.plan_names import group_name
from autoq.scheme import NONE, Scheme
from autoq.workload import Workload

LAYERS = "layers"
SIBLINGS = "siblings"
Ties = str | Sequence[str]
Units = dict[str, tuple[str, ...]]
_Offered = Mapping[str, set[Scheme]]


def checked(ties: Ties | None) -> tuple[str, ...]:
    """What ``tune`` was told about ties, in one form.

    Args:
        ties: None or ``layers``: none; ``siblings``: those found while recording; a regular expression or several.
            With ``siblings`` among several, patterns go first and siblings are tied among the other layers.

    Returns:
        The patterns, and ``siblings`` where it was named; empty where every layer decides alone.

    Raises:
        InputError: if something is no regular expression, or ``layers`` is named beside others.
    """
    if ties is None or ties == LAYERS:
        return ()
    given = (ties,) if isinstance(ties, str) else tuple(ties)
    if given == (LAYERS,):
        return ()
    for one in given:
        if not isinstance(one, str) or one == LAYERS:
            raise InputError(
                "ties are 'layers' alone, or 'siblings' and regular expressions of layers' names",
                got=repr(ties),
                fix="For example ties='siblings' or ties=['(.*)[.](?:q|k|v)_proj'].",
            )
        try:
            re.compile(one)
        except re.error as problem:
            raise InputError("a tie is a regular expression", where=repr(one), got=str(problem)) from problem
    return tuple(dict.fromkeys(given))


def units(workload: Workload, ties: Sequence[str], candidates: Sequence[Candidate]) -> Units:
    """The layers that are decided together.

    A pattern ties layers that it matches as a whole and with the same captured groups.

    Args:
        workload: its quantizable layers are decided, its siblings tied if asked for.
        ties: as ``checked`` gives them.
        candidates: the schemes to choose from.

    Returns:
        Unit's name → its layers, in the model's order; a layer alone is a unit of its own name. Siblings that have no
        scheme in common but ``none`` decide alone.

    Raises:
        InputError: naming the pattern, if it matches no quantizable layer, one that another pattern matches, or layers
            without a common scheme; or if it ties nothing and siblings are not tied either.
    """
    names = [layer.name for layer in workload.quantizable]
    offered = {name: _offered(workload, name, candidates) for name in names} if ties else {}
    groups: list[tuple[str, ...]] = []
    matched: dict[str, str] = {}
    for pattern in ties:
        if pattern == SIBLINGS:
            continue
        found = _matches(pattern, names)
        if not found:
            raise InputError(
                "a tie's pattern matches whole names of layers that may be quantized",
                where=repr(pattern),
                got=f"none of {len(names)} layers, such as {names[0]}",
            )
        if SIBLINGS not in ties and all(len(group) == 1 for group in found):
            raise InputError(
                "a tie's pattern captures the same groups from two layers or more",
                where=repr(pattern),
                got=f"{len(found)} different matches, such as {found[0][0]}",
                fix="Capture what the layers share, as in '(.*)[.](?:q|k|v)_proj'.",
            )
        for group in found:
            _check(pattern, group, matched, offered)
            matched |= dict.fromkeys(group, pattern)
        groups += found
    if SIBLINGS in ties:
        free = set(names) - set(matched)
        rest = [tuple(name for name in group if name in free) for group in workload.siblings]
        groups += [group for group in rest if _common(group, offered)]
    return _named(names, groups)


def tied(problem: Problem) -> Units:
    """A problem's units of several layers, as a plan lists them."""
    return {unit.name: unit.layers for unit in problem.units if len(unit.layers) > 1}


def _matches(pattern: str, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The layers a pattern matches, grouped by what it captures."""
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for name in names:
        if match := re.fullmatch(pattern, name):
            groups.setdefault(match.groups(), []).append(name)
    return [tuple(group) for group in groups.values()]


def _check(pattern: str, group: tuple[str, ...], matched: Mapping[str, str], offered: _Offered) -> None:
    twice = next((name for name in group if name in matched), None)
    if twice is not None:
        raise InputError(
            "a layer is matched by one tie", where=repr(pattern), got=f"{twice}, which {matched[twice]!r} matches too"
        )
    if len(group) > 1 and not _common(group, offered):
        lists = "; ".join(f"{name}: {', '.join(sorted(map(str, offered[name]))) or 'none'}" for name in group[:4])
        raise InputError("tied layers have a scheme in common besides none", where=repr(pattern), got=lists)


def _common(group: Sequence[str], offered: _Offered) -> set[Scheme]:
    """Schemes that all layers of a group can have, besides ``none``."""
    return set.intersection(*(offered[name] for name in group)) if group else set()


def _offered(workload: Workload, layer: str, candidates: Sequence[Candidate]) -> set[Scheme]:
    """The schemes besides ``none`` that can run all calls of a layer."""
    info = workload.layer(layer)
    ops = [
        LinearOp(m=call.m, k=info.k, n=info.n, dtype=getattr(torch, call.dtype), device=info.device, bias=info.bias)
        for call in workload.calls_of(layer)
    ]
    quantizing = [one for one in candidates if one.scheme != NONE]
    return {one.scheme for one in quantizing if all(one.why_not(op) is None for op in ops if op.m > 0)}


def _named(names: Sequence[str], groups: Iterable[tuple[str, ...]]) -> Units:
    """Groups by name, with all layers outside them alone, in the layers' order."""
    group_of = {name: group for group in groups for name in group}
    taken = set(names)
    found: Units = {}
    for layer in names:
        group = group_of.get(layer, (layer,))
        if len(group) == 1:
            found[layer] = group
        elif layer == group[0]:
            name = group_name(
                group
            )  # differs from other groups' in that it begins with this layer's, but not from any name
            while name in taken:
                name += "+"
            found[name] = group
            taken.add(name)
    return found
