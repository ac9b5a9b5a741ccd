"""Disks that are full, file systems that are read-only and folders without permission, for everything autoq writes."""

import contextlib
import ctypes
import errno
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autoq.errors import AutoqError
from fault_bench import processes
from fault_bench.writers import WRITERS

_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_RDONLY, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 32, 4096, 16384, 1 << 18


class NotHereError(Exception):
    """This machine does not let a fault be made."""


def refuse(name: str, fault: str, *, tmpfs_bytes: int = 8 << 20) -> dict[str, Any]:
    """Write version 1, make a fault, try to write version 2, and look.

    Args:
        name: of the writer.
        fault: one of ``FAULTS``.
        tmpfs_bytes: size of the small disk.

    Returns:
        ``error``: the class, empty if the write succeeded; ``message``; ``intact``: whether every file is as before and
        none was added; ``changed``: which are not; ``versions`` read afterwards; or ``skipped`` with the reason.
    """
    writer = WRITERS[name]

    def work(say: processes.Say) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            Path(scratch).chmod(0o755)
            folder = Path(scratch) / "target"
            folder.mkdir()
            try:
                with MAKERS[fault](folder, tmpfs_bytes) as begin:
                    writer.write(folder, 1)
                    before, old = processes.files_of(folder), _contents(folder)
                    with begin():
                        found = _attempt(writer.write, folder)
                    after = processes.files_of(folder)
                    changed = [one for one in sorted({*before, *after}) if before.get(one) != after.get(one)]
                    if writer.in_place:
                        new = _contents(folder)
                        changed = [one for one in changed if one not in old or not new[one].startswith(old[one])]
                    versions = writer.read(folder)
            except NotHereError as problem:
                return {"skipped": str(problem)}
            return found | {"intact": not changed, "changed": changed, "versions": versions}

    result: dict[str, Any] = processes.call(work)
    return {"writer": name, "fault": fault} | result


def _attempt(write: Callable[[Path, int], object], folder: Path) -> dict[str, Any]:
    try:
        write(folder, 2)
    except AutoqError as problem:
        return {"error": type(problem).__name__, "message": str(problem)}
    except Exception as problem:
        return {"error": f"not an AutoqError: {type(problem).__name__}", "message": str(problem)}
    return {"error": "", "message": ""}


def _contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".filler"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


Begin = Callable[[], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def _size_limit(folder: Path, size: int) -> Iterator[Begin]:
    """No file may grow beyond 100 bytes: the write itself fails, after the file was made."""

    @contextlib.contextmanager
    def begin() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield begin


@contextlib.contextmanager
def _full(folder: Path, size: int) -> Iterator[Begin]:
    """A small disk of its own, filled to the last page."""
    _small_disk(folder, size)

    @contextlib.contextmanager
    def begin() -> Iterator[None]:
        filler = folder.parent / "filler"  # named elsewhere, so that it is not among the files compared
        filler.symlink_to(folder / ".filler")
        with filler.open("wb", buffering=0) as stream:
            for block in (1 << 16, 1):
                with contextlib.suppress(OSError):
                    while stream.write(b"\0" * block):
                        pass
            try:
                yield
            finally:
                (folder / ".filler").unlink()

    yield begin


@contextlib.contextmanager
def _read_only(folder: Path, size: int) -> Iterator[Begin]:
    """A file system that is mounted read-only."""
    _small_disk(folder, size)

    @contextlib.contextmanager
    def begin() -> Iterator[None]:
        _mount("tmpfs", folder, "tmpfs", _REMOUNT | _RDONLY)
        try:
            yield
        finally:
            _mount("tmpfs", folder, "tmpfs", _REMOUNT)

    yield begin


@contextlib.contextmanager
def _no_permission(folder: Path, size: int) -> Iterator[Begin]:
    """Folders and files that belong to someone else, or are write-protected."""

    @contextlib.contextmanager
    def begin() -> Iterator[None]:
        inside = [folder, *folder.rglob("*")]
        modes = {path: path.stat().st_mode for path in inside if not path.is_symlink()}
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield
        finally:
            if root:
                os.seteuid(0)
            for path, mode in modes.items():
                path.chmod(mode)

    yield begin


MAKERS = {
    "file size limit": _size_limit,
    "disk full": _full,
    "read-only file system": _read_only,
    "no permission": _no_permission,
}
FAULTS = tuple(MAKERS)


def _small_disk(folder: Path, size: int) -> None:
    """A file system of its own in the place of a folder, gone with this process."""
    _own_mounts()
    _mount("tmpfs", folder, "tmpfs", 0, f"size={size}")


def _own_mounts() -> None:
    """Give this process mounts of its own; without root it becomes root of its own users first."""
    system = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if system.unshare(_NEWNS if user == 0 else _NEWNS | _NEWUSER):
        raise NotHereError(f"no mounts of one's own: {os.strerror(ctypes.get_errno())}")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("none", Path("/"), None, _REC | _PRIVATE)


def _mount(source: str, target: Path, kind: str | None, flags: int, options: str = "") -> None:
    system = ctypes.CDLL(None, use_errno=True)
    kind_bytes = None if kind is None else kind.encode()
    if system.mount(source.encode(), str(target).encode(), kind_bytes, ctypes.c_ulong(flags), options.encode() or None):
        number = ctypes.get_errno()
        if number in (errno.EPERM, errno.EACCES, errno.ENODEV):
            raise NotHereError(f"no mounts: {os.strerror(number)}")
        raise OSError(number, os.strerror(number), str(target))
