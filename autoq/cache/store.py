"""The two caches: times of single layers per device, and what each scheme costs a model in loss."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from autoq import tables
from autoq._files import read_json, shown, write_atomic
from autoq.cache.fingerprint import CONDITIONS, Fingerprint
from autoq.cache.parts import Parts, Row, latest
from autoq.cache.rows import fault_in_measurements, fault_in_scores
from autoq.errors import CacheError

SCHEMA = 2  # of the folders; 1 had the software in the folder's key, and parts of another form
KEY_FILE = "key.json"
SHAPE = ("m", "k", "n", "dtype", "bias")
PROFILE_KEY = (*SHAPE, "scheme", "device", *CONDITIONS)
SENSITIVITY_KEY = ("layer", "scheme")

_MAX_KEY_BYTES = 64 << 10
_MAX_BASELINE_BYTES = 64 << 20
_MAX_CALIBRATION_BYTES = 64 << 20
_MAX_TIME_US = 1e12  # eleven days
_FIX = "Run `autoq cache prune`, or delete the file, to measure again."

ShapeKey = tuple[int, int, int, str, bool]  # m, k, n, dtype, bias


def default_folder() -> Path:
    """``~/.cache/autoq``, where autoq keeps its measurements unless told otherwise."""
    return Path.home() / ".cache" / "autoq"


def open_folder(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Make a folder that keeps its identity in clear beside the rows.

    Raises:
        CacheError: if it cannot be written, or another identity is there.
    """
    note = folder / KEY_FILE
    wanted = {"schema": SCHEMA, **identity}
    if not note.exists():
        text = json.dumps(wanted, indent=1, sort_keys=True) + "\n"
        write_atomic(note, lambda temporary: temporary.write_text(text), CacheError)
    found = read_key(folder)
    if is_later(found):
        raise CacheError(
            f"a folder of the cache has schema {SCHEMA}",
            where=str(note),
            got=f"schema {found['schema']}, of a later version of autoq",
            fix="Use that version, or another folder for the cache.",
        )
    if found != wanted:
        differing = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
        got = ", ".join(f"{name}={shown(found.get(name))}" for name in differing[:3])
        raise CacheError("a folder of the cache holds what its name says", where=str(note), got=got, fix=_FIX)
    return folder


def read_key(folder: Path) -> dict[str, Any]:
    """What ``open_folder`` wrote.

    Raises:
        CacheError: if the file is missing, damaged or not an object.
    """
    note = folder / KEY_FILE
    found = read_json(note, CacheError, what="a cache folder's key", limit_bytes=_MAX_KEY_BYTES, fix=_FIX)
    if not isinstance(found, dict):
        raise CacheError("a cache folder's key is an object", where=str(note), got=shown(found), fix=_FIX)
    return found


def is_later(key: Mapping[str, Any]) -> bool:
    """Whether a folder's key is of a later version of autoq, to whom the folder is left."""
    schema = key.get("schema")
    return isinstance(schema, int) and schema > SCHEMA


def profile_parts(folder: Path) -> Parts:
    """The measurements in a folder that is named after its device."""
    return Parts(folder, tables.MEASUREMENTS, PROFILE_KEY, lambda content: fault_in_measurements(content, folder.name))


def score_parts(folder: Path) -> Parts:
    """A model's scores in a folder."""
    return Parts(folder, tables.SENSITIVITY, SENSITIVITY_KEY, fault_in_scores, merged=True)


class ProfileCache:
    """Measured times of one device, shared by all models and processes.

    A row is seen while everything in ``CONDITIONS`` that its time depends on is as it was. Others stay on disk: they
    are seen again when, say, the number of threads is what it was.

    Args:
        folder: the cache's root, for example ``default_folder()``.
        fingerprint: the device and the software.

    Raises:
        CacheError: if the folder cannot be written.
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint) -> None:
        self.fingerprint = fingerprint
        place = open_folder(folder / "profiles" / fingerprint.device_key, fingerprint.hardware())
        self._parts = profile_parts(place)

    def rows(self, shapes: Collection[ShapeKey] | None = None) -> list[Row]:
        """The measurements that hold here and now, the latest of each shape and scheme.

        Args:
            shapes: only of these.

        Raises:
            CacheError: naming the file, if one is damaged.
        """
        content = visible(self._parts.table(), self.fingerprint)
        wanted = content if shapes is None else of_shapes(content, shapes)
        return tables.rows(latest(wanted, (*SHAPE, "scheme")))

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep new measurements.

        Raises:
            CacheError: if one was not measured here, or the folder cannot be written.
        """
        rows = list(rows)
        for row in rows:
            if row.get("origin") or not self.fingerprint.covers(row):
                raise CacheError("the cache keeps what was measured on this device", got=shown(dict(row), 300))
        self._parts.append(rows)


def visible(content: pa.Table, fingerprint: Fingerprint) -> pa.Table:
    """The rows that hold on a device with its software; see ``Fingerprint.covers``."""
    mask = pc.equal(content["device"], fingerprint.device_key)
    for name, value in fingerprint.conditions().items():
        either = pa.array([value, 0 if isinstance(value, int) else ""])
        mask = pc.and_(mask, pc.is_in(content[name], value_set=either))
    return content.filter(mask)


def of_shapes(content: pa.Table, shapes: Collection[ShapeKey]) -> pa.Table:
    """The rows of some shapes."""
    mask = pa.chunked_array([pa.array([True] * content.num_rows, pa.bool_())])
    for i, name in enumerate(("m", "k", "n")):
        mask = pc.and_(mask, pc.is_in(content[name], value_set=pa.array({shape[i] for shape in shapes}, pa.int64())))
    near = content.filter(mask)
    wanted = set(shapes)
    have = zip(*(near[name].to_pylist() for name in SHAPE), strict=True)
    return near.filter(pa.array([shape in wanted for shape in have], pa.bool_()))


class SensitivityCache:
    """What each (layer, scheme) costs in loss, for one set of weights and calibration tokens.

    Two processes may score the same layers at once: of a (layer, scheme), what either of them found is kept.

    Args:
        folder: the cache's root.
        identity: what the scores depend on (hash of the weights, hash of the batches, loss, version), in clear.

    Raises:
        CacheError: if the folder cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        place = open_folder(folder / "sensitivity" / _name_of({"schema": SCHEMA, **identity}), identity)
        self._parts = score_parts(place)
        self._baseline = place / "baseline.json"

    def rows(self) -> list[Row]:
        """All scores, the latest of each (layer, scheme).

        Raises:
            CacheError: naming the file, if one is damaged.
        """
        return self._parts.rows()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep new scores."""
        self._parts.append(rows)

    def baseline(self, *, samples: int | None = None) -> list[float] | None:
        """The unquantized model's losses, one per sample, if they were kept.

        Args:
            samples: how many there must be, if that is known.

        Raises:
            CacheError: if the file is damaged, or has another number of losses.
        """
        if not self._baseline.exists():
            return None
        found = read_baseline(self._baseline)
        if samples is not None and len(found) != samples:
            rule = f"the unquantized model has a loss for each of {samples} samples"
            raise CacheError(rule, where=str(self._baseline), got=len(found), fix=_FIX)
        return found

    def keep_baseline(self, losses: Iterable[float]) -> None:
        """Keep the unquantized model's losses, if all are finite numbers: nothing else can be read back."""
        losses = list(losses)
        if not all(map(math.isfinite, losses)):
            return
        text = json.dumps(losses) + "\n"
        write_atomic(self._baseline, lambda temporary: temporary.write_text(text), CacheError)


def check_scores(folder: Path) -> None:
    """Hold the key of a model's scores against the folder's name.

    Raises:
        CacheError: if it is damaged, or of other scores.
    """
    name = _name_of(read_key(folder))
    if name != folder.name:
        where = str(folder / KEY_FILE)
        raise CacheError(
            "a folder of the cache holds what its name says", where=where, got=f"what {name} says", fix=_FIX
        )


def _name_of(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def read_calibration(path: Path) -> tuple[Any, dict[str, dict[str, float]]]:
    """Whole-model times that were kept: what they depend on, and plan → phase → µs.

    Raises:
        CacheError: if the file is damaged.
    """
    found = read_json(
        path, CacheError, what="a file of whole-model times", limit_bytes=_MAX_CALIBRATION_BYTES, fix=_FIX
    )
    times = found.get("times_us") if isinstance(found, dict) and "key" in found else None
    plans = list(times.values()) if isinstance(times, dict) else []
    if not isinstance(times, dict) or not plans or not all(isinstance(one, dict) for one in plans):
        raise CacheError("whole-model times are by plan and phase", where=str(path), got=shown(found), fix=_FIX)
    if not plans[0] or any(set(one) != set(plans[0]) for one in plans):
        raise CacheError("every plan's times are of the same phases", where=str(path), got=shown(times), fix=_FIX)
    values: list[Any] = [time for one in plans for time in one.values()]
    if not all(type(one) in (int, float) and 0 < one <= _MAX_TIME_US for one in values):
        rule = f"whole-model times are positive, and at most {_MAX_TIME_US:.0e} µs"
        raise CacheError(rule, where=str(path), got=shown(values), fix=_FIX)
    return found["key"], {plan: {phase: float(time) for phase, time in one.items()} for plan, one in times.items()}


def read_baseline(path: Path) -> list[float]:
    """A kept list of losses.

    Raises:
        CacheError: if the file is damaged.
    """
    what = "the list of the unquantized model's losses"
    found = read_json(path, CacheError, what=what, limit_bytes=_MAX_BASELINE_BYTES, fix=_FIX)
    if not isinstance(found, list) or not all(type(one) in (int, float) for one in found):
        raise CacheError(f"{what} is a list of numbers", where=str(path), got=shown(found), fix=_FIX)
    return [float(one) for one in found]
