"""Folders of Parquet part files, shared by processes: added to by rename, compacted under a lock."""

from __future__ import annotations

import fcntl
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from autoq import tables
from autoq._files import reason_of
from autoq._parquet import MAX_ROWS
from autoq.cache.rows import Fault
from autoq.errors import CacheError

Row = dict[str, Any]

_COMPACT_AT = 16  # part files; opening one costs as much as hundreds of rows
_PATIENCE_S = 60.0  # for another process's lock, which is held for milliseconds
_PAUSE_S = 0.005
_VANISHED = 100  # times that a part may vanish while the folder is read
_PART = re.compile(r"part-([0-9]{6,12})-[0-9a-f]{8}\.parquet")


@contextmanager
def locked(folder: Path, *, alone: bool) -> Iterator[None]:
    """Hold a folder's lock, with other readers or alone. The system gives it back when the process dies.

    Where nobody has ever written, or may not, there is nothing to wait for: readers go on without a lock.

    Raises:
        CacheError: if the lock cannot be had in a minute, or the folder cannot hold one.
    """
    place = folder / ".lock"
    handle = _held(place, alone=alone)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _held(place: Path, *, alone: bool) -> int | None:
    while (handle := _opened(place, alone=alone)) is not None:
        try:
            _wait(handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, place)
            if os.fstat(handle).st_nlink:  # else who held it removed the folder, and the lock is nobody's
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    return None


def _opened(place: Path, *, alone: bool) -> int | None:
    how = os.O_RDWR | os.O_CREAT if alone else os.O_RDONLY
    try:
        return os.open(place, how | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as problem:
        if alone:
            raise _unlockable(place, problem) from problem
        return None


def _wait(handle: int, kind: int, place: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise CacheError(
                    "another process gives the cache's lock back",
                    where=str(place),
                    got=f"held for {_PATIENCE_S:.0f} s",
                    fix="End the process that is stuck; `fuser FILE` names it.",
                ) from None
            time.sleep(_PAUSE_S)
        except OSError as problem:
            raise _unlockable(place, problem) from problem
        else:
            return


def _unlockable(place: Path, problem: OSError) -> CacheError:
    return CacheError(
        "the cache's folder must be writable, on a file system with locks",
        where=str(place),
        got=reason_of(problem),
        fix="Choose another folder, or free space and permissions there.",
    )


class Parts:
    """A folder of part files with one schema.

    Args:
        folder: it must exist to be written to.
        schema: of all parts.
        key: the columns by which rows are the same; the later row counts.
        fault: what is wrong with rows; of every part read or added there must be nothing.
        merged: whether a value that the later row lacks is taken from the earlier one.
    """

    def __init__(
        self,
        folder: Path,
        schema: pa.Schema,
        key: Sequence[str],
        fault: Callable[[pa.Table], Fault | None],
        *,
        merged: bool = False,
    ) -> None:
        self.folder = folder
        self.schema = schema
        self.key = tuple(key)
        self.fault = fault
        self.merged = merged

    def files(self) -> list[Path]:
        """The parts, oldest first."""
        found = [path for path in self.folder.glob("part-*.parquet") if _PART.fullmatch(path.name)]
        return sorted(found, key=lambda path: (_number(path), path.name))

    def read(self, path: Path) -> pa.Table:
        """One part's rows.

        Raises:
            CacheError: naming the file, if it is damaged, or a row cannot be true.
        """
        content = tables.read(path, self.schema)
        fault = self.fault(content)
        if fault is not None:
            fix = "`autoq cache prune` removes the file, and it is measured again."
            raise CacheError("a row says what autoq measured", where=f"{path} row {fault.row}", got=fault.text, fix=fix)
        return content

    def table(self) -> pa.Table:
        """All parts' rows, oldest first, the same key perhaps more than once.

        Raises:
            CacheError: naming the file, if a part is damaged.
        """
        with locked(self.folder, alone=False):
            return self._table()

    def rows(self) -> list[Row]:
        """All rows, each key once, in the order in which they were last written."""
        return self.once(self.table())

    def once(self, content: pa.Table) -> list[Row]:
        """The same of a table that has been read."""
        if not self.merged:
            return tables.rows(latest(content, self.key))
        found: dict[tuple[Any, ...], Row] = {}
        for row in tables.rows(content):
            key = tuple(row[name] for name in self.key)
            earlier = found.pop(key, {})
            found[key] = {name: earlier.get(name) if value is None else value for name, value in row.items()}
        return list(found.values())

    def append(self, rows: Iterable[Mapping[str, Any]] | pa.Table) -> None:
        """Add rows as one new part; compacts when there are many parts.

        Raises:
            CacheError: if a row cannot be true, the folder cannot be written, or a damaged part is in the way of
                compacting.
        """
        content = rows if isinstance(rows, pa.Table) else tables.table(self.schema, rows)
        fault = self.fault(content)
        if fault is not None:
            raise CacheError("a row says what autoq measured", where=f"row {fault.row}", got=fault.text)
        if content.num_rows == 0:
            return
        with locked(self.folder, alone=True):
            self._write(content)
            if len(self.files()) > _COMPACT_AT:
                self._compact()

    def replace(self, rows: Sequence[Mapping[str, Any]], unwanted: Sequence[Path]) -> None:
        """Write rows as a new part, then remove parts; under the lock, which the caller holds alone."""
        if rows:
            self._write(tables.table(self.schema, rows))
        for part in unwanted:
            part.unlink(missing_ok=True)

    def _write(self, content: pa.Table) -> None:
        last = max(map(_number, self.files()), default=-1)
        tables.write(self.folder / f"part-{last + 1:06d}-{uuid.uuid4().hex[:8]}.parquet", content)

    def _compact(self) -> None:
        """Rewrite all parts as one, which is complete before any other is removed."""
        old = self.files()
        rows = self.once(self._table())
        if len(rows) <= MAX_ROWS:
            self.replace(rows, old)

    def _table(self) -> pa.Table:
        known: dict[str, pa.Table] = {}
        for _ in range(_VANISHED):
            files = self.files()
            try:
                for part in files:
                    if part.name not in known:
                        known[part.name] = self.read(part)
            except CacheError as problem:
                # Removed by someone without the lock, such as by hand: what took its place is seen on the next look.
                if not isinstance(problem.__cause__, FileNotFoundError):
                    raise
                continue
            return pa.concat_tables([self.schema.empty_table(), *(known[part.name] for part in files)])
        raise CacheError("the cache's files stay for a moment", where=str(self.folder), got="they vanish on every look")


def latest(content: pa.Table, key: Sequence[str]) -> pa.Table:
    """Of the rows with the same key the last one."""
    keys = zip(*(tables.values(content[name]) for name in key), strict=True)
    last = {one: i for i, one in enumerate(keys)}
    return content if len(last) == content.num_rows else content.take(sorted(last.values()))


def _number(path: Path) -> int:
    found = _PART.fullmatch(path.name)
    return int(found[1]) if found is not None else -1
