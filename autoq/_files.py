"""Whole-file writes that are never seen half done."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from autoq.errors import AutoqError


def write_atomic(path: Path, write: Callable[[Path], object], error: type[AutoqError]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it over ``path``.

    The old file stays intact until the new one is complete and on disk.

    Args:
        path: the file to replace; missing folders are created.
        write: called once with the temporary file's path.
        error: the error class raised when the folder cannot be written.

    Raises:
        AutoqError: (as ``error``) with the path and the operating system's reason.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        temporary = None
    except OSError as problem:
        raise error(
            "the file must be writable",
            where=str(path),
            got=f"{type(problem).__name__}: {problem.strerror or problem}",
            fix="Choose another folder, or free space and permissions there.",
        ) from problem
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
