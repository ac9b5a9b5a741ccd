"""The outcomes as Markdown tables."""

from pathlib import Path
from typing import Any

from fault_bench.refusals import FAULTS
from fault_bench.writers import WRITERS

BEGIN, END = "<!-- made by benchmarks/faults.py -->", "<!-- end -->"


def faults(found: dict[str, Any]) -> list[str]:
    """What went wrong, in words; empty if nothing did."""
    wrong = []
    for one in found["refusals"]:
        if "skipped" not in one and _refusal(one) is None:
            wrong.append(f"{one['writer']}, {one['fault']}: {one}")
    for one in [*found["kills"], *([found["tune"]] if found["tune"] else [])]:
        wrong += [f"{one.get('writer', 'tune')}: {problem}" for problem in one["problems"]]
        if any(one.get(name) for name in ("lost", "broken", "repeated")) and not one["problems"]:
            wrong.append(f"{one.get('writer', 'tune')}: {one}")
    return wrong


def _refusal(one: dict[str, Any]) -> str | None:
    """A cell for a fault that was met as it should be."""
    if one["error"].startswith("not an") or not one["error"] or not one["intact"] or one["versions"] != [1]:
        return None
    return f"{one['error']}, old intact"


def tables(found: dict[str, Any]) -> str:
    """All tables."""
    parts = []
    if found["refusals"]:
        parts.append(_refusals(found["refusals"]))
    if found["kills"]:
        parts.append(_kills(found["kills"]))
    if found["tune"]:
        parts.append(_tune(found["tune"]))
    wrong = faults(found)
    parts.append("\n".join(f"- {one[:600]}" for one in wrong) if wrong else "Nothing was lost, broken or left unsaid.")
    return "\n\n".join(parts)


def _refusals(rows: list[dict[str, Any]]) -> str:
    cells = {(one["writer"], one["fault"]): one for one in rows}
    lines = ["| written | " + " | ".join(FAULTS) + " |", "|---" * (len(FAULTS) + 1) + "|"]
    for name in WRITERS:
        row = [cells[name, fault] for fault in FAULTS if (name, fault) in cells]
        if row:
            texts = ["not possible here" if "skipped" in one else _refusal(one) or "**wrong**" for one in row]
            lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _kills(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| written | kills | before a change | at a byte | at a time | finished and lost | half-written | left over |",
        "|---" * 8 + "|",
    ]
    for one in rows:
        by = [one["by"].get(mode, 0) for mode in ("change", "byte", "time")]
        cells = [one["writer"], one["kills"], *by, one["lost"], one["broken"], one["left"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    total = [sum(one[name] for one in rows) for name in ("kills", "lost", "broken", "left")]
    lines.append(f"| all | {total[0]} | | | | {total[1]} | {total[2]} | {total[3]} |")
    return "\n".join(lines)


def _tune(one: dict[str, Any]) -> str:
    stages = ", ".join(f"{stage} {count}" for stage, count in sorted(one["stages"].items(), key=lambda item: -item[1]))
    return (
        "| tune | kills | runs to the end | finished before a kill | of these lost | measured again |\n"
        "|---|---|---|---|---|---|\n"
        f"| small classifier | {one['kills']} | {one['runs']} | {one['finished']} | {one['lost']} | {one['repeated']} |"
        f"\n\nStages in which the kills fell: {stages}."
    )


def insert(path: Path, text: str) -> None:
    """Put the tables between the marks of a Markdown file."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{path} lacks the marks {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
