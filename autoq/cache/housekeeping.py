"""Looking after a cache folder: what lies there, what is damaged, what may go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from autoq import tables
from autoq._files import leftovers, reason_of
from autoq.cache import sharing
from autoq.cache.fingerprint import Fingerprint
from autoq.cache.parts import Parts, Row, locked
from autoq.cache.store import (
    KEY_FILE,
    SCHEMA,
    check_scores,
    is_later,
    profile_parts,
    read_baseline,
    read_calibration,
    read_key,
    score_parts,
)
from autoq.errors import CacheError

SENSITIVITY, CALIBRATION = "sensitivity", "calibration"
_EARLIER, _LATER = "an earlier version", "a later version"
_VERSIONED = ("torch", "triton", "runtime", "kernels")  # threads are a setting: their rows come back with it
Versions = Mapping[Path, str]  # folder → the other version of autoq that wrote it, or ""
_OWN = (KEY_FILE, "baseline.json", "part-*.parquet", "verified-*.json", ".lock")  # what autoq writes in a folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something in the cache that does not serve any more.

    Attributes:
        path: a file or a folder.
        reason: why, in words.
        removable: whether ``prune`` takes it away; else it could not be read at all, and says nothing of its content,
            or a later version of autoq may still use it.
    """

    path: Path
    reason: str
    removable: bool = True


def check(cache: Path) -> tuple[int, list[Finding]]:
    """Read every file of the cache's measurements.

    Returns:
        The number of files that are sound, and the others.
    """
    return _check(cache, _versions(cache))


def _check(cache: Path, versions: Versions) -> tuple[int, list[Finding]]:
    sound, findings = 0, []
    for path, read in _files(cache, versions):
        try:
            read(path)
        except CacheError as problem:
            if _vanished(path, problem):
                continue
            # What the system refuses to read may be sound, and a missing key is written again by its device.
            removable = not isinstance(problem.__cause__, OSError) and path.is_file()
            findings.append(Finding(path=path, reason=str(problem), removable=removable))
        else:
            sound += 1
    return sound, findings


def _vanished(path: Path, problem: CacheError) -> bool:
    """Whether a part is gone since it was listed: into another, by a process that had read it."""
    return path.name != KEY_FILE and isinstance(problem.__cause__, FileNotFoundError)


def _files(cache: Path, versions: Versions) -> Iterator[tuple[Path, Callable[[Path], object]]]:
    """Every file, with what reads it; nothing of earlier versions."""
    for folder in sharing.folders(cache):
        parts = profile_parts(folder)
        if not versions.get(folder) and _is_begun(folder, parts.files()):
            yield folder / KEY_FILE, lambda path: sharing.open_profile(path.parent)
            for path in parts.files():
                yield path, parts.read
            for path in sorted(folder.glob("verified-*.json")):
                yield path, sharing.read_mark
    for folder in sensitivity_folders(cache):
        parts = score_parts(folder)
        if not versions.get(folder) and _is_begun(folder, parts.files()):
            yield folder / KEY_FILE, lambda path: check_scores(path.parent)
            for path in parts.files():
                yield path, parts.read
            if (folder / "baseline.json").exists():
                yield folder / "baseline.json", read_baseline
    for path in sorted((cache / CALIBRATION).glob("*.json")):
        yield path, read_calibration


def _is_begun(folder: Path, parts: Sequence[Path]) -> bool:
    """Whether there is anything in a folder; not where the process that made it was killed before it wrote."""
    return bool(parts) or (folder / KEY_FILE).exists()


def sensitivity_folders(cache: Path) -> list[Path]:
    """One per model, inputs and version."""
    place = cache / SENSITIVITY
    return sorted(one for one in place.iterdir() if one.is_dir()) if place.is_dir() else []


def earlier_profiles(cache: Path) -> list[Path]:
    """Folders of profiles that an earlier version of autoq wrote, which are not read."""
    return [folder for folder in sharing.folders(cache) if _of_another_version(folder) == _EARLIER]


def _of_another_version(folder: Path) -> str:
    """Which version of autoq a folder is of, in words; empty where it is this one, or not to be told."""
    try:
        key = read_key(folder)
    except CacheError:
        return ""
    schema = key.get("schema", 1)
    if schema != SCHEMA:
        return _LATER if is_later(key) else _EARLIER if isinstance(schema, int) else ""
    made = key.get("autoq")
    return "" if made in (None, version("autoq")) else f"version {made}"


def prune(cache: Path, devices: Sequence[Fingerprint], *, dry_run: bool = False) -> list[Finding]:
    """Remove what does not serve any more.

    That is: files that a killed process left half written, damaged files, folders of other versions of autoq, and rows
    of this machine's devices with another version of torch, Triton, driver or kernels. Measurements with another
    number of threads stay, and so does all that was measured elsewhere.

    Args:
        cache: the cache's root.
        devices: of this machine, as they are now.
        dry_run: remove nothing.

    Returns:
        What was removed, and what would have been if it could be read.

    Raises:
        CacheError: if something cannot be removed.
    """
    versions = _versions(cache)
    left = _left(cache, versions, remove=not dry_run)
    findings = [
        Finding(path=folder, reason=f"written by {made} of autoq", removable=made != _LATER)
        for folder, made in versions.items()
        if made
    ]
    findings += _check(cache, versions)[1]
    for finding in findings:
        if finding.removable and not dry_run:
            folder = finding.path if finding.path.is_dir() else finding.path.parent
            with locked(folder, alone=True) if folder in versions else nullcontext():
                _remove(finding.path)
    findings = [Finding(path=path, reason="left by a process that was killed") for path in left] + findings
    for device in devices:
        folder = cache / sharing.LOCAL / device.device_key
        if folder.is_dir() and not versions.get(folder):
            findings += _stale_rows(folder, device, dry_run=dry_run)
    return findings


def _versions(cache: Path) -> Versions:
    return {folder: _of_another_version(folder) for folder in (*sharing.folders(cache), *sensitivity_folders(cache))}


def _left(cache: Path, versions: Versions, *, remove: bool) -> list[Path]:
    """What ``write_atomic`` left where it was killed; removed under its lock."""
    own = [folder for folder, made in versions.items() if made != _LATER] + [cache / CALIBRATION]
    return [path for place in own if place.is_dir() for path in leftovers(place, remove=remove)]


def _remove(path: Path) -> None:
    """A file, or of a folder what autoq wrote there."""
    try:
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        for pattern in _OWN:
            for file in path.glob(pattern):
                file.unlink(missing_ok=True)
        if not any(path.iterdir()):
            path.rmdir()
    except OSError as problem:
        raise CacheError(
            "the cache must be writable",
            where=str(path),
            got=reason_of(problem),
            fix="Run as the user who owns it.",
        ) from problem


def _stale_rows(folder: Path, device: Fingerprint, *, dry_run: bool) -> list[Finding]:
    """Take rows of other software out of a profile."""
    parts = profile_parts(folder)
    with locked(folder, alone=not dry_run):
        readable = {path: content for path in parts.files() if (content := _content(parts, path)) is not None}
        rows = parts.once(pa.concat_tables([tables.MEASUREMENTS.empty_table(), *readable.values()]))
        reasons = [_why_stale(row, device) for row in rows]
        if not dry_run and any(reasons):
            parts.replace([row for row, reason in zip(rows, reasons, strict=True) if not reason], list(readable))
    counts = Counter(filter(None, reasons))
    return [Finding(path=folder, reason=f"{count} rows of {reason}") for reason, count in sorted(counts.items())]


def _content(parts: Parts, path: Path) -> pa.Table | None:
    """A part's rows; None if it is damaged."""
    try:
        return parts.read(path)
    except CacheError:
        return None


def _why_stale(row: Row, device: Fingerprint) -> str:
    """What of a row's software is not installed any more, in words; empty if all of it is."""
    now: dict[str, Any] = device.conditions()
    gone = [name for name in _VERSIONED if row[name] not in (now[name], "")]
    return ", ".join(f"{'the kernels' if name == 'kernels' else name} {row[name]}" for name in gone)
