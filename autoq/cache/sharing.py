"""Profiles of other devices: taken along as one file, and believed as predictions only."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoq import tables
from autoq._files import parse_json, read_json, shown, write_atomic
from autoq.cache.fingerprint import Fingerprint, checked_hardware, device_key
from autoq.cache.parts import Parts, Row
from autoq.cache.rows import fault_in_measurements
from autoq.cache.store import (
    KEY_FILE,
    SCHEMA,
    SHAPE,
    ShapeKey,
    is_later,
    of_shapes,
    open_folder,
    profile_parts,
    read_key,
)
from autoq.errors import CacheError

LOCAL, FOREIGN = "profiles", "foreign"
MAX_DEVIATION = 0.10  # the median of the ratios', up to which a foreign profile counts as verified
MIN_VERIFIED = 10  # rows measured here, unless the profile has fewer

_MAX_MARK_BYTES = 1 << 20
_SOFTWARE = ("threads", "torch", "runtime", "compile")  # stock layers lack the others
_FIX = "Ask for a file that `autoq cache export` wrote."


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One device's measurements in the cache.

    Attributes:
        key: hash of the device's parts, which the folder is named after.
        folder: where they lie.
        hardware: the device's parts in clear.
        foreign: whether they were imported.
    """

    key: str
    folder: Path
    hardware: Mapping[str, str | int]
    foreign: bool

    @property
    def parts(self) -> Parts:
        """The rows."""
        return profile_parts(self.folder)

    def rows(self) -> list[Row]:
        """All rows, of whatever software, each key once.

        Raises:
            CacheError: naming the file, if one is damaged.
        """
        return self.parts.rows()


def open_profile(folder: Path) -> Profile:
    """The profile in a folder.

    Raises:
        CacheError: if its key is missing, damaged, of another version, or not what the folder is named after.
    """
    note = str(folder / KEY_FILE)
    found = read_key(folder)
    later = is_later(found)
    schema = found.pop("schema", 1)
    if schema != SCHEMA:
        what = "a later" if later else "an earlier" if isinstance(schema, int) else "another"
        raise CacheError(
            f"a profile has schema {SCHEMA}",
            where=note,
            got=f"schema {shown(schema)}, of {what} version of autoq, which is not read",
            fix="Use that version." if later else "`autoq cache prune` removes those of earlier versions.",
        )
    hardware = checked_hardware(found, note)
    key = device_key(hardware)
    if key != folder.name:
        raise CacheError("a profile's folder is named after its device", where=note, got=f"the device {key}")
    return Profile(key=key, folder=folder, hardware=hardware, foreign=folder.parent.name == FOREIGN)


def folders(cache: Path) -> list[Path]:
    """The folders of all profiles in a cache, readable or not: this and other devices', then imported ones."""
    places = [cache / LOCAL, cache / FOREIGN]
    return [one for place in places if place.is_dir() for one in sorted(place.iterdir()) if one.is_dir()]


def find(cache: Path, key: str, *, foreign: bool = False) -> Profile:
    """The profile whose key begins so.

    Args:
        cache: the cache's root.
        key: the first digits. Imported and own profiles of the same device have the same key: ``foreign/`` or
            ``profiles/`` before it tells which is meant.
        foreign: without that, take the imported one of two with the same key; else the own one.

    Raises:
        CacheError: if there is none, more than one, or it is damaged.
    """
    place, _, digits = key.rpartition("/")
    there = [one for one in folders(cache) if place in ("", one.parent.name)]
    names = {one.name for one in there}
    matching = sorted(name for name in names if digits and name.startswith(digits))
    if len(matching) != 1:
        raise CacheError(
            "a profile is named by the first digits of its key",
            where=str(cache),
            got=f"{key!r}, which is of {' and '.join(matching) or 'none'}",
            fix=f"There are: {', '.join(sorted(names)) or 'none'}.",
        )
    both = [one for one in there if one.name == matching[0]]
    return open_profile(both[-1 if foreign else 0])


def export_profile(profile: Profile, file: Path) -> int:
    """Write a profile to one Parquet file, with its device in the file's metadata.

    Returns:
        The number of rows.

    Raises:
        CacheError: if it cannot be read or written.
    """
    rows = profile.rows()
    note = {"schema": SCHEMA, "device": dict(profile.hardware)}
    tables.write(file, tables.table(tables.MEASUREMENTS, rows), note=note)
    return len(rows)


def import_profile(cache: Path, file: Path) -> tuple[Profile, int]:
    """Add a file that ``export_profile`` wrote, as a foreign profile.

    Returns:
        The profile, and the number of rows in the file.

    Raises:
        CacheError: if the file is anything else, or the cache cannot be written.
    """
    content, note = tables.read_noted(file, tables.MEASUREMENTS)
    value = parse_json(note or b"{}", CacheError, what="an exported profile's note", where=str(file), fix=_FIX)
    if not isinstance(value, dict) or value.get("schema") != SCHEMA or set(value) != {"schema", "device"}:
        raise CacheError(f"an exported profile has schema {SCHEMA} and a device", where=str(file), got=shown(value))
    hardware = checked_hardware(value["device"], str(file))
    key = device_key(hardware)
    fault = fault_in_measurements(content, key)
    if fault is not None:
        rule, where = "an exported profile has measurements of its device only", f"{file} row {fault.row}"
        raise CacheError(rule, where=where, got=fault.text, fix=_FIX)
    profile = open_profile(open_folder(cache / FOREIGN / key, hardware))
    profile.parts.append(content)
    return profile, content.num_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What another device's profile says of some shapes.

    Attributes:
        key: of the profile.
        device: its name, threads and torch.
        ratios: (shape, scheme) → the row whose ratio predicts it.
        verified: whether a sample measured here agreed.
    """

    key: str
    device: str
    ratios: Mapping[tuple[ShapeKey, str], Row]
    verified: bool

    def to_json(self, shapes: int) -> dict[str, str | int | bool]:
        """What a plan keeps of it, with the number of shapes that were predicted."""
        return {"profile": self.key, "device": self.device, "shapes": shapes, "verified": self.verified}

    def sentence(self, shapes: int) -> str:
        """The same in words."""
        if not shapes:
            return f"Nothing is predicted from {self.device}: its profile has no shape that was not measured here."
        known = "a sample measured here agreed" if self.verified else "that device's profile is not verified here"
        return f"Times of {shapes} shapes are predicted from {self.device}, not measured here; {known}."


def prediction(profile: Profile, shapes: Collection[ShapeKey], fingerprint: Fingerprint) -> Prediction:
    """Take the ratios of some shapes from a profile.

    They come from one set of software and threads, so that schemes are compared alike: the one with the most of these
    shapes' rows, of two with as many the later.

    Args:
        profile: another device's, or this one's with other software.
        shapes: what is asked for.
        fingerprint: of this device, for which the profile may be verified.

    Raises:
        CacheError: if the profile is of another kind of device; naming the file, if one is damaged.
    """
    check_kind(profile, fingerprint)
    rows = of_shapes(profile.parts.table(), shapes).to_pylist()
    usable = [row for row in rows if row["status"] == "ok" and not fingerprint.covers(row)]
    chosen = coherent(usable)
    first = chosen[-1] if chosen else None
    software = "" if first is None else f" ({first['threads']} threads, torch {first['torch']})"
    return Prediction(
        key=profile.key,
        device=f"{profile.hardware['name']}{software if profile.hardware['device'] == 'cpu' else ''}",
        ratios={(_shape(row), row["scheme"]): row for row in chosen},
        verified=first is not None and is_verified(profile, fingerprint, first),
    )


def check_kind(profile: Profile, fingerprint: Fingerprint) -> None:
    """Refuse a GPU's profile for a CPU, and the other way.

    Raises:
        CacheError: naming both.
    """
    if profile.hardware["device"] != fingerprint.device:
        raise CacheError(
            f"a profile for {fingerprint.name} is of the same kind of device, {fingerprint.device}",
            where=str(profile.folder),
            got=f"{profile.hardware['device']}, {profile.hardware['name']}",
            fix="Choose another profile; `autoq cache ls` lists them.",
        )


def coherent(rows: Sequence[Row]) -> list[Row]:
    """The rows of the software and threads that most of them have; of two with as many the later."""
    counts = Counter(map(_software, rows))
    last = {_software(row): i for i, row in enumerate(rows)}
    best = max(counts, key=lambda one: (counts[one], last[one]), default=None)
    return [row for row in rows if _software(row) == best]


def _software(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _SOFTWARE)


def _shape(row: Row) -> ShapeKey:
    m, k, n, dtype, bias = (row[name] for name in SHAPE)
    return m, k, n, dtype, bias


def mark_verified(
    profile: Profile,
    fingerprint: Fingerprint,
    files: Sequence[Path],
    *,
    sample: Sequence[Mapping[str, Any]],
    deviation: float,
) -> None:
    """Note beside another device's profile that a sample of it, measured here, agreed.

    Args:
        profile: the other device's.
        fingerprint: this device and its software; with any other the mark does not hold.
        files: the parts that the sample was drawn from; with others the mark does not hold.
        sample: the rows that were measured here, all of one set of software and threads; for others the mark does not
            hold.
        deviation: the median of |ratio here ÷ ratio there − 1|.
    """
    value = {
        "schema": SCHEMA,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": fingerprint.to_json(),
        "files": sorted(one.name for one in files),
        "software": {name: sample[0][name] for name in _SOFTWARE},
        "rows": len(sample),
        "deviation": deviation,
    }
    text = json.dumps(value, indent=1) + "\n"
    write_atomic(_mark(profile, fingerprint), lambda temporary: temporary.write_text(text), CacheError)


def is_verified(profile: Profile, fingerprint: Fingerprint, row: Row | None = None) -> bool:
    """Whether a sample of exactly these files was found to agree with this device.

    Args:
        profile: another device's.
        fingerprint: this device and its software.
        row: of the profile; the sample had its software and threads. Without it any sample counts.

    Raises:
        CacheError: if the mark is damaged.
    """
    place = _mark(profile, fingerprint)
    if not place.exists():
        return False
    mark = read_mark(place)
    same = row is None or mark["software"] == {name: row[name] for name in _SOFTWARE}
    return bool(same and mark["files"] == sorted(one.name for one in profile.parts.files()))


def read_mark(path: Path) -> dict[str, Any]:
    """What ``mark_verified`` wrote.

    Raises:
        CacheError: if it is damaged.
    """
    fix = "Delete the file, and verify the profile again."
    value = read_json(path, CacheError, what="a verification", limit_bytes=_MAX_MARK_BYTES, fix=fix)
    if not isinstance(value, dict) or value.get("schema") != SCHEMA or not {"files", "software"} <= set(value):
        rule = f"a verification has schema {SCHEMA}, files and software"
        raise CacheError(rule, where=str(path), got=shown(value), fix=fix)
    return value


def _mark(profile: Profile, fingerprint: Fingerprint) -> Path:
    return profile.folder / f"verified-{fingerprint.key}.json"
