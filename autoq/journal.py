"""Optuna's journal, a file of JSON lines, such that a killed writer or a full disk costs the last line at most."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from autoq._files import reason_of
from autoq.errors import SearchError

if TYPE_CHECKING:
    import optuna

_MOST_BYTES = 1 << 30
_LONGEST_LINE = 1 << 26
_BEGIN = b'{"op_code":'  # of every line that Optuna writes
# What Optuna raises while it replays lines that it did not write.
_REPLAY_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError)


def open_journal(path: Path) -> optuna.storages.BaseStorage:
    """A storage in a file, made if it is missing.

    Raises:
        SearchError: if it cannot be read, written or understood; later, when a line cannot be added, also.
    """
    import optuna

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _mending_lock(path)
        backend = _backend(path, lock)
        lock.acquire()
        lock.release()
        return optuna.storages.JournalStorage(backend)
    except (*_REPLAY_ERRORS, optuna.exceptions.OptunaError) as problem:
        raise SearchError(
            "the study's file must be a writable Optuna journal",
            where=str(path),
            got=f"{type(problem).__name__}: {problem}",
            fix="Choose another path, or remove the file to start over.",
        ) from problem


def _backend(path: Path, lock: Any) -> optuna.storages.journal.JournalFileBackend:
    from optuna.storages.journal import JournalFileBackend

    class Backend(JournalFileBackend):
        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            try:
                super().append_logs(logs)
            except (OSError, ValueError, RecursionError) as problem:
                raise SearchError(
                    "the study's file must be a writable Optuna journal",
                    where=str(path),
                    got=reason_of(problem),
                    fix="What was measured before is kept; start again when there is space and permission.",
                ) from problem

        def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
            try:
                yield from super().read_logs(log_number_from)
            except (OSError, ValueError, RecursionError) as problem:
                raise SearchError(
                    "the study's file must be an Optuna journal",
                    where=str(path),
                    got=f"{type(problem).__name__}: {problem}",
                    fix="Choose another path, or remove the file to start over.",
                ) from problem

    return Backend(str(path), lock_obj=lock)


def _mending_lock(path: Path) -> Any:
    """A journal's lock that drops the last line if a killed process left it unfinished.

    The next line would be appended to it, and Optuna would refuse the whole file.
    """
    from optuna.storages.journal import JournalFileSymlinkLock

    class Lock(JournalFileSymlinkLock):
        def acquire(self) -> bool:
            super().acquire()
            try:
                _mend(path)
            except BaseException:
                self.release()
                raise
            return True

    return Lock(str(path))


def _mend(path: Path) -> None:
    """Drop an unfinished last line.

    Raises:
        ValueError: if the file does not end as a journal does; it is left as it is.
    """
    with path.open("r+b") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ValueError("it is no regular file")
        size = stream.seek(0, 2)
        if size > _MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than {_MOST_BYTES:,}")
        if size == 0:
            return
        line = _last_line(stream, size)
        if line.endswith(b"\n"):
            json.loads(line)
        elif line.startswith(_BEGIN) or _BEGIN.startswith(line):
            stream.truncate(size - len(line))
        else:
            raise ValueError("it ends in something else than a line that was cut")


def _last_line(stream: BinaryIO, size: int) -> bytes:
    """The last line, with its end if it has one; it is looked for in ever larger pieces."""
    length = 0
    while length < size:
        length = min(size, max(1 << 16, 4 * length))
        if length > _LONGEST_LINE:
            raise ValueError("its last line is longer than any of a study")
        stream.seek(size - length)
        data = stream.read(length)
        at = data.rfind(b"\n", 0, -1)
        if at >= 0:
            return data[at + 1 :]
    return data
