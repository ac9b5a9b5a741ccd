"""A reader of Thrift's compact protocol that accepts only what it was told to expect.

A form is ``"i16"``, ``"i32"``, ``"i64"``, ``"binary"``, a list of one form, or for a struct a mapping from field number
to form. Fields come in order, each at most once, with the type of their form; nothing is skipped, because what one
reader skips another may read.
"""

from __future__ import annotations

from typing import Any

Form = str | list[Any] | dict[int, Any]

_BITS = {"i16": 16, "i32": 32, "i64": 64}
_LONGEST_LIST = 1024
_I16, _I32, _I64, _BINARY, _LIST, _STRUCT = 4, 5, 6, 8, 9, 12
_CODES = {"i16": _I16, "i32": _I32, "i64": _I64, "binary": _BINARY}


def read_struct(data: bytes, at: int, form: dict[int, Any]) -> tuple[dict[int, Any], int]:
    """A struct's fields by number, and where it ends.

    Raises:
        ValueError: if the bytes are anything but a struct of this form.
    """
    found: dict[int, Any] = {}
    field = 0
    while True:
        byte = _byte(data, at)
        at += 1
        if byte == 0:
            return found, at
        field += byte >> 4
        if byte < 16 or field not in form:
            raise ValueError(f"it has a field {field} that autoq does not write")
        if byte & 15 != _code(form[field]):
            raise ValueError(f"its field {field} has another type")
        found[field], at = _value(data, at, form[field])


def _code(form: Form) -> int:
    if type(form) is str:
        return _CODES[form]
    return _LIST if type(form) is list else _STRUCT


def _value(data: bytes, at: int, form: Form) -> tuple[Any, int]:
    if type(form) is dict:
        return read_struct(data, at, form)
    if type(form) is list:
        return _list(data, at, form[0])
    if form == "binary":
        size, at = _varint(data, at, 32)
        if at + size > len(data):
            raise ValueError("it ends within a text")
        return data[at : at + size], at + size
    value, at = _varint(data, at, _BITS[str(form)])
    return (value >> 1) ^ -(value & 1), at


def _list(data: bytes, at: int, form: Form) -> tuple[list[Any], int]:
    head = _byte(data, at)
    count, at = (head >> 4, at + 1) if head < 0xF0 else _varint(data, at + 1, 32)
    if head & 15 != _code(form) or count > _LONGEST_LIST:
        raise ValueError(f"it has a list of {count:,}, or of another type")
    found = []
    for _ in range(count):
        value, at = _value(data, at, form)
        found.append(value)
    return found, at


def _varint(data: bytes, at: int, bits: int) -> tuple[int, int]:
    value = _byte(data, at)
    at += 1
    if value < 0x80:
        return value, at
    value &= 0x7F
    shift = 7
    while True:
        byte = _byte(data, at)
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift >= bits:
            raise ValueError(f"it has a number of more than {bits} bits")
    if value >> bits:
        raise ValueError(f"it has a number of more than {bits} bits")
    return value, at


def _byte(data: bytes, at: int) -> int:
    if at >= len(data):
        raise ValueError("it ends too early")
    return data[at]
