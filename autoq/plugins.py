"""Schemes of other packages: found by their entry points, and imported when one is asked for by its key.

A package offers a scheme with an entry point of the group ``autoq.candidates``: its name is the scheme's key, its
object the class. A plan or a checkpoint never names a module: its keys are only looked up among the entry points of
installed packages.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from autoq.errors import AutoqError, CandidateError
from autoq.scheme import FIELDS, Choices, Scheme

__all__ = ["Plugin", "installed", "load"]

GROUP = "autoq.candidates"

# What importing a module with a mistake in it raises, and making an object of such a class.
_BROKEN = (
    ImportError,
    AttributeError,
    NameError,
    SyntaxError,
    TypeError,
    ValueError,
    LookupError,
    OSError,
    RuntimeError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """A scheme that an installed package offers; nothing of it is imported yet.

    Attributes:
        key: the scheme's name.
        distribution: name of the package, as pip knows it.
        version: of the package.
        target: the entry point's object, ``module:Class``.
    """

    key: str
    distribution: str
    version: str
    target: str

    @property
    def package(self) -> str:
        """The package with its version."""
        return f"{self.distribution} {self.version}"

    def __str__(self) -> str:
        return f"{self.package}, entry point {self.key} = {self.target}"


def installed() -> tuple[Plugin, ...]:
    """All plugins, sorted by key.

    Raises:
        CandidateError: if two packages offer one key, or one offers a key of autoq's own.
    """
    found = tuple(sorted((_plugin(one) for one in entry_points(group=GROUP)), key=lambda one: (one.key, str(one))))
    for plugin in found:
        if plugin.key in FIELDS:
            raise unusable(plugin.key, "a plugin's key is none of autoq's own", plugin.key)
        _check_alone(plugin.key, sum(other.key == plugin.key for other in found))
    return found


@functools.cache
def load(key: str) -> type:
    """The class of an installed plugin; imports its module.

    Args:
        key: the scheme's name.

    Raises:
        CandidateError: if no package offers that key, several do, or the class is not what a scheme's has to be.
    """
    point = _find(key)
    try:
        found = point.load()
        fault = _fault(found, key)
    except (*_BROKEN, AutoqError) as problem:
        raise unusable(key, "a plugin can be imported", f"{type(problem).__name__}: {problem}") from problem
    if fault is not None:
        raise unusable(key, *fault)
    kind: type = found
    return kind


def is_installed(key: str) -> bool:
    """Whether a package offers that key; imports nothing."""
    return bool(entry_points(group=GROUP, name=key))


def choices(key: str) -> Choices:
    """The fields of a plugin's scheme, and the values each may have.

    Raises:
        CandidateError: as ``load`` does.
    """
    found: Choices = load(key).choices  # type: ignore[attr-defined] # checked by load
    return found


def origins(keys: Iterable[str]) -> dict[str, str]:
    """Key → package and version, of those keys that are plugins'.

    Raises:
        CandidateError: if no package offers one of them, or several do.
    """
    return {key: _plugin(_find(key)).package for key in sorted(set(keys) - set(FIELDS))}


def fingerprints(keys: Iterable[str]) -> dict[str, str]:
    """Key → what its losses depend on: package, version and a hash of the module's source, of those that are plugins'.

    Raises:
        CandidateError: as ``load`` does.
    """
    return {key: f"{package}, source {_source_hash(load(key))}" for key, package in origins(keys).items()}


def unusable(key: str, rule: str, got: object) -> CandidateError:
    """The error about plugins of a key, which names packages and entry points.

    Args:
        key: the scheme's name.
        rule: what must hold.
        got: what was found instead.
    """
    concerned = [_plugin(one) for one in entry_points(group=GROUP, name=key)]
    names = " or ".join(dict.fromkeys(one.distribution for one in concerned))
    where = "; ".join(map(str, concerned))
    return CandidateError(rule, where=where, got=got, fix=f"Repair or uninstall {names}.")


def _find(key: str) -> EntryPoint:
    points = list(entry_points(group=GROUP, name=key))
    if not points:
        raise CandidateError(
            "the scheme is one that autoq or an installed plugin has",
            got=repr(key),
            fix=f"Choose from {', '.join(FIELDS)}, or install the package that has it.",
        )
    _check_alone(key, len(points))
    return points[0]


def _plugin(point: EntryPoint) -> Plugin:
    name, version = (point.dist.name, point.dist.version) if point.dist is not None else ("?", "?")
    return Plugin(key=point.name, distribution=name, version=version, target=point.value)


def _check_alone(key: str, count: int) -> None:
    if count > 1:
        raise unusable(key, "a key is offered once", f"{count} entry points {key}")


def _fault(found: object, key: str) -> tuple[str, object] | None:
    """The rule that an entry point's object breaks, and how; makes an object of the class."""
    if not (inspect.isclass(found) and is_dataclass(found)):
        return "a plugin is a dataclass", repr(found)
    if getattr(found, "key", None) != key:
        return "a plugin's class has its entry point's name as key", f"key = {getattr(found, 'key', None)!r}"
    own, given = sorted(field.name for field in fields(found)), getattr(found, "choices", None)
    if not isinstance(given, Mapping) or sorted(given) != own:
        return f"a plugin's choices have the values of each field: {', '.join(own) or 'none'}", repr(given)
    for field, values in given.items():
        if not isinstance(values, tuple) or not values:
            return f"choices[{field!r}] is a tuple of values", repr(values)
        for value in values:
            Scheme(name=key, fields=((field, value),))
    found()  # refuses a class with abstract methods, fields without a default, or a default that is no choice
    return None


def _source_hash(kind: type) -> str:
    """Eight hexadecimal digits of the file that defines a class; nothing where there is none."""
    path = inspect.getsourcefile(kind)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8] if path and Path(path).is_file() else "unknown"
