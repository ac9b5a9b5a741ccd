"""Folders of Parquet part files: appended by rename, so that an interrupted run leaves whole files only."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from autoq import tables
from autoq._files import write_atomic
from autoq.cache.fingerprint import Fingerprint
from autoq.errors import CacheError

_COMPACT_AT = 32  # part files; more than that cost more to open than their rows are worth


def default_folder() -> Path:
    """``~/.cache/autoq``, where autoq keeps its measurements unless told otherwise."""
    return Path.home() / ".cache" / "autoq"


class _Parts:
    """A folder of part files with one schema. Later rows win over earlier ones with the same key."""

    def __init__(self, folder: Path, schema: pa.Schema, key: tuple[str, ...]) -> None:
        self.folder = folder
        self.schema = schema
        self.key = key

    def rows(self) -> list[dict[str, Any]]:
        """All rows, each key once."""
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for part in self._files():
            for row in tables.read(part, self.schema).to_pylist():
                found[tuple(row[name] for name in self.key)] = row
        return list(found.values())

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows as one new part file; compacts when there are many."""
        content = tables.table(self.schema, rows)
        if content.num_rows == 0:
            return
        number = self._next_number()
        tables.write(self.folder / f"part-{number:06d}-{uuid.uuid4().hex[:8]}.parquet", content)
        if len(self._files()) > _COMPACT_AT:
            self._compact()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def _next_number(self) -> int:
        files = self._files()
        return int(files[-1].name.split("-")[1]) + 1 if files else 0

    def _compact(self) -> None:
        """Rewrite all parts as one. The union is written before any part is removed."""
        old = self._files()
        number = int(old[-1].name.split("-")[1])
        merged = tables.table(self.schema, self.rows())
        tables.write(self.folder / f"part-{number:06d}-{uuid.uuid4().hex[:8]}.parquet", merged)
        for part in old:
            part.unlink(missing_ok=True)


def _open(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Make the folder and leave its identity in clear beside the rows."""
    note = folder / "key.json"
    if not note.exists():
        text = json.dumps(identity, indent=1, sort_keys=True) + "\n"
        write_atomic(note, lambda temporary: temporary.write_text(text), CacheError)
    return folder


class ProfileCache:
    """Measured times of one device, shared by all models.

    Args:
        folder: the cache's root, for example ``default_folder()``.
        fingerprint: the device; rows of another one are never seen.

    Raises:
        CacheError: if the folder cannot be written.
    """

    KEY = ("m", "k", "n", "dtype", "bias", "scheme", "threads", "device")

    def __init__(self, folder: Path, fingerprint: Fingerprint) -> None:
        self.fingerprint = fingerprint
        place = _open(folder / "profiles" / fingerprint.key, fingerprint.to_json())
        self._parts = _Parts(place, tables.MEASUREMENTS, self.KEY)

    def rows(self) -> list[dict[str, Any]]:
        """All measurements of this device, the latest of each key."""
        return self._parts.rows()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep new measurements."""
        self._parts.append(rows)


class SensitivityCache:
    """What each (layer, scheme) costs in loss, for one set of weights and calibration tokens.

    Args:
        folder: the cache's root.
        identity: what the scores depend on (hash of the weights, hash of the batches, loss, version), in clear.
    """

    KEY = ("layer", "scheme")

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        import hashlib

        text = json.dumps(dict(identity), sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        place = _open(folder / "sensitivity" / name, identity)
        self._parts = _Parts(place, tables.SENSITIVITY, self.KEY)
        self._baseline = place / "baseline.json"

    def rows(self) -> list[dict[str, Any]]:
        """All scores, the latest of each (layer, scheme)."""
        return self._parts.rows()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep new scores."""
        self._parts.append(rows)

    def baseline(self) -> list[float] | None:
        """The unquantized model's losses, one per sample, if they were kept.

        Raises:
            CacheError: if the file is damaged.
        """
        if not self._baseline.exists():
            return None
        try:
            return [float(one) for one in json.loads(self._baseline.read_text())]
        except (OSError, ValueError, TypeError) as problem:
            raise CacheError(
                "the unquantized model's losses are a list of numbers",
                where=str(self._baseline),
                got=f"{type(problem).__name__}: {problem}",
                fix="Delete the file to measure again.",
            ) from problem

    def keep_baseline(self, losses: Iterable[float]) -> None:
        """Keep the unquantized model's losses."""
        text = json.dumps(list(losses)) + "\n"
        write_atomic(self._baseline, lambda temporary: temporary.write_text(text), CacheError)
