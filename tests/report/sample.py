"""A small tuning made by hand: three blocks, a head, four schemes. Every number in it is easy to check."""

import json
import math
from dataclasses import dataclass

import pandas as pd

from autoq import tables
from autoq.plan import Plan
from autoq.workload import LayerInfo, LinearCall, PhaseInfo, Workload

FP6 = "fp6(format=e2m3)"
INT4 = "int4wo-hqq(group_size=64)"
SCHEMES = ("none", "int8wo", INT4, FP6)
BLOCKS = [f"model.layers.{i}.{kind}" for i in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")]
LAYERS = [*BLOCKS, "lm_head"]
ODD = "vision.<script>alert(1)</script>"
LIMIT = math.log(1.05)
BUDGET = {
    "metric": "nll",
    "unit": "nats per token",
    "text": "perplexity at most 5 %",
    "max_increase": LIMIT,
    "objective": "latency",
}
PHASE = {
    "time_us": 5000.0,
    "low_us": 4900.0,
    "high_us": 5300.0,
    "baseline_us": 10000.0,
    "baseline_low_us": 9900.0,
    "baseline_high_us": 10500.0,
    "calls": 128.0,
    "compiled": "whole",
}
MEASURED = {
    "loss_delta": math.log(1.02),
    "loss_low": math.log(1.01),
    "loss_high": math.log(1.03),
    "samples": 32,
    "baseline_loss": math.log(20.0),
    "latency_us": 700_000.0,
    "baseline_latency_us": 1_400_000.0,
    "phases": {"decode": PHASE},
    "weight_bytes": 100_000_000,
    "baseline_weight_bytes": 250_000_000,
}
PREDICTED = {
    "loss_delta": 0.018,
    "latency_us": 690_000.0,
    "phases": {"decode": 4900.0},
    "latency_error": {"decode": 0.04},
}
# Of a layer: microseconds of a request, loss, bytes. The head is ten times a block's layer.
COST = {
    "none": (1000.0, 0.0, 8192),
    "int8wo": (600.0, 0.0001, 4352),
    INT4: (400.0, 0.004, 2304),
    FP6: (500.0, 0.001, 3328),
}
CHOSEN = dict.fromkeys(BLOCKS, INT4) | {BLOCKS[0]: "int8wo", "lm_head": "int8wo"}


def front_row(label, source, delta, latency, *, timed=True, chosen=False, pareto=False, samples=32):
    return {
        "plan": f"{label or source}{delta}",
        "source": source,
        "label": label,
        "loss_predicted": 1.1 * delta,
        "loss_delta": delta,
        "loss_low": delta - 0.002,
        "loss_high": delta + 0.002,
        "samples": samples,
        "latency_predicted_us": latency * (1000.0 if chosen else 1100.0),
        "latency_measured_us": latency * 1000.0 if timed else None,
        "latency_low_us": latency * 990.0 if timed else None,
        "latency_high_us": latency * 1020.0 if timed else None,
        "weight_bytes": 1_000_000,
        "in_budget": delta < 0.05,
        "pareto": pareto,
        "chosen": chosen,
        "assignment": json.dumps(CHOSEN if chosen else {}),
    }


FRONT = tables.frame(
    [
        front_row("none", "uniform", 0.0, 1000.0, pareto=True),
        front_row("int8wo", "uniform", 0.001, 700.0, timed=False, pareto=True),
        front_row(FP6, "uniform", 2.5, 800.0),
        front_row("", "optuna", math.log(1.02), 500.0, chosen=True, pareto=True),
    ],
    tables.FRONT,
)


def cost_rows(unit_of=lambda layer: layer, refused=()):
    """Rows of the costs' table: losses have intervals of half to double, and the head's int8wo was measured."""
    rows = []
    for layer in LAYERS:
        scale = 10 if layer == "lm_head" else 1
        for scheme, (time_us, loss, size) in COST.items():
            row = {"layer": layer, "unit": unit_of(layer), "scheme": scheme, "reason": ""}
            if (layer, scheme) in refused:
                rows.append(row | {"reason": "unsupported: K is odd"})
                continue
            rows.append(
                row
                | {"time_us": scale * time_us, "phases_us": json.dumps({"decode": scale * time_us / 128})}
                | {"loss": scale * loss, "loss_low": scale * loss / 2, "loss_high": scale * loss * 2}
                | {"measured": layer == "lm_head" and scheme == "int8wo", "weight_bytes": scale * size}
            )
    return rows


def sensitivity_rows():
    rows = [
        {"layer": layer, "scheme": scheme, "score": COST[scheme][1], "measured": None}
        for layer in LAYERS
        for scheme in SCHEMES[1:]
    ]
    for index, row in enumerate(rows[:3]):
        row |= {"measured": row["score"] * (1 + index), "measured_low": row["score"], "measured_high": row["score"] * 4}
    return rows


def workload():
    odd = LayerInfo(name=ODD, k=64, n=64, dtype="bfloat16", device="cpu", bias=False, reason="it is read <directly>")
    infos = [
        LayerInfo(name=name, k=64, n=64, dtype="bfloat16", device="cpu", bias=False)
        if name != "lm_head"
        else LayerInfo(name=name, k=64, n=640, dtype="bfloat16", device="cpu", bias=False, tied_to="embedding.weight")
        for name in LAYERS
    ]
    return Workload(
        layers=(*infos, odd),
        calls=tuple(LinearCall(layer=name, phase="decode", m=1, dtype="bfloat16", count=1) for name in LAYERS),
        phases=(PhaseInfo(name="decode", calls=128.0),),
    )


PLAN = Plan(
    layers=CHOSEN,
    phases={"decode": 128.0},
    provenance={
        "budget": BUDGET,
        "measured": MEASURED,
        "predicted": PREDICTED,
        "created": "2026-11-22T04:00:00+00:00",
        "study": "autoq-1",
        "device": {"name": "a CPU", "threads": 2},
        "model": {"left_alone": {"experts (3-D parameters)": {"weights": 2, "bytes": 125_000_000, "share": 0.5}}},
        "notes": ["No phases were given <b>."],
    },
)
MEASUREMENTS = [
    {"m": 1, "k": 64, "n": 64, "dtype": "bfloat16", "scheme": "int8wo", "status": "ok", "reason": ""},
    {"m": 1, "k": 63, "n": 64, "dtype": "bfloat16", "scheme": FP6, "status": "unsupported", "reason": "K is odd"},
]


@dataclass
class Result:
    """What ``tune`` returns, as far as reports and explanations read it."""

    plan: Plan
    workload: Workload
    notes: tuple
    front: pd.DataFrame
    costs: pd.DataFrame
    measurements: pd.DataFrame
    sensitivity: pd.DataFrame


def result(plan=PLAN, **changes):
    return Result(
        plan=plan,
        workload=workload(),
        notes=("No phases were given <b>.",),
        front=FRONT,
        costs=tables.frame(changes.get("costs", cost_rows()), tables.COSTS),
        measurements=tables.frame(MEASUREMENTS, tables.MEASUREMENTS),
        sensitivity=tables.frame(sensitivity_rows(), tables.SENSITIVITY),
    )
