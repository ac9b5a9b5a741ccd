"""Changes of valid files: of bytes, of numbers, of JSON values, of a safetensors header, of what is at the end."""

import json
import random
import struct
from typing import Any

NUMBERS = (0, 1, -1, 2, 7, 63, 64, 127, 128, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1)
NUMBERS += (2**63, 2**64 - 1, 2**64, -(2**31), -(2**63), 10**30)
TEXTS = ("", "int8wo", "int4wo-hqq", "../x", "/etc/passwd", "a" * 5000, "\0", "\ud800", "é", "none", "F32", "1e999")
VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"a": 1}, 0.5, -0.0, 1e308, *NUMBERS, *TEXTS)
VALUES += (float("nan"), float("inf"))


def mutated(data: bytes, drawn: random.Random, others: list[bytes]) -> bytes:
    """A changed copy of a file.

    Args:
        data: its content.
        drawn: decides everything.
        others: contents of files to take pieces from.
    """
    for _ in range(drawn.choice((1, 1, 1, 2, 3, 8))):
        changed = _structured(data, drawn) if drawn.random() < 0.45 else None
        data = changed or _bytes(data, drawn, others)
    return data


def _structured(data: bytes, drawn: random.Random) -> bytes | None:
    """A change of a JSON value in JSON, lines of JSON or a safetensors header; None for anything else."""
    if data[:1] in (b"{", b"["):
        lines = data.split(b"\n")
        if len(lines) > 3 and all(line[:1] == b"{" for line in lines if line):
            at = drawn.randrange(len(lines))
            lines[at] = _json(lines[at], drawn) or b"{}"
            return b"\n".join(lines)
        return _json(data, drawn)
    if len(data) > 10 and data[8:9] == b"{":
        (length,) = struct.unpack("<Q", data[:8])
        changed = _json(data[8 : 8 + length], drawn)
        return None if changed is None else struct.pack("<Q", len(changed)) + changed + data[8 + length :]
    return None


def _json(data: bytes, drawn: random.Random) -> bytes | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    places = list(_places(value))
    if not places:
        return None
    holder, key = drawn.choice(places)
    action = drawn.randrange(5)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[drawn.choice(TEXTS)] = holder.pop(key)
    elif action == 2 and isinstance(holder[key], int | float):
        holder[key] = drawn.choice(
            (holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2, float(holder[key]))
        )
    elif action == 3:
        other, name = drawn.choice(places)
        holder[key] = json.loads(
            json.dumps(other.get(name) if isinstance(other, dict) else other[name % len(other)] if other else None)
        )
    else:
        holder[key] = drawn.choice(VALUES)
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return None


def _places(value: Any) -> Any:
    """(container, key) of every value within."""
    if isinstance(value, dict):
        for key in list(value):
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield value, i
            yield from _places(one)


def _bytes(data: bytes, drawn: random.Random, others: list[bytes]) -> bytes:
    """A change of bytes, a third of the time near an end, where formats keep their headers."""
    size = len(data)
    if size == 0:
        return drawn.randbytes(drawn.randrange(64))
    near = drawn.choice((size, min(size, 300), -min(size, 300)))
    at = drawn.randrange(near) if near > 0 else size + drawn.randrange(near, 0)
    action = drawn.randrange(8)
    if action == 0:
        return data[:at] + bytes([data[at] ^ (1 << drawn.randrange(8))]) + data[at + 1 :]
    if action == 1:
        return data[:at] + bytes([drawn.choice((0, 1, 0x7F, 0x80, 0xFF, drawn.randrange(256)))]) + data[at + 1 :]
    if action == 2:
        number = drawn.choice(NUMBERS)
        form = drawn.choice(("<I", "<Q", ">I"))
        packed = struct.pack(form, number % (1 << (8 * struct.calcsize(form))))
        return data[:at] + packed + data[at + len(packed) :]
    if action == 3:
        return data[:at] + data[at + drawn.choice((1, 2, 4, 8, 64)) :]
    if action == 4:
        return data[:at] + drawn.randbytes(drawn.choice((1, 2, 4, 8, 64))) + data[at:]
    if action == 5:
        return data[:at]
    other = drawn.choice(others) or b"\0"
    start = drawn.randrange(len(other))
    piece = other[start : start + drawn.choice((1, 4, 16, 256, 4096))]
    return data[:at] + piece + (data[at:] if action == 6 else data[at + len(piece) :])
