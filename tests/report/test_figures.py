"""Tables and figures, from numbers small enough to check by eye."""

import math
from dataclasses import replace

import pandas as pd
import pytest

from autoq import tables
from autoq.cost_figures import times_figure
from autoq.errors import InputError
from autoq.figures import front_figure, heatmap, layer_place, relative_latency
from autoq.plan import Plan
from autoq.summary import family, family_schemes, summary_rows


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


def test_summary_states_before_after_and_change(sample):
    rows = {row.quantity: row for row in summary_rows(sample.PLAN)}
    perplexity = rows["perplexity [95 % interval]"]
    assert (perplexity.before, perplexity.after) == ("20.00", "20.40 [20.20, 20.60]")
    assert perplexity.change == "+2.00% [+1.00%, +3.00%]"
    decode = next(row for name, row in rows.items() if name.startswith("decode ×128"))
    assert (decode.before, decode.after) == ("10.00 [9.90, 10.50]", "5.00 [4.90, 5.30]")
    assert decode.change == "2.00 × as fast"
    assert rows["weights, MB (10⁶ bytes)"][1:] == ("250.0", "100.0", "-60.0%")
    assert rows["request, ms (128 decode)"].change == "2.00 × as fast"
    assert rows["attention: 3 layers"].after == "int4wo-hqq(group_size=64) ×2, int8wo ×1"


def test_summary_of_another_metric_is_in_its_unit(sample):
    provenance = {"budget": {"metric": "kl", "unit": "nats"}, "measured": sample.MEASURED | {"baseline_loss": 0.0}}
    row = summary_rows(replace(sample.PLAN, provenance=provenance))[0]
    assert row.quantity == "kl (nats) [95 % interval]"
    assert row.change.startswith("+0.0198")


def test_summary_of_a_plan_written_by_hand_invents_nothing():
    rows = summary_rows(Plan(layers={"fc": "int8wo"}))
    assert {row.after for row in rows[:-1]} == {"not measured"}
    assert rows[-1].after == "int8wo ×1"


def test_family_schemes_counts_every_layer_once(sample):
    counts = family_schemes(sample.PLAN)
    assert sum(sum(one.values()) for one in counts.values()) == len(sample.LAYERS)
    assert list(counts) == ["attention", "mlp", "lm_head"]


def test_relative_latency_prefers_measured_times_over_predictions(sample):
    latency = relative_latency(sample.FRONT)
    assert latency["latency"].tolist() == pytest.approx([1.0, 0.7, 0.8, 0.5])
    assert latency["timed"].tolist() == [True, False, True, True]
    assert latency["low"].tolist()[3] == pytest.approx(0.495)


def test_times_are_relative_to_the_unquantized_model_where_none_is_another_plan(sample):
    front = pd.concat(
        [sample.FRONT, tables.frame([sample.front_row("unquantized", "uniform", 0.0, 1250.0)], tables.FRONT)]
    )
    assert relative_latency(front)["latency"].tolist() == pytest.approx([0.8, 0.56, 0.64, 0.4, 1.0])


def test_the_speed_up_over_unquantized_weights_in_the_same_kernels_is_shown_beside_that_over_stock(sample):
    measured = sample.MEASURED | {"none_latency_us": 1_050_000.0}
    rows = summary_rows(replace(sample.PLAN, provenance={"measured": measured, "budget": sample.BUDGET}))
    found = [(row.quantity, row.before, row.change) for row in rows if row.quantity.startswith("request")]
    assert found == [
        ("request, ms (128 decode)", "1400.00", "2.00 × as fast"),
        ("request, ms, against unquantized weights in autoq's kernels", "1050.00", "1.50 × as fast"),
    ]


def test_relative_latency_needs_the_unquantized_plan(sample):
    with pytest.raises(InputError, match="none"):
        relative_latency(sample.FRONT[sample.FRONT["label"] != "none"])


def test_front_figure_shows_percent_budget_and_names(sample):
    axes = front_figure(sample.FRONT, sample.BUDGET).axes[0]
    assert "%" in axes.get_xlabel()
    assert "lower is faster" in axes.get_ylabel()
    assert any(line.get_xdata()[0] == pytest.approx(5.0) for line in axes.lines if line.get_label() == "budget")
    texts = [text.get_text().strip() for text in axes.texts]
    assert "int8wo" in texts
    assert any("fp6(format=e2m3) (+1118.25%)" in text for text in texts)  # beyond the axis, with its value
    assert axes.get_xlim()[1] < 20
    assert {"chosen", "budget", "Pareto front"} <= set(axes.get_legend_handles_labels()[1])


def test_names_lie_beside_marks_and_clear_of_the_chosen_plans_ring(sample):
    near = sample.front_row(sample.FP6, "uniform", math.log(1.019), 510.0)
    rows = tables.frame([near], tables.FRONT)
    figure = front_figure(pd.concat([sample.FRONT[sample.FRONT["label"] != sample.FP6], rows]), sample.BUDGET)
    axes = figure.axes[0]
    figure.draw_without_rendering()
    (name,) = [text for text in axes.texts if text.get_text() == sample.FP6]
    box = name.get_window_extent()
    ring = axes.transData.transform((2.0, 0.5))
    outside = [max(box.x0 - ring[0], ring[0] - box.x1, 0.0), max(box.y0 - ring[1], ring[1] - box.y1, 0.0)]
    assert math.hypot(*outside) >= 9.0 * figure.dpi / 72
    assert axes.get_window_extent().contains(*box.min)
    assert axes.get_window_extent().contains(*box.max)


def test_front_figure_leaves_out_plans_judged_on_a_part_of_the_samples(sample):
    partial = tables.frame([sample.front_row("", "local", 0.03, 400.0, samples=8)], tables.FRONT)
    axes = front_figure(pd.concat([sample.FRONT, partial], ignore_index=True), sample.BUDGET).axes[0]
    assert "local" not in axes.get_legend_handles_labels()[1]


def test_front_figure_of_an_absolute_metric_has_its_unit(sample):
    axes = front_figure(sample.FRONT, {"metric": "kl", "unit": "nats", "max_increase": 0.01}).axes[0]
    assert axes.get_xlabel().endswith("(nats)")


def test_a_plan_that_breaks_the_model_is_drawn_at_the_edge(sample):
    broken = tables.frame([sample.front_row("sinq(bits=3,group_size=64)", "uniform", math.inf, 400.0)], tables.FRONT)
    axes = front_figure(pd.concat([sample.FRONT, broken], ignore_index=True), sample.BUDGET).axes[0]
    assert any("over +9900%" in text.get_text() for text in axes.texts)
    assert axes.get_xlim()[1] < 20


def test_summary_of_a_broken_model_does_not_overflow(sample):
    measured = sample.MEASURED | {"loss_delta": 900.0, "loss_low": 900.0, "loss_high": None}  # null: no finite number
    row = summary_rows(replace(sample.PLAN, provenance={"budget": sample.BUDGET, "measured": measured}))[0]
    assert row.after == "over 1e6 [over 1e6, over 1e6]"


def test_front_figure_without_a_measured_plan_is_refused(sample):
    with pytest.raises(InputError, match="known"):
        front_figure(sample.FRONT.assign(loss_delta=float("nan")), sample.BUDGET)


def test_heatmap_has_a_panel_per_scheme(sample):
    scores = tables.frame(
        [row for row in sample.sensitivity_rows() if row["layer"] in sample.BLOCKS and row["scheme"] != sample.INT4],
        tables.SENSITIVITY,
    )
    figure = heatmap(scores, unit="nats per token")
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == ["int8wo", "fp6(format=e2m3)"]
    assert figure.axes[0].images[0].get_array().shape == (2, 3)
    assert figure.axes[-1].get_ylabel() == "estimated loss increase (nats per token)"


def test_heatmap_of_nothing_is_refused():
    with pytest.raises(InputError, match="empty"):
        heatmap(tables.frame([], tables.SENSITIVITY))


def test_times_are_a_ratio_per_kind_and_scheme(sample):
    q0 = sample.LAYERS[0]
    costs = tables.frame(sample.cost_rows(refused={(q0, "int8wo"), ("lm_head", sample.FP6)}), tables.COSTS)
    axes, colours = times_figure(costs).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["self_attn.q_proj", "mlp.up_proj", "lm_head"]
    numbers = [text.get_text() for text in axes.texts]
    assert numbers == ["0.60", "0.40", "0.50", "0.60", "0.40", "0.50", "0.60", "0.40", "×"]
    assert colours.get_ylabel() == "time of a request / unquantized"
    with pytest.raises(InputError, match="timed unquantized"):
        times_figure(costs[costs["scheme"] != "none"])


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


def test_the_loss_of_each_phase_is_shown_where_a_plan_has_mixes(sample):
    assert not [row for row in summary_rows(sample.PLAN) if "by phase" in row.quantity]
    mixes = {"prefill": math.log(1.026), "decode": math.log(1.0004)}
    phases = {name: sample.PHASE | {"loss_delta": loss} for name, loss in mixes.items()}
    measured = sample.MEASURED | {"phases": phases}
    mixed = replace(sample.PLAN, provenance=dict(sample.PLAN.provenance) | {"measured": measured})
    (row,) = [row for row in summary_rows(mixed) if "by phase" in row.quantity]
    assert row.change == "decode +0.04%, prefill +2.60%"
    absolute = replace(mixed, provenance={"measured": measured, "budget": {"metric": "kl"}})
    (row,) = [row for row in summary_rows(absolute) if "by phase" in row.quantity]
    assert row.change == "decode +0.0004, prefill +0.0257"
