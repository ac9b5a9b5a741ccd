"""The tables of the proof, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpu_bench.proof_cases import SHAPES_NK
from gpu_bench.proof_checks import judged, narrow_loads
from gpu_bench.proof_rows import instructions_per_weight, issue_share
from gpu_bench.proof_targets import ARCHITECTURES

Row = Mapping[str, Any]
_FAMILIES = ("gemv", "gemm", "dequantize")
_N, _K = SHAPES_NK[0]
_LONGEST_LIST = 200


def report(document: Mapping[str, Any]) -> str:
    """The whole report.

    Args:
        document: ``rows``, ``about`` (lines on what was covered), ``date`` and ``command``.
    """
    rows = document["rows"]
    failed, known = judged(rows)
    versions = sorted({row["triton"] for row in rows}, key=_version, reverse=True)
    parts = [
        "# Compiled without a GPU",
        f"`{document['command']}`, {document['date']}, Triton {' and '.join(versions)}.",
        *document["about"],
        _LEGEND,
        "## All configurations",
        _summary(rows, versions),
        f"## Failed checks: {len(failed)}",
        _listed(failed) or "None.",
        f"## Known exceptions: {len(known)}",
        _listed(known) or "None.",
    ]
    for family in _FAMILIES:
        parts += [f"## {family}, bf16, N = {_N}, K = {_K}, default configurations", _defaults(rows, family, versions)]
    parts += ["## Other kernels, default configurations, largest of all", _others(rows, versions)]
    return "\n\n".join(parts) + "\n"


_LEGEND = (
    "M is the first that has a configuration. Registers are of one thread; *spilled* counts loads and stores of "
    "spilled registers (AMD: vector registers), and AMD's scalar registers kept in vector registers, not memory. "
    "Weight loads are those whose address is computed from the place of the codes: count × bytes. Instructions are "
    "those of the longest loop, for each weight that a thread handles in a step of it. *Issue/read* holds the time to "
    "issue them, all lanes of the architecture's device "
    f"({', '.join(one.device for one in ARCHITECTURES.values())}) busy at boost clock, against the time to read the "
    "weight at full bandwidth: above 1, instructions are the limit. Where there are two numbers, the second is of the "
    "older Triton."
)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.partition("+")[0].split(".") if part.isdigit())


def table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    text = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(text + [f"| {' | '.join(map(str, line))} |" for line in lines])


def _summary(rows: Sequence[Row], versions: Sequence[str]) -> str:
    lines = []
    for version in versions:
        for name, architecture in ARCHITECTURES.items():
            mine = [row for row in rows if (row["triton"], row["architecture"]) == (version, name)]
            made = [row for row in mine if "error" not in row]
            if not made:
                continue
            products = [row for row in made if row["main"] and row["family"] == "gemm"]
            spilling = [row for row in made if row["spilled"] or row["stack_bytes"]]
            shared = max(row["shared_bytes"] for row in made)
            lines.append(
                (
                    version,
                    name,
                    len(made),
                    len(mine) - len(made),
                    max(row["registers"] for row in made),
                    sum(row["default"] for row in spilling),
                    len(spilling),
                    max((row["stack_bytes"] for row in made), default=0),
                    f"{shared / 1024:.0f} of {architecture.shared_bytes // 1024}",
                    sum(narrow_loads(row) is not None for row in made),
                    f"{sum(architecture.matrix in row['matrix'] for row in products)} of {len(products)}",
                    f"{sum(row.get('seconds', 0) for row in mine):.0f}",
                )
            )
    head = (
        "Triton", "architecture", "compiled", "failed", "most registers", "spill, default", "spill, all",
        "largest stack, bytes", "most shared, KiB", "narrow loads, all", "gemm with matrix instruction", "seconds",
    )  # fmt: skip
    return table(head, lines)


def _listed(found: Sequence[tuple[Row, str, str]]) -> str:
    """One line for each kind of finding on each architecture, with how many there are and the first."""
    grouped: dict[tuple[str, ...], list[tuple[Row, str, str]]] = {}
    for one in found:
        row, check, _ = one
        key = (row["triton"], row["architecture"], check, row["kernel"], row["scheme"], row["dtype"])
        grouped.setdefault(key, []).append(one)
    lines = [
        (*key, len(group), f"m{group[0][0]['m']} {group[0][0]['config']}", group[0][2].replace("\n", " ")[:300])
        for key, group in grouped.items()
    ]
    head = ("Triton", "architecture", "check", "kernel", "scheme", "dtype", "count", "first", "found")
    more = f"\n\n… and {len(lines) - _LONGEST_LIST} more lines." if len(lines) > _LONGEST_LIST else ""
    return table(head, lines[:_LONGEST_LIST]) + more if lines else ""


def _defaults(rows: Sequence[Row], family: str, versions: Sequence[str]) -> str:
    chosen: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        typical = row["dtype"] == "bf16" and (row["n"], row["k"]) == (_N, _K) and not row["bias"]
        if row["main"] and row["family"] == family and row["default"] and typical:
            key = row["scheme"], row["config"], row["architecture"]
            chosen.setdefault(key, {}).setdefault(row["triton"], row)
    lines = []
    for (scheme, config, architecture), by_version in sorted(chosen.items(), key=_place):
        both = [by_version[version] for version in versions if version in by_version]
        made = [row for row in both if "error" not in row]
        if not made:
            lines.append((scheme, both[0]["m"], config, architecture, "does not compile", *[""] * 6))
            continue
        issue = [issue_share(row) for row in made]
        lines.append(
            (
                scheme,
                made[0]["m"] or "",
                config.removeprefix(family).strip(),
                architecture,
                _joined(row["registers"] for row in made),
                _joined(row["spilled"] + row["scalar_spilled"] for row in made),
                _joined(f"{row['shared_bytes'] / 1024:.1f}" for row in made),
                _joined(_times(row["weight_loads"]) for row in made),
                _joined(_times(row["matrix"], "{count} {name}") for row in made),
                _joined(f"{count:.2f}" if (count := instructions_per_weight(row)) else "" for row in made),
                _joined(f"{one:.2f}" if one else "" for one in issue),
            )
        )
    head = (
        "scheme", "M", "configuration", "architecture", "registers", "spilled or scalar", "shared, KiB", "weight loads",
        "matrix", "instructions per weight", "issue/read",
    )  # fmt: skip
    return table(head, lines)


def _place(entry: tuple[tuple[str, str, str], Mapping[str, Row]]) -> tuple[Any, ...]:
    """Where a line of a table stands: by format, then M, then architecture."""
    (scheme, config, architecture), by_version = entry
    m = min(row["m"] for row in by_version.values())
    return scheme, m, config, list(ARCHITECTURES).index(architecture)


def _others(rows: Sequence[Row], versions: Sequence[str]) -> str:
    lines = []
    names = Counter(row["kernel"] for row in rows if not row["main"])
    for kernel in sorted(names):
        for name in ARCHITECTURES:
            made = [
                row
                for row in rows
                if row["kernel"] == kernel and row["architecture"] == name and "error" not in row and row["default"]
            ]
            if made:
                lines.append(
                    (
                        kernel,
                        name,
                        len(made),
                        max(row["registers"] for row in made),
                        max(row["spilled"] for row in made),
                        f"{max(row['shared_bytes'] for row in made) / 1024:.1f}",
                    )
                )
    return table(("kernel", "architecture", "compiled", "registers", "spilled", "shared, KiB"), lines)


def _times(counts: Mapping[Any, int], form: str = "{count}×{name}") -> str:
    return " ".join(form.format(count=count, name=name) for name, count in counts.items())


def _joined(values: Iterable[Any]) -> str:
    """Values of each Triton; once where they agree."""
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)
