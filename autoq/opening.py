"""The files of one folder, opened by their names in it and nowhere else."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack
from pathlib import Path

from autoq.errors import CheckpointError


def printable(path: str | Path) -> str:
    """A path as a message can show it on any terminal."""
    return text if (text := str(path)).isprintable() else ascii(text)


class Opener:
    """Opens files of one folder: regular ones, under their own names."""

    def __init__(self, folder: Path, handle: int, stack: ExitStack) -> None:
        self._folder, self._handle, self._stack = folder, handle, stack

    def open(self, name: str) -> tuple[int, int]:
        """Descriptor and size of a file.

        Raises:
            CheckpointError: if there is none, or it is not a regular file.
        """
        path = self._folder / name
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            handle = os.open(name, flags, dir_fd=self._handle)
        except OSError as problem:
            link = problem.errno == errno.ELOOP
            raise CheckpointError(
                "the checkpoint's files are there, and no symbolic links",
                where=str(path),
                got="a symbolic link" if link else problem.strerror,
                fix="Copy the files themselves (cp -L)." if link else "Copy the folder again, or save the model again.",
            ) from problem
        self._stack.callback(os.close, handle)
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("the checkpoint's files are regular files", where=str(path), got=oct(status.st_mode))
        return handle, status.st_size

    def read(self, name: str, limit: int) -> bytes:
        """A small file's bytes.

        Raises:
            CheckpointError: as ``open``, and if there are more than ``limit``.
        """
        handle, size = self.open(name)
        if size > limit:
            raise CheckpointError(f"{name} has at most {limit:,} bytes", where=str(self._folder / name), got=size)
        with os.fdopen(os.dup(handle), "rb") as stream:
            return stream.read(limit)
