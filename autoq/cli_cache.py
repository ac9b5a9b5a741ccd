"""The verbs of ``autoq cache``: what was measured, whether it is sound, and taking it elsewhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoq.cli_options import cache_option, example, json_option, print_json, print_table

if TYPE_CHECKING:
    from rich.table import Table

    from autoq.cache import Fingerprint
    from autoq.cache.sharing import Profile
    from autoq.profiler import Remeasured


@click.group(
    "cache",
    short_help="Look after what was measured.",
    epilog=example("autoq cache ls", "autoq cache verify --measure 20"),
)
def cache_group() -> None:
    """Look after what was measured: times per device, what schemes cost models."""


@cache_group.command("ls", epilog=example("autoq cache ls"))
@cache_option
@json_option
def list_profiles(*, cache_dir: Path | None, as_json: bool) -> None:
    """List the profiles: the times of one device each."""
    from autoq.cache import housekeeping, sharing

    folder, devices = _folder(cache_dir), _devices()
    found = [_described(one, devices) for one in sharing.folders(folder)]
    models = len(housekeeping.sensitivity_folders(folder))
    if as_json:
        print_json({"cache": str(folder), "profiles": found, "models": models})
        return
    table = _table("key", "device", "", "rows", "hold now", "MB", title=str(folder))
    for one in found:
        sizes = ["", "", ""] if one["fault"] else [f"{one['rows']}", f"{one['current']}", f"{one['bytes'] / 1e6:.1f}"]
        table.add_row(*map(_cell, (one["key"], one["fault"] or one["device"], one["kind"], *sizes)))
    print_table(table)
    click.echo(f"Besides: what schemes cost {models} model{'s' if models != 1 else ''}.")


@cache_group.command("show", short_help="Show one profile.", epilog=example("autoq cache show 3f2a"))
@click.argument("key")
@cache_option
@json_option
def show_profile(*, key: str, cache_dir: Path | None, as_json: bool) -> None:
    """Show one profile: its device, and the software and threads of its rows.

    KEY is the first digits of a key that ls lists; foreign/KEY or profiles/KEY where both have it.
    """
    from autoq.cache import sharing

    profile = sharing.find(_folder(cache_dir), key)
    groups = _by_software(profile, _devices())
    if as_json:
        print_json({"key": profile.key, "foreign": profile.foreign, "device": dict(profile.hardware), "rows": groups})
        return
    device = _table("device", profile.key, title="foreign" if profile.foreign else "")
    for name, value in profile.hardware.items():
        device.add_row(name, _cell(value))
    print_table(device)
    columns = ("threads", "torch", "triton", "runtime", "kernels", "rows", "shapes", "schemes", "hold now")
    table = _table(*columns)
    for one in groups:
        table.add_row(*(_cell(one[name.replace(" ", "_")]) for name in columns))
    print_table(table)


@cache_group.command("verify", epilog=example("autoq cache verify", "autoq cache verify 3f2a --measure 20"))
@click.argument("key", required=False)
@click.option("--measure", type=click.IntRange(min=1), metavar="N", help="Measure N random rows again, on this device.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw.")
@cache_option
@json_option
def verify(*, key: str | None, measure: int | None, seed: int, cache_dir: Path | None, as_json: bool) -> None:
    """Read every file; with --measure, hold kept times against new ones.

    Without KEY it is this device's profile that is measured again. With the KEY of another device's, agreement within
    10 % in the median marks it as verified on this device, until the software here changes.
    """
    from autoq.cache import housekeeping

    folder = _folder(cache_dir)
    sound, findings = housekeeping.check(folder)
    found: dict[str, Any] = {
        "files": sound,
        "faults": [{"path": str(one.path), "reason": one.reason} for one in findings],
    }
    if measure is not None or key is not None:
        found |= _measured_again(folder, key, measure, seed)
    if as_json:
        print_json(found)
    else:
        _print_verified(found)
    if findings:
        click.get_current_context().exit(1)


@cache_group.command("prune", epilog=example("autoq cache prune --dry-run"))
@click.option("--dry-run", is_flag=True, help="Remove nothing; tell what would go.")
@cache_option
@json_option
def prune(*, dry_run: bool, cache_dir: Path | None, as_json: bool) -> None:
    """Remove what no longer serves, and say what.

    That is what killed processes left, damaged files, folders of other versions of autoq, and this machine's rows of
    another torch, Triton, driver or kernels. Rows of other thread counts, and of other devices, stay.
    """
    from autoq.cache import housekeeping

    findings = housekeeping.prune(_folder(cache_dir), _devices(), dry_run=dry_run)
    if as_json:
        print_json({"dry_run": dry_run, "findings": [asdict(one) | {"path": str(one.path)} for one in findings]})
        return
    for one in findings:
        done = ("Would remove" if dry_run else "Removed") if one.removable else "Left, not readable"
        click.echo(f"{done}: {one.path}: {one.reason}")
    if not findings:
        click.echo("Nothing to remove.")


@cache_group.command("export", epilog=example("autoq cache export 3f2a epyc-9554.parquet"))
@click.argument("key")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@cache_option
@json_option
def export_profile(*, key: str, file: Path, cache_dir: Path | None, as_json: bool) -> None:
    """Write a profile to one Parquet FILE, with its device in clear.

    It holds shapes, times, and names of hardware and software; nothing of a model but its shapes.
    """
    from autoq.cache import sharing

    profile = sharing.find(_folder(cache_dir), key)
    rows = sharing.export_profile(profile, file)
    if as_json:
        print_json({"file": str(file), "key": profile.key, "rows": rows})
        return
    click.echo(f"Written: {file}, {rows} rows of {profile.hardware['name']}")


@cache_group.command(
    "import", short_help="Add another device's profile.", epilog=example("autoq cache import epyc-9554.parquet")
)
@click.argument("file", type=click.Path(path_type=Path))
@cache_option
@json_option
def import_profile(*, file: Path, cache_dir: Path | None, as_json: bool) -> None:
    """Add another device's profile from FILE; used for predictions, and only where asked."""
    from autoq.cache import sharing

    profile, rows = sharing.import_profile(_folder(cache_dir), file)
    if as_json:
        print_json({"file": str(file), "key": profile.key, "rows": rows, "device": dict(profile.hardware)})
        return
    click.echo(f"Foreign profile {profile.key}: {rows} rows of {profile.hardware['name']}")
    click.echo(f"Use it with: autoq tune MODEL --profile-from {profile.key}")


def _folder(given: Path | None) -> Path:
    from autoq.cache import default_folder

    return given or default_folder()


def _devices() -> list[Fingerprint]:
    """This machine's, as they are now."""
    import torch

    from autoq.cache import Fingerprint

    return [Fingerprint.current(kind) for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))]


def _described(folder: Path, devices: list[Fingerprint]) -> dict[str, Any]:
    """One line of the list."""
    from autoq.cache import sharing
    from autoq.errors import CacheError

    foreign = folder.parent.name == sharing.FOREIGN
    here = next((one for one in devices if one.device_key == folder.name), None)
    kind = "foreign" if foreign else "this machine" if here is not None else "another machine"
    found = {"key": folder.name, "kind": kind, "device": "", "rows": 0, "current": 0, "bytes": 0, "fault": ""}
    try:
        profile = sharing.open_profile(folder)
        rows = profile.rows()
        if any(sharing.is_verified(profile, one) for one in devices):
            found["kind"] = f"{kind}, verified"
    except CacheError as problem:
        return found | {"fault": str(problem)}
    size = sum(path.stat().st_size for path in profile.parts.files())
    current = 0 if here is None or foreign else sum(map(here.covers, rows))
    return found | {"device": profile.hardware["name"], "rows": len(rows), "current": current, "bytes": size}


def _by_software(profile: Profile, devices: list[Fingerprint]) -> list[dict[str, Any]]:
    """The rows counted by what they depend on besides the device."""
    names = ("threads", "torch", "triton", "runtime", "kernels")
    rows = profile.rows()
    counts = Counter(tuple(row[name] for name in names) for row in rows)
    found = []
    for software, count in counts.items():
        same = [row for row in rows if tuple(row[name] for name in names) == software]
        shapes = {tuple(row[name] for name in ("m", "k", "n", "dtype", "bias")) for row in same}
        current = not profile.foreign and any(one.covers(same[0]) for one in devices)
        sizes = {"rows": count, "shapes": len(shapes), "schemes": len({row["scheme"] for row in same})}
        found.append(dict(zip(names, software, strict=True)) | sizes | {"hold_now": current})
    return found


def _measured_again(folder: Path, key: str | None, count: int | None, seed: int) -> dict[str, Any]:
    """Rows of a profile beside new times; a foreign profile that agrees is marked."""
    import torch

    from autoq.cache import Fingerprint, sharing
    from autoq.profiler import remeasure, usable

    here = Fingerprint.current()
    profile = sharing.find(folder, here.device_key if key is None else key, foreign=key is not None)
    if profile.hardware["device"] == "cuda" and torch.cuda.is_available():
        here = Fingerprint.current("cuda")
    known: dict[str, Any] = {"key": profile.key, "device": profile.hardware["name"]}
    if count is None:
        return known
    sharing.check_kind(profile, here)
    files = profile.parts.files()
    own = not profile.foreign and profile.key == here.device_key
    known_rows = usable(profile.rows())
    rows = [row for row in known_rows if here.covers(row)] if own else sharing.coherent(known_rows)
    found = remeasure(rows, count, fingerprint=here, device=here.device, seed=seed)
    known |= _figures(found)
    if not own:
        enough = len(found.now) >= min(sharing.MIN_VERIFIED, len(rows))
        known["verified"] = bool(found.now) and enough and found.deviation <= sharing.MAX_DEVIATION
        if known["verified"]:
            sharing.mark_verified(profile, here, files, sample=found.kept, deviation=found.deviation)
    return known


def _figures(found: Remeasured) -> dict[str, Any]:
    from statistics import median

    quotients = sorted(found.quotients)
    return {
        "measured": len(found.now),
        "failed": found.failed,
        "median_deviation": found.deviation if len(quotients) > found.failed else None,
        "median_quotient": median(quotients) if quotients else None,
        "quotients": quotients,
    }


def _print_verified(found: dict[str, Any]) -> None:
    for one in found["faults"]:
        click.echo(f"Damaged: {one['reason']}")
    click.echo(f"{found['files']} files are sound, {len(found['faults'])} are not.")
    if "measured" not in found:
        return
    click.echo(f"{found['measured']} rows of {found['device']} measured again, {found['failed']} could not be.")
    if found["median_quotient"] is not None:
        low, high = found["quotients"][0], found["quotients"][-1]
        click.echo(f"Ratio now ÷ ratio kept: median {found['median_quotient']:.3f}, from {low:.3f} to {high:.3f}.")
    if found["median_deviation"] is not None:
        click.echo(f"Median deviation {found['median_deviation']:.1%}.")
    if "verified" in found:
        click.echo("Verified on this device." if found["verified"] else "Not verified on this device.")


def _table(*columns: str, title: str = "") -> Table:
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left")


def _cell(value: object) -> str:
    from rich.markup import escape

    return ("yes" if value else "no") if isinstance(value, bool) else escape(str(value))
