"""An explanation as text: tables of plain lines, and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from autoq.explaining_values import VERDICTS, Alternative, Change, Choice, Family, LeftAlone

if TYPE_CHECKING:
    from autoq.plan import Plan
    from autoq.pricing import Pricing

_HEADER = ("scheme", "time a request", "loss [95 %]", "weights", "")
_SHOWN = 8  # layers left alone
_RIGHT = 1, 3


def duration(time_us: float, *, sign: bool = False) -> str:
    """Microseconds in the unit that suits them: ``812 µs``, ``8.12 ms``, ``1.23 s``."""
    plus = "+" if sign else ""
    size = abs(time_us)
    if size >= 1e6:
        return f"{time_us / 1e6:{plus}.3g} s" if size < 1e9 else f"{time_us / 1e6:{plus}.0f} s"
    return f"{time_us / 1e3:{plus}.3g} ms" if size >= 1e3 else f"{time_us:{plus}.3g} µs"


def weight(size: float, *, sign: bool = False) -> str:
    """Bytes in the unit that suits them: ``12.1 MB`` (10⁶ bytes)."""
    plus = "+" if sign else ""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(size) >= unit:
            return f"{size / unit:{plus}.3g} {name}"
    return f"{size:{plus}.0f} B"


def loss_text(change: Change) -> str:
    """A change of the loss with its interval, in the metric's unit."""
    return f"{change.loss:+.2g} [{change.loss_low:+.2g}, {change.loss_high:+.2g}]"


def sentence(change: Change, price: Pricing) -> str:
    """A change of one unit as a sentence: what it forces, saves and costs."""
    names = list(change.layers)
    layers = names[0] if len(names) == 1 else f"{names[0]} and the {len(names) - 1} decided with it"
    scheme = next(iter(change.layers.values()))
    ends = sorted((abs(change.loss_low), abs(change.loss_high)))
    spread = f"[{ends[0]:.2g}, {ends[1]:.2g}]" if change.loss_low * change.loss_high > 0 else "(perhaps none)"
    gains: list[str] = []
    costs: list[str] = []
    for value, text in (
        (change.time_us, f"{duration(abs(change.time_us))} a request"),
        (change.loss, f"{abs(change.loss):.2g} {price.unit} {spread}"),
        (change.weight_bytes, weight(abs(change.weight_bytes))),
    ):
        if value:
            (gains if value < 0 else costs).append(text)
    parts = [f"{verb} {_and(of)}" for verb, of in (("saves", gains), ("costs", costs)) if of]
    end = f"; then over a limit: {change.over}" if change.over else ""
    what = " and ".join(parts) or "changes nothing"
    return f"Forcing {layers} from {price.chosen[names[0]]} to {scheme} {what}{end}."


def _and(texts: Sequence[str]) -> str:
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 2 else texts)


def as_text(
    plan: Plan,
    price: Pricing,
    families: Sequence[Family],
    changes: Sequence[Change],
    left_alone: Sequence[LeftAlone],
) -> str:
    """The plan by family, the changes nearest to being made, and what was left alone."""
    budget = plan.provenance.get("budget") or {}
    how = "measured" if price.measured else "predicted"
    whole = price.measured or price.request.rest_us is not None
    what = "A request takes" if whole else "Of a request its layers take"
    lines = [
        f"Plan {plan.hash}: {len(price.costs)} layers. Budget: {budget.get('text', 'not recorded')}.",
        f"{what} {duration(price.time_us)} and the loss is {price.loss:+.3g} {price.unit} ({how}).",
        "Differences from the plan, predicted; losses are estimated from gradients unless it says measured.",
    ]
    for part in families:
        lines += ["", family_title(part), *_table(_rows(part.alternatives))]
    if changes:
        lines += ["", "Single changes nearest to being made"]
        lines += [f"  {sentence(one, price)}" for one in changes]
    if left_alone:
        lines += ["", f"Left alone: {len(left_alone)}"]
        lines += [f"  {layer}: {reason}" for layer, reason in left_alone[:_SHOWN]]
        if len(left_alone) > _SHOWN:
            lines.append(f"  … and {len(left_alone) - _SHOWN} more")
    others = plan.provenance.get("model", {}).get("left_alone", {})
    if others:
        lines += ["", "Weights that no plan can quantize"]
        lines += [f"  {other_text(kind, one)}" for kind, one in others.items()]
    return "\n".join(lines)


def other_text(kind: str, found: Mapping[str, float]) -> str:
    """Weights of a kind that no plan can quantize: how many, their bytes and share of the model's."""
    share = f", {found['share']:.1%} of the model's bytes" if "share" in found else ""
    count = f" in {found['weights']:g}" if "weights" in found else ""
    return f"{kind}: {weight(found.get('bytes', 0))}{count}{share}"


def choice_text(choice: Choice, price: Pricing) -> str:
    """One unit under every scheme."""
    how = "measured alone" if choice.measured else "estimated"
    loss = f"{choice.loss:+.2g} [{choice.loss_low:+.2g}, {choice.loss_high:+.2g}] {price.unit} ({how})"
    lines = [f"{choice.unit}: {choice.scheme}"]
    if len(choice.layers) > 1:
        lines.append(f"decided together: {', '.join(choice.layers)}")
    cost = loss if choice.loss else "no loss"
    lines.append(f"takes {duration(choice.time_us)} of a request and {weight(choice.weight_bytes)}; costs {cost}")
    return "\n".join([*lines, "", "Instead, it would be, compared with the plan", *_table(_rows(choice.alternatives))])


def family_title(part: Family) -> str:
    """A family with how many of its layers have which scheme."""
    schemes = ", ".join(f"{scheme} ×{count}" for scheme, count in part.schemes.items())
    return f"{part.name}, {part.layers} layer{'s' if part.layers > 1 else ''}: {schemes}. On all of them:"


def _rows(alternatives: Iterable[Alternative]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for one in alternatives:
        if one.change is None:
            rows.append((one.scheme, "", "", "", f"refused {one.refused}"))
            continue
        change = one.change
        note = "as it is" if not change.layers else f"over: {change.over}" if change.over else VERDICTS[one.verdict]
        if one.refused:
            note += f"; refused {one.refused}"
        mark = " (measured)" if change.measured and change.loss else ""
        rows.append(
            (
                one.scheme,
                duration(change.time_us, sign=True),
                loss_text(change) + mark,
                weight(change.weight_bytes, sign=True),
                note,
            )
        )
    return rows


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines, a header first."""
    rows = [_HEADER, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if column in _RIGHT else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
