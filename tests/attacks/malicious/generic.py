"""Attacks by content that any JSON file, or any file at all, may have; and by what lies in a file's place."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

from malicious.harness import OWNED

Attack = Callable[[Path], object]  # changes the file at a path


class _Owner:
    """Unpickled, it writes a file."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"echo owned > '{self.target}'",)


def pickled(path: Path) -> bytes:
    """A pickle that, if it is ever read as one, leaves a file beside ``path``."""
    return pickle.dumps(_Owner(str(path.parent / OWNED)))


def _hole(path: Path) -> None:
    path.unlink()
    with path.open("wb") as stream:
        stream.truncate(1 << 40)


def _replaced(make: Callable[[Path], object]) -> Attack:
    def attack(path: Path) -> None:
        path.unlink()
        make(path)

    return attack


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


PLACES: dict[str, Attack] = {
    "a terabyte of nothing": _hole,
    "a pipe": _replaced(os.mkfifo),
    "a folder": _replaced(Path.mkdir),
    "a link to an endless device": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": _replaced(lambda path: path.symlink_to(path)),
    "an empty file": lambda path: path.write_bytes(b""),
    "a file that was cut": _cut,
    "a pickle": lambda path: path.write_bytes(pickled(path)),
    "zero bytes": lambda path: path.write_bytes(bytes(5000)),
}


def _text(make: Callable[[], bytes]) -> Attack:
    return lambda path: path.write_bytes(make())


JSON: dict[str, Attack] = {
    "200,000 lists in each other": _text(lambda: b"[" * 200_000 + b"]" * 200_000),
    "objects in each other, unfinished": _text(lambda: b'{"a":' * 100_000),
    "65 lists in each other": _text(lambda: b"[" * 65 + b"]" * 65),
    "four million empty lists": _text(lambda: b"[" + b"[]," * 4_000_000 + b"[]]"),
    "an integer of five million digits": _text(lambda: b'{"schema": ' + b"9" * 5_000_000 + b"}"),
    "a number of five million digits": _text(lambda: b"[0." + b"9" * 5_000_000 + b"]" + b"]"),
    "NaN": _text(lambda: b"[NaN]"),
    "infinity": _text(lambda: b"[1e999]"),
    "a key twice": _text(lambda: b'{"schema": 1, "schema": 2}'),
    "half a surrogate pair": _text(lambda: b'{"\\ud800": "\\udfff"}'),
    "UTF-16": lambda path: path.write_bytes(path.read_text().encode("utf-16")),
    "a byte order mark": lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
    "null": _text(lambda: b"null"),
    "an empty list": _text(lambda: b"[[]]"),
    "text": _text(lambda: b"\"__import__('os').system('true')\""),
    "an expression": _text(lambda: b"__import__('os').system('true')"),
    "a long text": _text(lambda: b'"' + b"a" * (70 << 20) + b'"'),
}
