"""A scheme as data: its name and its fields. What it computes is a candidate's business."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from autoq.errors import CandidateError

Value = int | float | str | bool

GROUP_SIZES = (32, 64, 128)
BITS = (3, 4, 5, 6, 8)
FORMATS = ("e3m2", "e2m3")
METHODS = ("hqq", "sinq")
M_SWITCHES = (8, 16, 32, 64, 128)

Choices = Mapping[str, tuple[Value, ...]]
"""Field → its values."""

FIELDS: Mapping[str, Choices] = MappingProxyType(
    {
        "none": {},
        "int8wo": {},
        "int8dq": {},
        "int4wo-hqq": {"group_size": GROUP_SIZES},
        "sinq": {"bits": BITS, "group_size": GROUP_SIZES},
        "fp6": {"format": FORMATS},
        "int4dq": {"group_size": GROUP_SIZES, "method": METHODS},
        "int8mix": {"m_switch": M_SWITCHES},
        "int4mix": {"group_size": GROUP_SIZES, "method": METHODS, "m_switch": M_SWITCHES},
    }
)
"""Scheme of autoq → field → its values; those of other packages: :func:`autoq.plugins.choices`. Plan files are checked
by it without importing torch; a field may be left out."""

_NAME = re.compile(r"[a-z][a-z0-9-]*")
_FIELD = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Scheme:
    """A quantization scheme by name and fields, as it stands in plans and tables.

    ``str(scheme)`` is the display form, ``int4wo-hqq(group_size=64)``; ``to_json`` the stored one,
    ``{"scheme": "int4wo-hqq", "group_size": 64}``.

    Attributes:
        name: the candidate's key, lower case with dashes.
        fields: (field, value) pairs, sorted by field.
    """

    name: str
    fields: tuple[tuple[str, Value], ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise CandidateError(
                "a scheme's name has lower-case letters, digits and dashes",
                got=repr(self.name),
                fix="Write for example int8wo or int4wo-hqq(group_size=64).",
            )
        for key, value in self.fields:
            if not _FIELD.fullmatch(key) or not isinstance(value, int | float | str):
                raise CandidateError(
                    "a scheme's fields are named numbers, booleans or words",
                    where=self.name,
                    got=f"{key!r}={value!r}",
                )
        object.__setattr__(self, "fields", tuple(sorted(self.fields)))

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read the display form, for example ``sinq(bits=4,group_size=64)``.

        Raises:
            CandidateError: if the text is not a name with optional ``(field=value,…)``.
        """
        match = re.fullmatch(r"\s*([^()\s]+)\s*(?:\(([^()]*)\))?\s*", text)
        if match is None:
            raise CandidateError(
                "a scheme is written name or name(field=value,…)",
                got=repr(text),
                fix="For example sinq(bits=4,group_size=64).",
            )
        pairs: list[tuple[str, Value]] = []
        for item in (match[2] or "").split(","):
            if not item.strip():
                continue
            key, equals, value = item.partition("=")
            if not equals:
                raise CandidateError("a scheme's field is written field=value", where=text, got=repr(item))
            pairs.append((key.strip(), _value(value.strip())))
        return cls(name=match[1], fields=tuple(pairs))

    @classmethod
    def of(cls, value: Scheme | str | Mapping[str, Value]) -> Scheme:
        """A scheme from any of its forms: itself, the display string, or the JSON object."""
        if isinstance(value, Scheme):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        name = value.get("scheme")
        if not isinstance(name, str):
            raise CandidateError(
                'a scheme object has a "scheme" name',
                got=json.dumps(dict(value), default=str),
                fix='Write {"scheme": "int8wo"}.',
            )
        return cls(name=name, fields=tuple((k, v) for k, v in value.items() if k != "scheme"))

    def to_json(self) -> dict[str, Value]:
        """The stored form, name first."""
        return {"scheme": self.name, **dict(self.fields)}

    def __str__(self) -> str:
        if not self.fields:
            return self.name
        return f"{self.name}({','.join(f'{k}={v}' for k, v in self.fields)})"


NONE = Scheme(name="none")  # the layer as it is


def _value(text: str) -> Value:
    if text in ("true", "True"):
        return True
    if text in ("false", "False"):
        return False
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
