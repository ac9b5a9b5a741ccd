"""The tables of the command line. Printing them is the command line's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Column, Table

from autoq.summary import family, loss_row, phase_loss_rows, summary_rows

if TYPE_CHECKING:
    from autoq.diagnosis import Fact
    from autoq.plan import Plan
    from autoq.plan_diff import PlanDiff


def summary(plan: Plan, *, title: str) -> Table:
    """The table of a plan."""
    table = Table("", "unquantized", "autoq", "change", title=escape(title), title_justify="left")
    for row in summary_rows(plan):
        table.add_row(*map(escape, row))
    return table


def losses(found: Mapping[str, Any], *, title: str) -> Table:
    """Loss before and, when it was measured, after."""
    table = Table("", "as it is", "under the plan", "change", title=escape(title), title_justify="left")
    for row in (loss_row(found, found), *phase_loss_rows(found, found)):
        table.add_row(*map(escape, row))
    return table


def origin(plan: Plan) -> Table:
    """Where a plan comes from."""
    known = plan.provenance
    facts = {
        "budget": (known.get("budget") or {}).get("text"),
        "created": known.get("created"),
        "autoq": known.get("autoq"),
        "device": (known.get("device") or {}).get("name"),
        "edited": "yes; the original plan's figures were dropped" if known.get("edited") else None,
        "retargeted": "yes; what is not measured is predicted" if known.get("retargeted") else None,
        "remeasured": _remeasured(known.get("remeasured") or {}),
        "schema 1": "a file without a hash: nothing shows whether it was edited" if "schema_1" in known else None,
        "comment": known.get("comment"),
    }
    table = Table("provenance", "")
    for name, value in facts.items():
        if value:
            table.add_row(name, escape(str(value)))
    if table.row_count == 0:
        table.add_row("none", "written by hand")
    return table


def _remeasured(known: Mapping[str, Any]) -> str | None:
    if not known:
        return None
    elsewhere = (known.get("loss_device") or {}).get("name")
    return f"{known.get('created', 'yes')}{f'; the loss was measured on {elsewhere}' if elsewhere else ''}"


def layers(plan: Plan) -> Table:
    """Every layer with its family and scheme, blocks in the order of their numbers."""
    table = Table("layer", "family", "scheme")
    for layer in sorted(plan.layers, key=_order):
        table.add_row(escape(layer), family(layer), str(plan.layers[layer]))
    return table


def _order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def differences(found: PlanDiff, *, names: tuple[str, str], layers: bool) -> list[Table]:
    """The tables of two plans' differences: schemes by family, layers and kernels where asked for, units, all else.

    Args:
        found: the differences.
        names: of the two plans, as headings.
        layers: adds a table with every layer that differs, and names every kernel that does.
    """
    moved = Table("layers", *map(escape, names))
    for part, counts in found.by_family.items():
        for (before, after), count in counts.most_common():
            moved.add_row(f"{part}: {count} layer{'s' if count > 1 else ''}", before, after)
    each = Table("layer", *map(escape, names))
    pairs = {name: (str(a), str(b)) for name, (a, b) in found.changed.items()}
    pairs |= {name: (str(a), "") for name, a in found.only_a.items()}
    pairs |= {name: ("", str(b)) for name, b in found.only_b.items()}
    for name in sorted(pairs, key=_order):
        each.add_row(escape(name), *pairs[name])
    other = Table("", *map(escape, names))
    for name, (first, second) in found.units.items():
        other.add_row(escape(f"unit {name}"), *(", ".join(map(escape, one)) for one in (first, second)))
    kernels = [name for name in found.facts if name.startswith("kernels.")]
    for name, pair in found.facts.items():
        if layers or name not in kernels:
            other.add_row(escape(name), *("" if one is None else escape(_short(one)) for one in pair))
    if kernels and not layers:
        other.add_row("kernels", f"{len(kernels)} differ; --layers lists them", "")
    tables = [moved, each, other] if layers else [moved, other]
    return [table for table in tables if table.row_count]


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def diagnosis(facts: Sequence[Fact]) -> Table:
    """What ``doctor`` found; a problem is marked."""
    table = Table(*(Column(name, overflow="fold") for name in ("", "found", "what to do")))
    for fact in facts:
        table.add_row(f"! {fact.name}" if fact.problem else fact.name, escape(fact.value), escape(fact.advice))
    return table
