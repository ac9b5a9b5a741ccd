"""Names of layers: without wrappers' prefixes, and of one model as another model has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from autoq.errors import PlanError

if TYPE_CHECKING:
    from torch import nn

Shape = tuple[int, int]  # [N, K] of a weight: outputs, inputs

_WRAPPERS = ("_orig_mod.", "module.")
_PEFT = "base_model.model."  # a PEFT model's name for the model that it adapts
_ADAPTED = ".base_layer"  # an adapted layer's name for the layer itself
_SHOWN = 5  # names in a message


def plain_name(name: str) -> str:
    """A layer's name without the prefixes of wrappers: torch.compile's, DistributedDataParallel's and PEFT's.

    ``_orig_mod.`` and ``module.`` go wherever they stand, PEFT's ``base_model.model.`` at the start only, and its
    ``.base_layer``, the layer beside the adapters, everywhere; so do wrappers in wrappers. A plain name is its own.
    """
    before = ""
    while name != before:
        before = name
        name = _unwrapped(name).removeprefix(_PEFT).replace(f"{_ADAPTED}.", ".").removesuffix(_ADAPTED)
    return name


def group_name(group: Sequence[str]) -> str:
    """The name of layers that are decided together: theirs where they agree; where they do not, all that stands there.

    ``blocks.0.attn.q`` and ``blocks.0.attn.k`` are ``blocks.0.attn.q+k``; numbers are shortened to ``0-7``.
    """
    parts = [name.split(".") for name in group]
    if len({len(one) for one in parts}) > 1:
        return "+".join(group)
    return ".".join(_listed(list(dict.fromkeys(column))) for column in zip(*parts, strict=True))


def renamed_groups(groups: Mapping[str, tuple[str, ...]], names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Groups of layers under other names; a group's own name changes with them, unless someone chose it."""
    found: dict[str, tuple[str, ...]] = {}
    for unit, group in groups.items():
        members = tuple(names[name] for name in group)
        made = group_name(group)
        chosen = unit.rstrip("+") != made  # equal names are told apart by a + at the end
        name = unit if chosen else group_name(members) + unit.removeprefix(made)
        while name in found:
            name += "+"
        found[name] = members
    return found


def _listed(values: Sequence[str]) -> str:
    numbers = [int(value) for value in values if value.isdigit()]
    if len(numbers) == len(values) > 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{numbers[0]}-{numbers[-1]}"
    return "+".join(values)


def renaming(wanted: Sequence[str], shapes: Mapping[str, Shape], model: nn.Module) -> dict[str, str]:
    """The names that a model has for a plan's layers: the same ones, or all with one prefix more or less.

    Args:
        wanted: plain names.
        shapes: [N, K] of those whose shape is known.
        model: plain or wrapped; nothing of it is run.

    Returns:
        Wanted name → plain name in the model.

    Raises:
        PlanError: if a layer is not there, if several prefixes fit, or if a layer has another shape.
    """
    found = _linears(model)
    plain = {plain_name(name): plain_name(name) for name in found}
    # `base_model` may be the user's own name for a part: then its prefix counts like any other.
    own = {_unwrapped(name): plain_name(name) for name in found}
    fits = _fits(wanted, plain) or _fits(wanted, own)
    if not fits:
        raise _incomplete(wanted, plain)
    if len(fits) > 1:
        first = wanted[0]
        raise PlanError(
            "the plan's layers are the model's under one prefix",
            got=f"several that fit: {first} may be {' or '.join(sorted(fit[first] for fit in fits)[:_SHOWN])}",
            fix="Rename the layers in the plan by hand.",
        )
    (names,) = fits
    here = {plain_name(name): shape for name, shape in found.items()}
    other = [
        f"{name} is {list(here[names[name]])} in the model, {list(shape)} in the plan"
        for name, shape in shapes.items()
        if name in names and here[names[name]] != shape
    ]
    if other:
        raise PlanError(
            "the model's layers have the shapes [outputs, inputs] that the plan was made for",
            got=f"{len(other)} others: {'; '.join(other[:_SHOWN])}",
            fix="The plan is for another model.",
        )
    return names


def _unwrapped(name: str) -> str:
    before = ""
    while name != before:  # one pass leaves a wrapper right inside another of its kind
        before = name
        for prefix in _WRAPPERS:
            name = name.replace(f".{prefix}", ".").removeprefix(prefix)
    return name


def _linears(model: nn.Module) -> dict[str, Shape]:
    """Shapes of what is a linear layer, quantized or not, under every name it has."""
    found: dict[str, Shape] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for outputs, inputs in (("out_features", "in_features"), ("nf", "nx")):  # the latter of transformers' Conv1D
            n, k = getattr(module, outputs, None), getattr(module, inputs, None)
            if isinstance(n, int) and isinstance(k, int):
                found[name] = (n, k)
    return found


def _fits(wanted: Sequence[str], known: Mapping[str, str]) -> list[dict[str, str]]:
    """The ways in which all wanted layers are known ones; the same names before any prefix."""
    fits: list[dict[str, str]] = []
    for names in _readings(wanted, known):
        if all(name in known for name in names):
            fit = {one: known[name] for one, name in zip(wanted, names, strict=True)}
            if names == list(wanted):
                return [fit]
            if fit not in fits:
                fits.append(fit)
    return fits


def _readings(wanted: Sequence[str], known: Mapping[str, str]) -> Iterator[list[str]]:
    """The wanted names as they are, with each prefix that could be added, and without each that all have."""
    yield list(wanted)
    if not wanted:
        return
    first = min(wanted, key=len)
    for prefix in sorted({name.removesuffix(first) for name in known if name.endswith(f".{first}")}):
        yield [f"{prefix}{name}" for name in wanted]
    parts = first.split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        if all(name.startswith(prefix) for name in wanted):
            yield [name.removeprefix(prefix) for name in wanted]


def _incomplete(wanted: Sequence[str], known: Mapping[str, str]) -> PlanError:
    """What is not in the model, read in the way that finds most."""
    lacks = (
        [one for one, name in zip(wanted, names, strict=True) if name not in known]
        for names in _readings(wanted, known)
    )
    missing = min(lacks, key=len)
    return PlanError(
        "the model has all of the plan's layers, under the same names or with one prefix more or less",
        got=f"{len(missing)} of {len(wanted)} that it lacks: {', '.join(missing[:_SHOWN])}",
        fix="The plan is for another model, or its layers were renamed one by one.",
    )
