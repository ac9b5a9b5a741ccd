"""The paper roofline as Markdown, for docs/gpu.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from autoq import candidates
from autoq.candidates import Candidate
from gpu_bench import published, roofline
from gpu_bench.roofline import DEVICES, LLAMA_3_8B, Device

BEGIN = "<!-- begin: python benchmarks/gpu.py --roofline docs/gpu.md -->"
END = "<!-- end -->"
ROWS = (1, 16, 512, 2048)


def put_into(text: str) -> str:
    """A document with its marked section replaced by the tables.

    Raises:
        ValueError: it has no such section.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the section starts with {BEGIN!r} and ends with {END!r}; got no such lines")
    return f"{before}{BEGIN}\n\n{markdown()}\n\n{END}{after}"


def markdown() -> str:
    """All tables."""
    schemes = [candidates.parse(text) for text in roofline.SCHEMES]
    blocks = ["### Devices", _devices(), "### Bytes and operations", _weights(schemes)]
    for device in DEVICES:
        blocks += [f"### One row of x, {device.name}", _one_row(device, schemes)]
    blocks += ["### All linear layers of Llama-3-8B, ms", _rows(schemes), "### Tokens per second", _tokens(schemes)]
    blocks += ["### What others measured", _published()]
    return "\n\n".join(blocks)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _devices() -> str:
    header = ("GPU", "GB/s", "bf16, fp16 TFLOPS", "int8 TOPS", "multiprocessors", "GHz", "from")
    rows = [
        (
            one.name,
            f"{one.bandwidth_gb_s:g}",
            f"{one.float_tflops:g}",
            f"{one.int8_tops:g}",
            f"{one.multiprocessors}",
            f"{one.clock_ghz:g}",
            one.source,
        )
        for one in DEVICES
    ]
    return _table(header, rows)


def _weights(schemes: Sequence[Candidate]) -> str:
    header = ("MB", *(f"{one.name} {one.n}×{one.k}" for one in LLAMA_3_8B), "model, GB", "bits per weight")
    rows = []
    weights = sum(one.count * one.n * one.k for one in LLAMA_3_8B)
    for scheme in schemes:
        sizes = [scheme.weight_bytes_for(one.n, one.k) for one in LLAMA_3_8B]
        whole = sum(one.count * size for one, size in zip(LLAMA_3_8B, sizes, strict=True))
        rows.append(
            (
                _name(scheme),
                *(f"{size / 1e6:.1f}" for size in sizes),
                f"{whole / 1e9:.2f}",
                f"{8 * whole / weights:.2f}",
            )
        )
    operations = [f"{2 * one.n * one.k / 1e6:.0f}" for one in LLAMA_3_8B]
    rows.append(("10⁶ operations per row of x", *operations, f"{2 * weights / 1e9:.1f}·10⁹", ""))
    return _table(header, rows)


def _one_row(device: Device, schemes: Sequence[Candidate]) -> str:
    header = ("µs", *(one.name for one in LLAMA_3_8B), "model, ms", "instructions per weight", "executing / reading")
    rows = []
    for scheme in schemes:
        found = [roofline.times(device, scheme, (one.n, one.k), 1) for one in LLAMA_3_8B]
        reading = sum(one.count * each.read for one, each in zip(LLAMA_3_8B, found, strict=True)) / 1e3
        issuing = sum(one.count * each.issue for one, each in zip(LLAMA_3_8B, found, strict=True)) / 1e3
        ours = ("", "")
        if issuing:
            counts = roofline.instructions_of(device, scheme)
            ours = (f"{counts.issued:.1f}, {counts.integer:.1f} integer", f"{issuing / reading:.2f}")
        whole = roofline.model_ms(device, scheme, 1)
        rows.append((_name(scheme), *(f"{each.total:.1f}" for each in found), f"{whole:.2f}", *ours))
    return _table(header, rows)


def _rows(schemes: Sequence[Candidate]) -> str:
    header = ("M", *(f"{device.name.removesuffix(' 80GB SXM')}: {m}" for device in DEVICES for m in ROWS))
    rows = [
        (_name(scheme), *(f"{roofline.model_ms(device, scheme, m):.1f}" for device in DEVICES for m in ROWS))
        for scheme in schemes
    ]
    return _table(header, rows)


def _tokens(schemes: Sequence[Candidate]) -> str:
    rests = {device: published.rest_range_ms(device) for device in DEVICES}
    header = ("predicted; published", *(device.name for device in DEVICES))
    rows: list[Sequence[str]] = [
        ("outside the linear layers, ms per token", *(f"{least:.2f} – {most:.2f}" for least, most in rests.values()))
    ]
    for scheme in schemes:
        cells = []
        for device in DEVICES:
            theirs = [
                f"{row.tokens_per_s:.0f}"
                for row in published.PUBLISHED
                if (row.device, row.scheme) == (device, str(scheme))
            ]
            slow, fast = published.tokens_per_s(device, scheme)
            mine = "" if scheme.key == "none" else f"{slow:.0f} – {fast:.0f}"
            cells.append("; ".join(part for part in (mine, *theirs) if part))
        rows.append((_name(scheme), *cells))
    return _table(header, rows)


def _published() -> str:
    header = ("GPU", "what", "tokens/s", "ms", "its linear layers, GB", "the share of bandwidth they had", "from")
    rows = []
    for row in published.PUBLISHED:
        least, most = published.rest_range_ms(row.device)
        shares = [row.linear_gb / (row.ms - rest) * 1e3 / row.device.bandwidth_gb_s for rest in (least, most)]
        rows.append(
            (
                row.device.name,
                row.name,
                f"{row.tokens_per_s:.1f}",
                f"{row.ms:.2f}",
                f"{row.linear_gb:.2f}",
                f"{100 * shares[0]:.0f} – {100 * shares[1]:.0f} %",
                row.source,
            )
        )
    return _table(header, rows)


def _name(scheme: Candidate) -> str:
    return f"`{scheme}`"
