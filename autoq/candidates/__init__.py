"""The quantization schemes autoq chooses from.

``ALL`` has every scheme in every variant (the mixes at their usual ``m_switch``), ``DEFAULT`` those a search
considers unless told otherwise, and ``parse`` reads one from its name: ``parse("sinq(bits=4,group_size=64)")``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from autoq.candidates.base import Candidate, LinearOp, Packed
from autoq.candidates.dynamic import Int4Dynamic, Int4Mix, Int8Mix
from autoq.candidates.fp6 import Fp6
from autoq.candidates.int4_hqq import Int4Hqq
from autoq.candidates.int8 import Int8Dynamic, Int8WeightOnly
from autoq.candidates.none import Unquantized
from autoq.candidates.sinq import Sinq
from autoq.errors import CandidateError
from autoq.scheme import BITS, FORMATS, GROUP_SIZES, METHODS, Scheme, Value

__all__ = ["ALL", "DEFAULT", "Candidate", "LinearOp", "Packed", "parse"]

_CLASSES: tuple[type[Candidate], ...] = (
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
        CandidateError: if there is no such scheme or field, or a field's value is not allowed.
    """
    scheme = Scheme.of(value)
    for kind in _CLASSES:
        if kind.key == scheme.name:
            break
    else:
        raise CandidateError(
            "the scheme is one autoq knows",
            got=repr(scheme.name),
            fix=f"Choose from {', '.join(kind.key for kind in _CLASSES)}.",
        )
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
