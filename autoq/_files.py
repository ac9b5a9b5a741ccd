"""Whole-file writes that are never seen half done, and reads that trust nothing."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from autoq.errors import AutoqError

_SUFFIX = ".autoq.tmp"
MAX_DEPTH = 64  # of JSON read from files
MAX_VALUES = 2_000_000  # an empty list of two bytes takes 64 in memory, so the size alone bounds too little


def write_atomic(path: Path, write: Callable[[Path], object], error: type[AutoqError]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it over ``path``.

    The old file stays intact until the new one is complete and on disk. Temporary files that killed processes left in
    the folder are removed.

    Args:
        path: the file to replace; missing folders are created.
        write: called once with the temporary file's path.
        error: the error class raised when the folder cannot be written.

    Raises:
        AutoqError: (as ``error``) with the path and the operating system's reason.
    """
    temporary: Path | None = None
    handle = -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        leftovers(path.parent, remove=True)
        handle, temporary = _temporary(path)
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(_mode(path))
        temporary.replace(path)
        temporary = None
        sync_folder(path.parent)
    except OSError as problem:
        raise error(
            "the file must be writable",
            where=str(path),
            got=reason_of(problem),
            fix="Choose another folder, or free space and permissions there.",
        ) from problem
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if handle >= 0:
            os.close(handle)


def _mode(path: Path) -> int:
    """A file that is replaced keeps its permissions; a new one may be read by all."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return 0o644


def reason_of(problem: Exception) -> str:
    """What the system says, without its number and the path."""
    return f"{type(problem).__name__}: {getattr(problem, 'strerror', None) or problem}"


def leftovers(folder: Path, name: str = "", *, remove: bool = False) -> list[Path]:
    """Temporary files of ``write_atomic`` whose process is gone.

    Args:
        folder: where to look; not below it.
        name: only those of this file.
        remove: removes them. A file that a living process still writes is neither named nor removed.
    """
    start = rf"\.{re.escape(name)}\." if name else r"\..*\."
    ours = re.compile(rf"{start}[a-z0-9_]{{8}}{re.escape(_SUFFIX)}", re.DOTALL)
    return sorted(one for one in folder.iterdir() if ours.fullmatch(one.name) and _is_abandoned(one, remove))


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk, so that a rename in it outlives a loss of power."""
    # Some network file systems refuse this; the rename itself is done.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_bytes_bounded(
    path: str | Path, error: type[AutoqError], *, what: str, limit_bytes: int, fix: str = "", follow: bool = True
) -> bytes:
    """A regular file's bytes; never more memory than the limit, and no waiting on pipes or devices.

    Args:
        path: the file.
        error: the error class raised.
        what: the kind of file, as the subject of a sentence: "a plan file".
        limit_bytes: the largest size accepted.
        fix: what the user can do if the file is damaged.
        follow: whether a symbolic link in the place of the file is followed.

    Raises:
        AutoqError: (as ``error``) if it is missing, not a regular file, not readable or too large.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{what} is a regular file", where=str(path), got=_kind(status.st_mode), fix=fix)
            if status.st_size > limit_bytes:
                rule = f"{what} has at most {limit_bytes:,} bytes"
                raise error(rule, where=str(path), got=f"{status.st_size:,}", fix=fix)
            with os.fdopen(handle, "rb", closefd=False) as stream:
                data = stream.read(status.st_size + 1)
        finally:
            os.close(handle)
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        got = reason_of(problem)
        if not follow and Path(path).is_symlink():
            got = "a symbolic link"
        raise error(f"{what} must be readable", where=str(path), got=got, fix=fix) from problem
    if len(data) != status.st_size:
        raise error(f"{what} does not change while it is read", where=str(path), fix="Read it again.")
    return data


def read_json(
    path: str | Path, error: type[AutoqError], *, what: str, limit_bytes: int, fix: str = "", follow: bool = True
) -> Any:
    """Read a JSON file strictly, in bounded memory; see ``read_bytes_bounded`` and ``parse_json``.

    Raises:
        AutoqError: (as ``error``) with the file and, where there is one, the JSON path.
    """
    data = read_bytes_bounded(path, error, what=what, limit_bytes=limit_bytes, fix=fix, follow=follow)
    return parse_json(data, error, what=what, where=str(path), fix=fix)


def parse_json(data: bytes | str, error: type[AutoqError], *, what: str, where: str, fix: str = "") -> Any:
    """Parse JSON strictly: a key once in an object, finite numbers, integers of 64 bits, real text, bounded depth.

    Args:
        data: UTF-8 without a byte order mark.
        error: the error class raised.
        what: what it is, as the subject of a sentence: "a plan file".
        where: the file or layer, for messages.
        fix: what the user can do about damage.

    Raises:
        AutoqError: (as ``error``) with the JSON path of what is wrong.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        if text.count(",") + text.count("[") + text.count("{") > MAX_VALUES:
            raise error(f"{what} has at most {MAX_VALUES:,} values", where=where, got="more", fix=fix)
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except UnicodeDecodeError as problem:
        raise error(f"{what} is UTF-8 text", where=where, got=str(problem), fix=fix) from problem
    except RecursionError:
        raise error(f"{what} is nested at most {MAX_DEPTH} deep", where=where, got="more", fix=fix) from None
    except ValueError as problem:
        raise error(f"{what} holds one complete JSON value", where=where, got=str(problem), fix=fix) from problem
    fault = _fault(value, [])
    if fault is not None:
        raise error(fault[0], where=where, got=fault[1], fix=fix)
    return value


def shown(value: object, limit: int = 80) -> str:
    """A value from a file as a message may show it: ``repr``, cut."""
    text = repr(value[: limit + 1]) if isinstance(value, str | bytes | list | tuple) else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


class _Twice(dict[str, Any]):
    """An object in which a key appears again."""

    key: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    twice, seen = _Twice(), set()
    for key, _ in pairs:
        if key in seen:
            twice.key = key
            break
        seen.add(key)
    return twice


def _integer(digits: str) -> int:
    # Time grows with the square of the length; what is cut is far out of range all the same.
    return int(digits[:21])


def _fault(value: Any, path: list[str | int]) -> tuple[str, str] | None:
    """The first thing that is wrong in a parsed JSON value: (the rule with the JSON path, what was got)."""
    if not isinstance(value, dict | list):
        wrong = _scalar_fault(value)
        return None if wrong is None else (f"{_text(path)} is {wrong[0]}", wrong[1])
    if len(path) >= MAX_DEPTH:
        return f"{_text(path)} is nested at most {MAX_DEPTH} deep", "more"
    if isinstance(value, _Twice):
        return f"{_text(path)}: a key appears once in an object", shown(value.key)
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(key, str) and not key.isascii() and _scalar_fault(key):
            return f"{_text(path)}: keys are valid Unicode", shown(key)
        kind = type(inner)  # most values are short texts and numbers: no call for them
        if (kind is str and inner.isascii()) or (kind is int and 0 <= inner < 2**63):
            continue
        path.append(key)
        fault = _fault(inner, path)
        if fault is not None:
            return fault
        path.pop()
    return None


def _scalar_fault(value: Any) -> tuple[str, str] | None:
    if isinstance(value, str):
        try:
            value.encode()  # an escaped half of a surrogate pair cannot be written again
        except UnicodeEncodeError:
            return "valid Unicode", shown(value)
    elif isinstance(value, float) and not math.isfinite(value):
        return "a finite number", repr(value)
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        return "an integer of at most 64 bits", "more"
    return None


def _text(path: list[str | int]) -> str:
    """A JSON path, cut to what a message can hold."""
    steps = [
        f".{step}"
        if isinstance(step, str) and step.isascii() and step.isidentifier()
        else f"[{json.dumps(step, ensure_ascii=False)}]"
        for step in path
    ]
    text = "$" + "".join(steps)
    return text if len(text) <= 300 else f"{text[:200]}…{text[-99:]}"


def _temporary(path: Path) -> tuple[int, Path]:
    """A new locked file beside ``path``: (its descriptor, its path). The lock goes when the process does."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent)
        with suppress(OSError):  # no locks on this file system: then nobody takes the file for abandoned either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else someone removed it before it was locked
            return handle, Path(name)
        os.close(handle)


def _is_abandoned(temporary: Path, remove: bool) -> bool:
    with unheld(temporary, os.O_NONBLOCK | os.O_NOFOLLOW) as handle:
        if handle is None or not stat.S_ISREG(os.fstat(handle).st_mode):
            return False
        if remove:  # under the lock: whoever made it and waits for the lock sees that it is gone
            try:
                temporary.unlink(missing_ok=True)
            except OSError:
                return False
        return True


@contextmanager
def unheld(path: Path, flags: int) -> Iterator[int | None]:
    """A file or folder opened and locked; None if a living process holds its lock, or it cannot be opened.

    Args:
        path: what to open.
        flags: of ``os.open``, besides reading.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    except OSError:
        yield None
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
        else:
            yield handle
    finally:
        os.close(handle)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link"}
    return kinds.get(stat.S_IFMT(mode), "a device")
