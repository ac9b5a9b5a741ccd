"""The figures as tables, each beside what was aimed at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

# key → (what it is, how it is printed, target, whether less is better)
TARGETS: dict[str, tuple[str, str, float, bool]] = {
    "regret": ("largest regret against all plans", "{:.2%}", 0.02, True),
    "hypervolume_ratio": ("gain over the uniform front, of the reference's", "{:.3f}", 0.90, False),
    "evaluations": ("evaluations of 4,096 tokens", "{:d}", 49, True),
    "nsga2_ratio": ("the same gain over NSGA-II's with 40", "{:.2f}", 1.5, False),
    "tpe_ratio": ("and over TPE's with 40", "{:.2f}", 1.5, False),
    "nsga2_long_ratio": ("over NSGA-II's with 100", "{:.2f}", 1.0, False),
    "tpe_long_ratio": ("over TPE's with 100", "{:.2f}", 1.0, False),
    "spearman": ("rank correlation, random mixed plans", "{:.3f}", 0.95, False),
    "latency_error_median": ("median error of modelled latency", "{:.2%}", 0.05, True),
    "cold_s": ("seconds of tuning, nothing cached", "{:.0f}", 900, True),
    "warm_s": ("for another budget, with what that measured, without compiling", "{:.0f}", 60, True),
    "knapsack_s": ("slowest knapsack of 224 × 12", "{:.2f}", 2.0, True),
}


def figures(data: Mapping[str, Any]) -> str:
    """One line per figure that was measured: its value, its target, met or missed."""
    lines = []
    for key, (what, form, target, less) in TARGETS.items():
        if key not in data:
            continue
        value = data[key]
        if value is None:
            lines.append(f"{key:22} {what:52} {'theirs: 0':>10}   met")
            continue
        if isinstance(value, float) and not math.isfinite(value):
            lines.append(f"{key:22} {what:52} {value}")
            continue
        met = value <= target if less else value >= target
        sign = "≤" if less else "≥"
        aim = f"{sign} {form.format(type(value)(target))}"
        verdict = "met" if met else "MISSED"
        lines.append(f"{key:22} {what:52} {form.format(value):>10}   {aim}  {verdict}")
    return "\n".join(lines)


def tables(data: Mapping[str, Any]) -> str:
    """The details of every part that was measured."""
    parts = []
    for name in ("regret_block", "regret_small"):
        if name in data:
            parts.append(_regret(name, data[name]))
    if "front" in data:
        parts.append(_front(data["front"]))
    if "spearman_details" in data:
        parts.append(_spearman(data["spearman_details"]))
    if "latency_details" in data:
        found = data["latency_details"]
        rows = [f"  {p:10} median {found['median_by_phase'][p]:7.2%}  largest {found['largest_by_phase'][p]:7.2%}"
                for p in found["median_by_phase"]]  # fmt: skip
        parts.append("\n".join(["latency of random mixed plans over none's, error of the model:", *rows]))
    for name in ("cold", "warm"):
        if name in data:
            stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in data[name]["stages"].items())
            parts.append(f"{name}: {data[name]['seconds']:.0f} s in all; by stage: {stages}")
    if "knapsack" in data:
        rows = [f"  {name:12} {row['seconds']:6.2f} s, gap {row['gap']:.4%}" for name, row in data["knapsack"].items()]
        parts.append("\n".join(["knapsack, 224 units × 12 options, the slowest:", *rows]))
    return "\n\n".join(parts)


def _regret(name: str, rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [f"{name}:  {'limit':>10} {'best, µs':>12} {'found, µs':>12} {'regret':>8}  measured"]
    for row in rows:
        lines.append(
            f"{'':15}{row['max_loss']:>10.5f} {row['best_us']:>12.1f} {row['found_us']:>12.1f} {row['regret']:>8.2%}  "
            f"{row['evaluations']} of {row['plans']}"
        )
    return "\n".join(lines)


def _front(found: Mapping[str, Any]) -> str:
    lines = [f"{'front':28} {'plans':>6} {'area':>8} {'gain over uniform':>18}"]
    for row in found["rows"]:
        lines.append(f"{row['name']:28} {row['plans']:>6} {row['hypervolume']:>8.4f} {row['gain']:>18.5f}")
    spent = ", ".join(f"{name} {tokens}" for name, tokens in found["tokens"].items())
    lines.append(f"tokens of ours: {spent}")
    return "\n".join(lines)


def _spearman(found: Mapping[str, Any]) -> str:
    lines = [
        f"{found['plans']} random mixed plans, {found['small_plans']} of them lose ≤ 0.10:",
        f"  {'predicted by':24} {'all':>6} {'≤ 0.10':>7}  predicted / measured, median",
    ]
    for name, row in found["models"].items():
        lines.append(f"  {name:24} {row['spearman']:6.3f} {row['spearman_small']:7.3f}  {row['ratio_median']:.2f}")
    return "\n".join(lines)
