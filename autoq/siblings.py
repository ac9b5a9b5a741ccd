"""Which layers belong together: those that are always called with the same inputs, and those of one role in experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from autoq.modules import unwrap
from autoq.plan import plain_name
from autoq.workload import LayerInfo, LinearCall

_Group = tuple[str, ...]
_View = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]  # offset in the storage, dtype, shape, strides
_Role = tuple[str, int, int]  # an expert's layer by its name inside the expert, K and N


class Inputs:
    """Tells inputs of layers apart while a model runs.

    Two calls have the same input when they see the same elements of the same storage and nothing wrote to it in
    between. No input is kept: a storage that is freed is forgotten, whatever comes to lie at its address.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[torch.UntypedStorage, tuple[int, dict[_View, int]]] = WeakKeyDictionary()
        self._inputs: dict[str, set[int]] = {}
        self._count = 0

    def add(self, layer: str, x: Tensor) -> None:
        """A layer was called with ``x``."""
        self._inputs.setdefault(layer, set()).add(self._number(x))

    def of(self, layer: str) -> frozenset[int]:
        """The different inputs the layer was called with, by number; layers share a number when they share an input."""
        return frozenset(self._inputs.get(layer, ()))

    def _number(self, x: Tensor) -> int:
        if x.is_inference() or x.layout is not torch.strided:
            return self._next()  # without a version counter, or without a storage: never the same as another
        storage = x.untyped_storage()
        version, views = self._known.get(storage, (-1, {}))
        if version != x._version:
            views = {}
            self._known[storage] = (x._version, views)
        view = (int(x.storage_offset()), x.dtype, x.shape, x.stride())
        if view not in views:
            views[view] = self._next()
        return views[view]

    def _next(self) -> int:
        self._count += 1
        return self._count


def siblings(
    model: nn.Module, layers: Sequence[LayerInfo], calls: Iterable[LinearCall], inputs: Inputs
) -> tuple[_Group, ...]:
    """Groups of layers that belong together, each layer in one at most.

    Layers are siblings when all inputs of either are inputs of the other and the same module owns them: q, k and v of
    an attention, gate and up of an MLP. (One tensor may enter every block, as a time embedding does.) Experts of a
    block are siblings role by role. Groups that share a layer are one.

    Args:
        model: plain, compiled or wrapped.
        layers: the layers to group, all of which were called.
        calls: what was recorded, of other layers too.
        inputs: what they were called with.

    Returns:
        Groups of at least two names, both in the layers' order.
    """
    owners = _owners([layer.name for layer in layers])
    by_input: dict[tuple[str, frozenset[int]], list[str]] = {}
    for layer in layers:
        by_input.setdefault((owners[layer.name], inputs.of(layer.name)), []).append(layer.name)
    return _merged([layer.name for layer in layers], [*by_input.values(), *_experts(model, layers, calls)])


def _owners(names: Sequence[str]) -> dict[str, str]:
    """Layer → the nearest module around it that has another of the layers too; wrappers of one layer own nothing."""
    sizes: Counter[str] = Counter()
    for name in names:
        sizes.update(_around(name))
    return {name: next((module for module in _around(name) if sizes[module] > 1), "") for name in names}


def _around(name: str) -> list[str]:
    """The modules around a layer, the nearest first and the root, whose name is empty, last."""
    found = []
    while name:
        name = name.rpartition(".")[0]
        found.append(name)
    return found


def _experts(model: nn.Module, layers: Sequence[LayerInfo], calls: Iterable[LinearCall]) -> list[list[str]]:
    """Layers of one role and shape in the experts of a block.

    Experts are modules of one class in a list that either says so in its name, or lies inside a block and has tokens
    routed to it: in every role its modules see different numbers of rows. (Modules in sequence see the same.)
    """
    rows: dict[str, Counter[tuple[str, int]]] = {}
    for call in calls:
        rows.setdefault(call.layer, Counter())[call.phase, call.m] += call.count
    found: list[list[str]] = []
    for path, members in _lists(model).items():
        roles: dict[_Role, list[str]] = {}
        for layer in layers:
            member, _, role = layer.name.removeprefix(f"{path}.").partition(".") if path else layer.name.partition(".")
            if layer.name.startswith(f"{path}." if path else "") and member in members:
                roles.setdefault((role, layer.k, layer.n), []).append(layer.name)
        routed = all(any(rows.get(one) != rows.get(names[0]) for one in names) for names in roles.values())
        inside = any(part.isdigit() for part in path.split("."))
        if "expert" in path.rpartition(".")[2].lower() or (inside and routed):
            found += roles.values()
    return found


def _lists(model: nn.Module) -> dict[str, set[str]]:
    """Lists (and dictionaries) of modules of one class, by path, with the names of their members."""
    found: dict[str, set[str]] = {}
    for path, module in unwrap(model).named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and len({type(one) for one in module.children()}) == 1:
            found[plain_name(path)] = set(module._modules)
    return found


def _merged(names: Sequence[str], groups: Iterable[Sequence[str]]) -> tuple[_Group, ...]:
    """Groups that share a layer as one; groups of one layer dropped."""
    leader = {name: name for name in names}

    def of(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for group in groups:
        for name in group[1:]:
            leader[of(name)] = of(group[0])
    merged: dict[str, list[str]] = {}
    for name in names:
        merged.setdefault(of(name), []).append(name)
    return tuple(tuple(group) for group in merged.values() if len(group) > 1)
