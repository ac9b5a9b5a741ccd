"""A plan's JSON: in one form, with one text and one hash, and paths that say where something in it is."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from autoq._files import MAX_DEPTH, shown
from autoq.errors import PlanError

_WHOLE = 2**53  # whole floats below it are written without a fraction
_INLINE = 100  # characters of an object or list on one line
_LONGEST = 200  # characters of a key in a message
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Other than tab and newline: a terminal would obey them. Halves of surrogate pairs are no text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def plain(value: Any, path: str = "$", depth: int = 0) -> Any:
    """A copy in JSON's own types, numbers in one form: whole floats as integers.

    Raises:
        PlanError: with the JSON path of a value that JSON cannot hold, such as NaN.
    """
    if depth > MAX_DEPTH:
        raise PlanError(f"a plan is nested at most {MAX_DEPTH} deep", got=path[:_LONGEST])
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or not key.isprintable():
                raise PlanError(f"{path} has printable text as its keys", got=shown(key))
        return {key: plain(one, step(path, key), depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one, f"{path}[{index}]", depth + 1) for index, one in enumerate(value)]
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() and abs(value) < _WHOLE else float(value)
    if isinstance(value, float) or (isinstance(value, int) and not -(2**63) <= value < 2**64):
        raise PlanError(f"{path} is a finite number of at most 64 bits", got=shown(value))
    if isinstance(value, str) and _CONTROL.search(value):
        raise PlanError(f"{path} is text without control characters", got=shown(value))
    if not (value is None or isinstance(value, int | str)):
        raise PlanError(f"{path} is a JSON value", got=shown(value))
    return value


def finite(value: Any) -> Any:
    """A copy of nested figures in which null stands for what is no finite number."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text_of(value: Any, indent: int = 0) -> str:
    """The canonical text of a plain value: keys sorted, floats as short as they read back, small parts on one line."""
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    flat = json.dumps(value, sort_keys=True, ensure_ascii=False)
    if not nested or (len(flat) <= _INLINE and not any(isinstance(one, dict | list) and one for one in nested)):
        return flat
    inner = "\n" + " " * (indent + 1)
    if isinstance(value, dict):
        names = {key: json.dumps(key, ensure_ascii=False) for key in sorted(value)}
        rows = [f"{name}: {text_of(value[key], indent + 1)}" for key, name in names.items()]
    else:
        rows = [text_of(one, indent + 1) for one in value]
    body = f"{inner}{f',{inner}'.join(rows)}\n{' ' * indent}"
    return f"{{{body}}}" if isinstance(value, dict) else f"[{body}]"


def content_hash(value: Mapping[str, Any]) -> str:
    """SHA-256 over a plan's plain JSON object without its ``hash``: 64 hexadecimal digits, whatever the white space."""
    kept = {key: one for key, one in value.items() if key != "hash"}
    text = json.dumps(kept, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def layer_path(name: str) -> str:
    """The JSON path of a layer."""
    return entry("$.layers", name)


def unit_path(name: str) -> str:
    """The JSON path of a unit."""
    return entry("$.units", name)


def step(path: str, key: str) -> str:
    """The JSON path of a key in an object."""
    return f"{path}.{key}" if _NAME.fullmatch(key) and len(key) < _LONGEST else entry(path, key)


def entry(path: str, key: str) -> str:
    """The JSON path of a key that people chose."""
    name = key if len(key) < _LONGEST else f"{key[:_LONGEST]}…"
    return f"{path}[{json.dumps(name, ensure_ascii=False)}]"
