"""Figures, tables and the report, from tables small enough to check by eye."""

import json
import math
import re
import struct
from dataclasses import dataclass, replace
from html.parser import HTMLParser

import pandas as pd
import pytest

from autoq import tables
from autoq.errors import InputError
from autoq.figures import front_figure, heatmap, layer_place, relative_latency
from autoq.plan import Plan
from autoq.reporting import report_tables, write_files, write_report
from autoq.summary import family, family_schemes, summary_rows
from autoq.workload import LayerInfo, LinearCall, PhaseInfo, Workload

BUDGET = {"metric": "nll", "unit": "nats per token", "text": "perplexity at most 5 %", "max_increase": math.log(1.05)}
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
LAYERS = {"model.layers.0.self_attn.q_proj": "int8dq", "model.layers.0.mlp.up_proj": "int8wo", "lm_head": "int8wo"}
MIXED = {name: PHASE | {"loss_delta": math.log(change)} for name, change in (("prefill", 1.026), ("decode", 1.0004))}
PLAN = Plan(
    layers=LAYERS,
    phases={"prefill": 1.0, "decode": 128.0},
    provenance={"budget": BUDGET, "measured": MEASURED, "predicted": PREDICTED, "created": "2026-11-22T04:00:00+00:00"},
)


def front_row(label, source, delta, latency, *, timed=True, chosen=False, pareto=False, samples=32):
    return {
        "plan": f"{label or source}{delta}",
        "source": source,
        "label": label,
        "loss_delta": delta,
        "loss_low": delta - 0.002,
        "loss_high": delta + 0.002,
        "samples": samples,
        "latency_predicted_us": latency * 1100.0,
        "latency_measured_us": latency * 1000.0 if timed else None,
        "latency_low_us": latency * 990.0 if timed else None,
        "latency_high_us": latency * 1020.0 if timed else None,
        "weight_bytes": 1_000_000,
        "in_budget": delta < 0.05,
        "pareto": pareto,
        "chosen": chosen,
        "assignment": "{}",
    }


FRONT = tables.frame(
    [
        front_row("none", "uniform", 0.0, 1000.0, pareto=True),
        front_row("int8wo", "uniform", 0.001, 700.0, timed=False, pareto=True),
        front_row("fp6(format=e2m3)", "uniform", 2.5, 800.0),
        front_row("", "optuna", math.log(1.02), 500.0, chosen=True, pareto=True),
    ],
    tables.FRONT,
)


@dataclass
class Result:
    plan: Plan
    workload: Workload
    notes: tuple
    front: pd.DataFrame
    measurements: pd.DataFrame
    sensitivity: pd.DataFrame


@pytest.fixture
def result():
    layer = LayerInfo(name="fc", k=64, n=64, dtype="bfloat16", device="cpu", bias=False)
    workload = Workload(
        layers=(layer, replace(layer, name="odd", reason="its weight is read <directly>")),
        calls=(LinearCall(layer="fc", phase="decode", m=1, dtype="bfloat16", count=1),),
        phases=(PhaseInfo(name="decode", calls=128.0),),
    )
    measurements = [
        {"m": 1, "k": 64, "n": 64, "dtype": "bfloat16", "scheme": "int8wo", "status": "ok", "reason": ""},
        {"m": 1, "k": 63, "n": 64, "dtype": "bfloat16", "scheme": "fp6", "status": "unsupported", "reason": "K is odd"},
    ]
    scores = [
        {"layer": f"layers.{depth}.{kind}", "scheme": scheme, "score": score * (depth + 1)}
        for depth in range(3)
        for kind in ("q_proj", "up_proj")
        for scheme, score in (("int8wo", 1e-6), ("fp6(format=e2m3)", 1e-2))
    ]
    return Result(
        plan=PLAN,
        workload=workload,
        notes=("No phases were given <b>.",),
        front=FRONT,
        measurements=tables.frame(measurements, tables.MEASUREMENTS),
        sensitivity=tables.frame(scores, tables.SENSITIVITY),
    )


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", "attention"),
        ("transformer.h.0.attn.out_proj", "attention"),
        ("encoder.layer.2.attention.output.dense", "attention"),
        ("model.layers.3.mlp.down_proj", "mlp"),
        ("model.layers.0.mlp.experts.3.w2", "mlp"),
        ("encoder.layer.2.intermediate.dense", "mlp"),
        ("lm_head", "lm_head"),
        ("0", "other"),
    ],
)
def test_family_is_the_part_of_the_model(layer, expected):
    assert family(layer) == expected


def test_summary_states_before_after_and_change():
    rows = {row.quantity: row for row in summary_rows(PLAN)}
    perplexity = rows["perplexity [95 % interval]"]
    assert (perplexity.before, perplexity.after) == ("20.00", "20.40 [20.20, 20.60]")
    assert perplexity.change == "+2.00% [+1.00%, +3.00%]"
    decode = next(row for name, row in rows.items() if name.startswith("decode ×128"))
    assert (decode.before, decode.after) == ("10.00 [9.90, 10.50]", "5.00 [4.90, 5.30]")
    assert decode.change == "2.00 × as fast"
    assert rows["weights, MB (10⁶ bytes)"][1:] == ("250.0", "100.0", "-60.0%")
    assert rows["request, ms (1 prefill + 128 decode)"].change == "2.00 × as fast"
    assert rows["attention: 1 layer"].after == "int8dq ×1"


def test_summary_of_another_metric_is_in_its_unit():
    provenance = {"budget": {"metric": "kl", "unit": "nats"}, "measured": MEASURED | {"baseline_loss": 0.0}}
    row = summary_rows(replace(PLAN, provenance=provenance))[0]
    assert row.quantity == "kl (nats) [95 % interval]"
    assert row.change.startswith("+0.0198")


def test_summary_of_a_plan_written_by_hand_invents_nothing():
    rows = summary_rows(Plan(layers={"fc": "int8wo"}))
    assert {row.after for row in rows[:-1]} == {"not measured"}
    assert rows[-1].after == "int8wo ×1"


def test_family_schemes_counts_every_layer_once():
    counts = family_schemes(PLAN)
    assert sum(sum(one.values()) for one in counts.values()) == len(LAYERS)
    assert list(counts) == ["attention", "mlp", "lm_head"]


def test_relative_latency_prefers_measured_times_over_predictions():
    latency = relative_latency(FRONT)
    assert latency["latency"].tolist() == pytest.approx([1.0, 0.7, 0.8, 0.5])
    assert latency["timed"].tolist() == [True, False, True, True]
    assert latency["low"].tolist()[3] == pytest.approx(0.495)


def test_times_are_relative_to_the_unquantized_model_where_none_is_another_plan():
    front = pd.concat([FRONT, tables.frame([front_row("unquantized", "uniform", 0.0, 1250.0)], tables.FRONT)])
    assert relative_latency(front)["latency"].tolist() == pytest.approx([0.8, 0.56, 0.64, 0.4, 1.0])


def test_the_speed_up_over_unquantized_weights_in_the_same_kernels_is_shown_beside_that_over_stock():
    measured = MEASURED | {"none_latency_us": 1_050_000.0}
    rows = summary_rows(replace(PLAN, provenance={"measured": measured, "budget": BUDGET}))
    found = [(row.quantity, row.before, row.change) for row in rows if row.quantity.startswith("request")]
    assert found == [
        ("request, ms (1 prefill + 128 decode)", "1400.00", "2.00 × as fast"),
        ("request, ms, against unquantized weights in autoq's kernels", "1050.00", "1.50 × as fast"),
    ]


def test_relative_latency_needs_the_unquantized_plan():
    with pytest.raises(InputError, match="none"):
        relative_latency(FRONT[FRONT["label"] != "none"])


def test_front_figure_shows_percent_budget_and_names():
    axes = front_figure(FRONT, BUDGET).axes[0]
    assert "%" in axes.get_xlabel()
    assert "lower is faster" in axes.get_ylabel()
    assert any(line.get_xdata()[0] == pytest.approx(5.0) for line in axes.lines if line.get_label() == "budget")
    texts = [text.get_text().strip() for text in axes.texts]
    assert "int8wo" in texts
    assert any("fp6(format=e2m3) (+1118.25%)" in text for text in texts)  # beyond the axis, with its value
    assert axes.get_xlim()[1] < 20
    assert {"chosen", "budget", "Pareto front"} <= set(axes.get_legend_handles_labels()[1])


def test_front_figure_leaves_out_plans_judged_on_a_part_of_the_samples():
    partial = tables.frame([front_row("", "local", 0.03, 400.0, samples=8)], tables.FRONT)
    axes = front_figure(pd.concat([FRONT, partial], ignore_index=True), BUDGET).axes[0]
    assert "local" not in axes.get_legend_handles_labels()[1]


def test_front_figure_of_an_absolute_metric_has_its_unit():
    axes = front_figure(FRONT, {"metric": "kl", "unit": "nats", "max_increase": 0.01}).axes[0]
    assert axes.get_xlabel().endswith("(nats)")


def test_a_plan_that_breaks_the_model_is_drawn_at_the_edge():
    broken = tables.frame([front_row("sinq(bits=3,group_size=64)", "uniform", math.inf, 400.0)], tables.FRONT)
    axes = front_figure(pd.concat([FRONT, broken], ignore_index=True), BUDGET).axes[0]
    assert any("over +9900%" in text.get_text() for text in axes.texts)
    assert axes.get_xlim()[1] < 20


def test_summary_of_a_broken_model_does_not_overflow():
    measured = MEASURED | {"loss_delta": 900.0, "loss_low": 900.0, "loss_high": None}  # null: no finite number
    row = summary_rows(replace(PLAN, provenance={"budget": BUDGET, "measured": measured}))[0]
    assert row.after == "over 1e6 [over 1e6, over 1e6]"


def test_front_figure_without_a_measured_plan_is_refused():
    with pytest.raises(InputError, match="known"):
        front_figure(FRONT.assign(loss_delta=float("nan")), BUDGET)


def test_heatmap_has_a_panel_per_scheme(result):
    figure = heatmap(result.sensitivity, unit="nats per token")
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == ["int8wo", "fp6(format=e2m3)"]
    assert figure.axes[0].images[0].get_array().shape == (2, 3)
    assert figure.axes[-1].get_ylabel() == "estimated loss increase (nats per token)"


def test_heatmap_of_nothing_is_refused(result):
    with pytest.raises(InputError, match="empty"):
        heatmap(result.sensitivity.iloc[:0])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj", ("model.layers.*.mlp.up_proj", 3)),
        ("lm_head", ("lm_head", 0)),
        ("0", ("*", 0)),
        ("fc1", ("fc1", 0)),
    ],
)
def test_layer_place(name, place):
    assert layer_place(name) == place


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_one_file_that_needs_no_network(result, tmp_path):
    write_report(result, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert links.open == []
    assert links.found
    assert all(link.startswith("data:") for link in links.found)
    assert not re.search(r"https?://|<script", text)
    assert text.count("data:image/png;base64,") == 2


def test_report_shows_refusals_notes_and_provenance_escaped(result, tmp_path):
    write_report(result, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "its weight is read &lt;directly&gt;" in text
    assert "unsupported: K is odd" in text
    assert "No phases were given &lt;b&gt;." in text
    assert "2026-11-22T04:00:00+00:00" in text


def test_report_tables(result):
    made = {table.title: table for table in report_tables(result)}
    assert list(made) == ["Before and after", "Uniform plans", "Predicted and measured", "Refusals"]
    assert [row[0] for row in made["Uniform plans"].rows] == ["none", "int8wo", "fp6(format=e2m3)"]
    assert made["Uniform plans"].rows[1][2] == "0.700 (predicted)"
    assert made["Predicted and measured"].rows[0] == ["decode, ms a pass", "4.90", "5.00", "4.0%"]


def test_write_files_writes_all_four(result, tmp_path):
    files = write_files(result, tmp_path / "out")
    assert set(files) == {"plan.json", "front.parquet", "report.html", "front.png"}
    assert Plan.load(files["plan.json"]).hash == PLAN.hash
    assert tables.read(files["front.parquet"], tables.FRONT).num_rows == len(FRONT)
    head = (tmp_path / "out" / "front.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", head[16:24])) > 400
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["schema"] == 2


def test_unwritable_report_names_the_file(result, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"report\.html"):
        write_report(result, tmp_path / "file" / "report.html")


def test_the_loss_of_each_phase_is_shown_where_a_plan_has_mixes():
    assert not [row for row in summary_rows(PLAN) if "by phase" in row.quantity]
    measured = MEASURED | {"phases": MIXED}
    mixed = replace(PLAN, provenance=dict(PLAN.provenance) | {"measured": measured})
    (row,) = [row for row in summary_rows(mixed) if "by phase" in row.quantity]
    assert row.change == "prefill +2.60%, decode +0.04%"
    absolute = replace(mixed, provenance={"measured": measured, "budget": {"metric": "kl"}})
    (row,) = [row for row in summary_rows(absolute) if "by phase" in row.quantity]
    assert row.change == "prefill +0.0257, decode +0.0004"
