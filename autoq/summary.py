"""A plan as a table for people: accuracy, times and bytes before and after, and schemes by part of the model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from autoq.plan import Plan

UNKNOWN = "not measured"
_BROKEN = math.log(100)  # nats above the unquantized model
_HOPELESS = math.log(1e6)  # nats
FAMILIES = ("attention", "mlp", "lm_head", "other")
_HEADS = {"lm_head", "embed_out", "classifier", "score", "output_projection"}
_ATTENTION = {"attn", "attention", "self_attn", "self_attention", "cross_attn", "mixer"}
_MLP = {"mlp", "ffn", "feed_forward", "feedforward", "experts", "intermediate", "fc1", "fc2", "moe", "block_sparse_moe"}
_ATTENTION_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "qkv", "qkv_proj", "query", "key", "value", "out_proj"}
_MLP_LAYERS = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc", "w1", "w2", "w3"}
_END_BLOCKS = 2  # this many first and last blocks are families of their own
_BLOCK = re.compile(r"\.(\d+)\.")  # a block's number in a layer's name


class SummaryRow(NamedTuple):
    """One line of a plan's table, ready to print.

    Attributes:
        quantity: what is compared, with its unit or layer count.
        before: the unquantized model.
        after: the plan.
        change: the ratio or difference, or empty.
    """

    quantity: str
    before: str
    after: str
    change: str


def family(layer: str) -> str:
    """The part of a model a layer belongs to, by its name: attention, mlp, lm_head or other."""
    parts = layer.split(".")
    if parts[-1] in _HEADS:
        return "lm_head"
    if parts[-1] in _ATTENTION_LAYERS or (_ATTENTION.intersection(parts) and parts[-1] not in _MLP_LAYERS):
        return "attention"
    return "mlp" if parts[-1] in _MLP_LAYERS or _MLP.intersection(parts) else "other"


def family_schemes(plan: Plan) -> dict[str, Counter[str]]:
    """Family → how many of its layers got each scheme."""
    found: dict[str, Counter[str]] = {}
    for name in FAMILIES:
        schemes = Counter(str(scheme) for layer, scheme in plan.layers.items() if family(layer) == name)
        if schemes:
            found[name] = schemes
    return found


def summary_rows(plan: Plan) -> list[SummaryRow]:
    """The table of a plan: accuracy, time per phase and per request, bytes, and schemes by family.

    Figures that were not measured (a plan written by hand, edited or retargeted) say so.
    """
    measured = plan.provenance.get("measured") or {}
    budget = plan.provenance.get("budget") or {}
    rows = [loss_row(measured, budget), *phase_loss_rows(measured, budget)]
    # In the order of a plan file, so that a table does not change when the plan was saved in between.
    rows += [_phase_row(name, phase) for name, phase in sorted((measured.get("phases") or {}).items())]
    rows.append(_request_row(plan, measured))
    if measured.get("none_latency_us") is not None:
        before, after = measured["none_latency_us"], measured.get("latency_us")
        name = "request, ms, against unquantized weights in autoq's kernels"
        rows.append(SummaryRow(name, interval(before), interval(after), speedup(before, after)))
    rows.append(_bytes_row(measured))
    for name, schemes in family_schemes(plan).items():
        count = sum(schemes.values())
        text = ", ".join(f"{scheme} ×{number}" for scheme, number in schemes.most_common())
        rows.append(SummaryRow(f"{name}: {count} layer{'s' if count > 1 else ''}", "none", text, ""))
    return rows


def loss_row(measured: Mapping[str, Any], budget: Mapping[str, Any]) -> SummaryRow:
    """The row of a plan's loss, from ``provenance["measured"]`` and ``provenance["budget"]``."""
    metric = budget.get("metric", "loss")
    base, delta = measured.get("baseline_loss"), _loss(measured, "loss_delta", None)
    name = "perplexity" if metric == "nll" else f"{metric} ({budget['unit']})" if budget.get("unit") else str(metric)
    if base is None or delta is None:
        known = UNKNOWN if base is None else _perplexity(base) if metric == "nll" else f"{base:.4g}"
        return SummaryRow(name, known, UNKNOWN, "")
    low, high = (_loss(measured, name, delta) for name in ("loss_low", "loss_high"))
    if metric == "nll":
        after = f"{_perplexity(base + delta)} [{_perplexity(base + low)}, {_perplexity(base + high)}]"
        change = f"{perplexity_change(delta)} [{perplexity_change(low)}, {perplexity_change(high)}]"
        return SummaryRow(f"{name} [95 % interval]", _perplexity(base), after, change)
    after = f"{base + delta:.4g} [{base + low:.4g}, {base + high:.4g}]"
    return SummaryRow(f"{name} [95 % interval]", f"{base:.4g}", after, f"{delta:+.3g} [{low:+.3g}, {high:+.3g}]")


def phase_loss_rows(measured: Mapping[str, Any], budget: Mapping[str, Any]) -> list[SummaryRow]:
    """A row with the loss of each phase's arithmetic, where a plan has schemes that switch with the rows; else none."""
    changes = {
        name: perplexity_change(delta) if budget.get("metric") == "nll" else f"{delta:+.3g}"
        for name, phase in sorted((measured.get("phases") or {}).items())
        if (delta := _loss(phase, "loss_delta", None)) is not None
    }
    if not changes:
        return []
    text = ", ".join(f"{name} {change}" for name, change in changes.items())
    return [SummaryRow("loss by phase; the largest counts", "", "", text)]


def _loss(measured: Mapping[str, Any], name: str, missing: float | None) -> Any:
    """A figure of loss; infinite where a plan has null, which stands for what is no finite number."""
    found = measured.get(name, missing)
    return math.inf if found is None and name in measured else found


def perplexity_change(increase: float) -> str:
    """An increase of the mean NLL, in nats, as a change of perplexity; cut off where the model is broken."""
    return f"{math.expm1(increase):+.2%}" if increase < _BROKEN else "over +9900%"


def _perplexity(nll: float) -> str:
    return f"{math.exp(nll):.2f}" if nll < _HOPELESS else "over 1e6"


def _phase_row(name: str, phase: Mapping[str, Any]) -> SummaryRow:
    calls = f" ×{phase['calls']:g}" if "calls" in phase else ""
    compiled = phase.get("compiled")
    how = f"compiled, {compiled}" if compiled else "end to end"
    before = interval(phase.get("baseline_us"), phase.get("baseline_low_us"), phase.get("baseline_high_us"))
    after = interval(phase.get("time_us"), phase.get("low_us"), phase.get("high_us"))
    change = speedup(phase.get("baseline_us"), phase.get("time_us"))
    return SummaryRow(f"{name}{calls}, ms a pass ({how}) [10–90 %]", before, after, change)


def interval(middle: float | None, low: float | None = None, high: float | None = None) -> str:
    """Microseconds as milliseconds with their spread, or that they were not measured."""
    if middle is None:
        return UNKNOWN
    spread = "" if low is None or high is None else f" [{low / 1e3:.2f}, {high / 1e3:.2f}]"
    return f"{middle / 1e3:.2f}{spread}"


def speedup(before: float | None, after: float | None) -> str:
    """How many times as fast, or nothing where a time is unknown."""
    return f"{before / after:.2f} × as fast" if before and after else ""


def _request_row(plan: Plan, measured: Mapping[str, Any]) -> SummaryRow:
    before, after = measured.get("baseline_latency_us"), measured.get("latency_us")
    calls = " + ".join(f"{count:g} {name}" for name, count in sorted(plan.phases.items()))
    name = f"request, ms ({calls})" if calls else "request, ms"
    return SummaryRow(name, interval(before), interval(after), speedup(before, after))


def _bytes_row(measured: Mapping[str, Any]) -> SummaryRow:
    before, after = measured.get("baseline_weight_bytes"), measured.get("weight_bytes")
    change = f"{after / before - 1:+.1%}" if before and after is not None else ""
    return SummaryRow("weights, MB (10⁶ bytes)", _megabytes(before), _megabytes(after), change)


def _megabytes(size: int | None) -> str:
    return UNKNOWN if size is None else f"{size / 1e6:.1f}"


def loss_family(layer: str, layers: Sequence[str]) -> str:
    """The family a layer's predicted loss is corrected with: its role, or that it is near an end of the model."""
    numbers = sorted({int(found[1]) for one in layers if (found := _BLOCK.search(one))})
    mine = _BLOCK.search(layer)
    if mine is not None and len(numbers) > 2 * _END_BLOCKS:
        if int(mine[1]) in numbers[:_END_BLOCKS]:
            return "first blocks"
        if int(mine[1]) in numbers[-_END_BLOCKS:]:
            return "last blocks"
    return family(layer)
