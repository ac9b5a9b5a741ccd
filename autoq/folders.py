"""Folders that appear complete under their name, and stay there when a process is killed while it replaces them.

A new folder is filled beside its place, as ``.NAME.RANDOM.new``, and exchanged with the old one in one system call.
Where the file system cannot exchange, the old one is ``.NAME.RANDOM.old`` for an instant; ``recover`` brings it back.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from autoq._files import sync_folder, unheld

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def resolved(path: str | Path) -> Path:
    """The path without symbolic links.

    Raises:
        OSError: also if no file can have that name.
    """
    try:
        return Path(os.path.realpath(path))
    except ValueError as problem:
        raise OSError(errno.EINVAL, f"a name that no folder can have ({problem})") from problem


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of ``target`` when the block ends without an error.

    What was there before is removed then, not earlier. What killed processes left for this name is removed first.

    Args:
        target: the folder's name; missing parents are made.

    Raises:
        OSError: if it cannot be made or renamed; ``target`` is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    temporary, handle = _make(target)
    try:
        yield temporary
        temporary.chmod(0o755)
        sync_folder(temporary)
        _publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


def recover(target: Path) -> None:
    """Bring back a folder that a killed process had renamed and not yet replaced; nothing where ``target`` is there.

    Raises:
        OSError: if there is one and it cannot be renamed.
    """
    if os.path.lexists(target) or not _beside(target, "old"):
        return
    with _locked(target.parent):
        asides = _beside(target, "old")
        if asides and not os.path.lexists(target):
            asides[0].rename(target)
            sync_folder(target.parent)


def _make(target: Path) -> tuple[Path, int]:
    """A folder beside ``target``, locked as long as the returned descriptor is open, and no abandoned ones."""
    with _locked(target.parent):
        for left in _beside(target, "new"):
            if _is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
        if os.path.lexists(target):
            for left in _beside(target, "old"):
                shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent))
        handle = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # a file system without locks: nobody will find the folder abandoned
            fcntl.flock(handle, fcntl.LOCK_EX)
        return temporary, handle


def _publish(temporary: Path, target: Path) -> None:
    with _locked(target.parent):
        if not os.path.lexists(target):
            temporary.rename(target)
        elif not _exchange(temporary, target):
            aside = temporary.with_suffix(".old")
            target.rename(aside)
            try:
                temporary.rename(target)
            except OSError:
                aside.rename(target)
                raise
            sync_folder(target.parent)
            shutil.rmtree(aside, ignore_errors=True)
        sync_folder(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where the system cannot."""
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


@functools.cache
def _renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    """The C library's function; None outside Linux."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function


def _beside(target: Path, suffix: str) -> list[Path]:
    """Folders that ``new_folder`` made for ``target``."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.{suffix}")
    with suppress(OSError):
        return sorted(one for one in target.parent.iterdir() if name.fullmatch(one.name))
    return []


def _is_abandoned(folder: Path) -> bool:
    """Whether no living process holds the folder's lock."""
    with unheld(folder, os.O_DIRECTORY) as handle:
        return handle is not None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time renames in a folder, where the file system has locks."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
