"""The quantization schemes autoq chooses from.

``ALL`` has every scheme of autoq in every variant (the mixes at their usual ``m_switch``), ``DEFAULT`` those a search
considers unless told otherwise, ``installed()`` those of other packages, and ``parse`` reads one from its name:
``parse("sinq(bits=4,group_size=64)")``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType

from autoq import plugins
from autoq.candidates.affine import AffineCandidate
from autoq.candidates.base import Candidate, LinearOp, Packed
from autoq.candidates.dynamic import Int4Dynamic, Int4Mix, Int8Mix
from autoq.candidates.fp6 import Fp6
from autoq.candidates.int4_hqq import Int4Hqq
from autoq.candidates.int8 import Int8Dynamic, Int8WeightOnly
from autoq.candidates.none import Unquantized
from autoq.candidates.sinq import Sinq
from autoq.errors import CandidateError
from autoq.scheme import BITS, FORMATS, GROUP_SIZES, METHODS, Scheme, Value

__all__ = ["ALL", "DEFAULT", "AffineCandidate", "Candidate", "LinearOp", "Packed", "installed", "parse"]

_CLASSES: Mapping[str, type[Candidate]] = MappingProxyType(
    {
        kind.key: kind
        for kind in (
            Unquantized,
            Int8WeightOnly,
            Int8Dynamic,
            Int4Hqq,
            Sinq,
            Fp6,
            Int4Dynamic,
            Int8Mix,
            Int4Mix,
        )
    }
)

ALL: tuple[Candidate, ...] = (
    Unquantized(),
    Int8WeightOnly(),
    Int8Dynamic(),
    *(Int4Hqq(group_size=g) for g in GROUP_SIZES),
    *(Sinq(bits=b, group_size=g) for b in BITS for g in GROUP_SIZES),
    *(Fp6(format=f) for f in FORMATS),
    *(Int4Dynamic(group_size=g, method=m) for m in METHODS for g in GROUP_SIZES),
    Int8Mix(),
    *(Int4Mix(group_size=g, method=m) for m in METHODS for g in GROUP_SIZES),
)

DEFAULT: tuple[Candidate, ...] = (
    Unquantized(),
    Int8WeightOnly(),
    Int8Dynamic(),
    Int4Hqq(group_size=64),
    Int4Hqq(group_size=128),
    Sinq(bits=4, group_size=64),
    Fp6(format="e3m2"),
    Fp6(format="e2m3"),
)


def parse(value: str | Scheme | Mapping[str, Value]) -> Candidate:
    """The candidate of a scheme; fields left out take their defaults.

    Args:
        value: the display form, the stored JSON object, or a :class:`~autoq.scheme.Scheme`.

    Raises:
        CandidateError: if neither autoq nor an installed plugin has such a scheme or field, a field's value is not
            allowed, or the plugin does not work.
    """
    scheme = Scheme.of(value)
    kind = _CLASSES.get(scheme.name) or _plugin(scheme.name)
    known = [field.name for field in fields(kind)]
    names = [name for name, _ in scheme.fields]
    for name in names:
        if name not in known or names.count(name) > 1:
            raise CandidateError(
                f"its fields are {', '.join(known)}, each at most once" if known else "it has no fields",
                where=scheme.name,
                got=repr(name),
            )
    return kind(**dict(scheme.fields))


def installed() -> tuple[Candidate, ...]:
    """The schemes of installed plugins, each with every combination of its fields' values.

    Raises:
        CandidateError: if a plugin does not work, or its key is taken; the package is named.
    """
    return tuple(one for plugin in plugins.installed() for one in _plugin(plugin.key).variants())


def _plugin(key: str) -> type[Candidate]:
    """The class of an installed plugin."""
    found = plugins.load(key)
    if not issubclass(found, Candidate):
        raise plugins.unusable(key, "a plugin's class is a subclass of autoq.candidates.Candidate", found.__qualname__)
    return found
