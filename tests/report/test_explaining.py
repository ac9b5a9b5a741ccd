"""What a changed plan is said to cost, to the digit, from a table small enough to check by eye."""

import json
import math
import re
import shutil

import pytest

import autoq
from autoq import tables
from autoq.errors import InputError
from autoq.explaining import explain, load
from autoq.explaining_text import duration, sentence, weight
from autoq.plan import Plan
from autoq.pricing import Request

Q0, UP0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def found(sample):
    return explain(sample.result())


def other(choice, scheme):
    return next(one for one in choice.alternatives if one.scheme == scheme)


def test_every_layer_has_its_choice_and_every_other_scheme(found, sample):
    assert [one.unit for one in found.choices] == sample.LAYERS
    for one in found.choices:
        assert one.scheme == sample.CHOSEN[one.unit]
        assert {one.scheme, *(a.scheme for a in one.alternatives)} == set(sample.SCHEMES)
    head = found.choice("lm_head")
    assert (head.family, head.time_us, head.weight_bytes, head.measured) == ("lm_head", 6000.0, 43520, True)
    assert (head.loss_low, head.loss, head.loss_high) == pytest.approx((0.0005, 0.001, 0.002))


def test_an_alternative_is_the_difference_from_the_plan(found, sample):
    change = other(found.choice(Q0), sample.INT4).change
    assert change.layers == {Q0: sample.INT4}
    assert (change.time_us, change.weight_bytes) == (-200.0, 2304 - 4352)
    assert change.loss == pytest.approx(0.0039)
    # Differences of independent estimates: the half-widths add as squares.
    assert change.loss_low == pytest.approx(0.0039 - math.hypot(0.002, 0.0001))
    assert change.loss_high == pytest.approx(0.0039 + math.hypot(0.004, 0.00005))
    assert not change.measured


def test_the_budget_is_held_against_the_measured_upper_bound(found, sample):
    """The plan's is 1.03; int4 on the whole head adds 0.039 nats, and on a layer 0.0039: 5 % is 0.0488."""
    small, large = other(found.choice(Q0), sample.INT4), other(found.choice("lm_head"), sample.INT4)
    assert (small.verdict, small.change.over) == ("promising", "")
    assert large.verdict == "over budget"
    assert large.change.over == "0.06856 nats per token, limit 0.04879"


def test_slower_schemes_buy_accuracy_or_gain_nothing(found, sample):
    assert other(found.choice(UP0), "int8wo").verdict == "buys accuracy"
    assert other(found.choice(Q0), "none").verdict == "buys accuracy"
    assert other(found.choice("lm_head"), "none").change.measured


def test_forcing_layers_sums_their_changes(found, sample):
    one, two, both = found.force({Q0: "none"}), found.force({UP0: "none"}), found.force({Q0: "none", UP0: "none"})
    assert (one.time_us, two.time_us, both.time_us) == (400.0, 600.0, 1000.0)
    assert both.loss == pytest.approx(one.loss + two.loss)
    assert both.weight_bytes == one.weight_bytes + two.weight_bytes
    assert found.force({Q0: "int8wo"}).layers == {}
    assert found.force({Q0: "fp6"}).layers == {Q0: sample.FP6}  # one candidate has the name


def test_the_sentence_names_what_is_saved_and_what_it_costs(found, sample):
    assert sentence(found.force({Q0: sample.FP6}), found.pricing) == (
        f"Forcing {Q0} from int8wo to fp6(format=e2m3) saves 100 µs a request and 1.02 kB"
        " and costs 0.0009 nats per token [0.00039, 0.0019]."
    )
    assert sentence(found.force({"lm_head": sample.INT4}), found.pricing).endswith(
        "costs 0.039 nats per token [0.019, 0.079]; then over a limit: 0.06856 nats per token, limit 0.04879."
    )


def test_the_text_has_families_changes_and_what_was_left_alone(found):
    text = str(found)
    assert "attention, 3 layers: int4wo-hqq(group_size=64) ×2, int8wo ×1. On all of them:" in text
    assert text.count("Forcing ") == 2 + 5  # only the head and one layer have a faster scheme left
    assert "Left alone: 1" in text
    assert "it is read <directly>" in text
    assert "  experts (3-D parameters): 125 MB in 2, 50.0% of the model's bytes" in text
    assert found.to_json()["other_weights"]["experts (3-D parameters)"]["share"] == 0.5
    alone = found.text("lm_head")
    assert (
        "takes 6 ms of a request and 43.5 kB; costs +0.001 [+0.0005, +0.002] nats per token (measured alone)" in alone
    )


def test_counterfactuals_gain_time_first_then_accuracy_one_per_unit(found):
    changes = found.counterfactuals(count=2)
    assert [one.time_us < 0 for one in changes] == [True, True, False, False]
    assert [one.loss > 0 for one in changes] == [True, True, False, False]
    assert len({tuple(one.layers) for one in changes[:2]}) == 2
    rates = [one.loss / -one.time_us for one in changes[:2]]
    assert rates == sorted(rates)


def test_a_family_is_moved_as_a_whole(found, sample):
    attention = found.families[0]
    assert (attention.name, attention.layers, attention.schemes) == ("attention", 3, {sample.INT4: 2, "int8wo": 1})
    to_none = other(attention, "none").change
    assert to_none.time_us == 400.0 + 2 * 600.0
    assert len(to_none.layers) == 3


def test_refused_schemes_say_why(sample):
    found = explain(sample.result(costs=sample.cost_rows(refused={(Q0, sample.FP6)})))
    refused = other(found.choice(Q0), sample.FP6)
    assert (refused.verdict, refused.refused, refused.change) == ("refused", "unsupported: K is odd", None)
    assert other(found.families[0], sample.FP6).refused == "by 1 layers"
    with pytest.raises(InputError, match="K is odd") as problem:
        found.force({Q0: sample.FP6})
    assert problem.value.where == Q0
    row = found.table[found.table["refused"] != ""].iloc[0]
    assert (row["unit"], row["scheme"], math.isnan(row["time_us"])) == (Q0, sample.FP6, True)


def test_layers_decided_together_move_together(sample):
    rows = sample.cost_rows(unit_of=lambda layer: "qs" if layer.endswith("q_proj") else layer)
    plan = Plan(layers=sample.CHOSEN | {Q0: sample.INT4}, provenance=sample.PLAN.provenance)
    found = explain(sample.result(plan, costs=rows))
    one = found.choice(Q1)
    assert one.unit == "qs"
    assert one.layers == tuple(layer for layer in sample.LAYERS if layer.endswith("q_proj"))
    change = found.force({Q1: "int8wo"})
    assert change.layers == dict.fromkeys(one.layers, "int8wo")
    assert change.time_us == 600.0
    with pytest.raises(InputError, match="one scheme"):
        found.force({Q0: "int8wo", Q1: "none"})
    # A plan edited by hand may tear them apart: then each is explained alone.
    assert explain(sample.result(sample.PLAN, costs=rows)).choice(Q1).layers == (Q1,)


def test_squares_add_up_for_a_relative_rms(sample):
    provenance = {
        "budget": {"metric": "relative_rms", "unit": "", "max_increase": 0.05},
        "measured": {"loss_delta": 0.03},
    }
    found = explain(sample.result(Plan(layers=sample.CHOSEN, provenance=provenance)))
    change = found.force({Q0: sample.INT4})
    assert change.loss == pytest.approx(math.sqrt(0.03**2 + 0.0039) - 0.03)
    assert change.over.startswith(f"{math.sqrt(0.03**2 + 0.0039):.4g}")


def test_limits_on_time_and_bytes_count_too(sample):
    budget = sample.BUDGET | {"objective": "memory", "max_latency_us": 700_100.0, "max_weight_bytes": 100_000_000}
    found = explain(
        sample.result(Plan(layers=sample.CHOSEN, provenance={"budget": budget, "measured": sample.MEASURED}))
    )
    assert (
        found.force({Q0: "none"}).over
        == "700,400 µs a request, limit 700,100; 100,003,840 bytes of weights, limit 100,000,000"
    )
    assert other(found.choice(Q0), sample.INT4).verdict == "promising"
    assert all(one.weight_bytes < 0 for one in found.counterfactuals(1)[:1])


def test_a_plan_without_figures_is_priced_by_its_costs(sample):
    found = explain(sample.result(), plan=sample.PLAN.replace({Q0: "none"}))
    assert not found.pricing.measured
    assert found.pricing.loss == pytest.approx(5 * 0.004 + 0.001)
    assert found.pricing.time_us == 500_000.0 + 400.0  # the front's figure for the chosen plan, and the change
    assert found.pricing.weight_bytes == 1_000_000 + 8192 - 4352
    assert "A request takes 500 ms" in str(found)
    assert "(predicted)" in str(found)


def test_times_are_in_proportion_to_the_measured_request(sample):
    """Layers were timed when the machine took twice as long as it took for the plan."""
    made = sample.result()
    slow = made.front["latency_predicted_us"].where(~made.front["chosen"], 1e6)
    made.front = made.front.assign(latency_predicted_us=slow)
    found = explain(made)
    assert found.force({Q0: "none"}).time_us == 200.0
    assert found.choice("lm_head").time_us == 3000.0
    assert found.pricing.time_us == 700_000.0  # measured, of the plan itself
    edited = explain(made, plan=sample.PLAN.replace({Q0: "none"}))
    assert edited.pricing.time_us == 500_000.0 + 200.0
    assert found.to_json()["base"]["drift"] == 0.5


def test_without_a_timed_plan_the_layers_alone_are_told(sample):
    made = sample.result(sample.PLAN.replace({Q0: "none"}))
    made.front = made.front[~made.front["chosen"]]
    found = explain(made)
    assert found.pricing.time_us == 1000.0 + 5 * 400.0 + 6000.0
    assert "Of a request its layers take 9 ms" in str(found)


def test_a_request_that_is_left_unquantized_is_priced_by_none(sample):
    """The unquantized model's own row has no costs: those of none are of autoq's kernels."""
    made = sample.result(Plan(layers={}, provenance={"budget": sample.BUDGET}))
    stock = sample.front_row("unquantized", "uniform", 0.0, 3000.0, chosen=True) | {"assignment": "{}"}
    rows = [sample.front_row("none", "uniform", 0.0, 1000.0), stock]
    made.front = tables.frame(rows, tables.FRONT)
    assert explain(made).pricing.request == Request(1.0, 1_100_000.0 - 16_000.0, 1_000_000 - 16 * 8192)


def test_an_empty_plan_is_none_on_every_layer(sample):
    found = explain(sample.result(Plan(layers={}, provenance={"budget": sample.BUDGET})))
    assert {one.scheme for one in found.choices} == {"none"}
    assert found.force({Q0: "int8wo"}).time_us == -400.0


@pytest.mark.parametrize(
    ("plan", "where", "message"),
    [
        ({"elsewhere": "int8wo"}, "", "layers are those of the tuning"),
        ({Q0: "sinq(bits=4,group_size=64)"}, Q0, "not among its candidates"),
    ],
)
def test_plans_of_something_else_are_refused(sample, plan, where, message):
    with pytest.raises(InputError, match=message) as problem:
        explain(sample.result(), plan=Plan(layers=plan))
    assert problem.value.where == where


def test_layers_that_were_not_decided_are_refused(found, sample):
    with pytest.raises(InputError, match="left alone: it is read"):
        found.choice(sample.ODD)
    with pytest.raises(InputError, match="none of the 7 has") as problem:
        found.force({"elsewhere": "int8wo"})
    assert problem.value.fix.endswith(" or another.")
    with pytest.raises(InputError, match=r"Say model\.layers\.0\.mlp\.up_proj,"):
        found.choice("model.layers.0.mlp.up_prj")
    with pytest.raises(InputError, match=f"Say none or int8wo or {re.escape(sample.INT4)} or ") as problem:
        found.force({Q0: "int9"})
    assert problem.value.got == "int9: it was not among the candidates"


def test_without_costs_there_is_no_explanation(sample):
    with pytest.raises(InputError, match="empty table"):
        explain(sample.result(costs=[]))


def test_the_folder_explains_itself(found, written):
    again = load(written)
    assert json.dumps(again.to_json(), sort_keys=True) == json.dumps(found.to_json(), sort_keys=True)
    assert str(again) == str(autoq.explain(str(written)))
    assert json.loads(json.dumps(again.to_json(), allow_nan=False))["choices"][0]["scheme"] == "int8wo"


def test_an_edited_plan_in_the_folder_is_explained(sample, written, tmp_path):
    shutil.copytree(written, tmp_path / "out")
    Plan.load(written / "plan.json").replace({Q0: "none"}).save(tmp_path / "out" / "plan.json")
    assert load(tmp_path / "out").choice(Q0).scheme == "none"


@pytest.mark.parametrize("name", ["plan.json", "workload.json", "costs.parquet", "front.parquet"])
def test_a_missing_file_is_named(written, tmp_path, name):
    shutil.copytree(written, tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    with pytest.raises(InputError, match=f"no {name}") as problem:
        load(tmp_path / "out")
    assert problem.value.where == str(tmp_path / "out")
    assert "Tune again" in problem.value.fix


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no such folder\. Give the folder that"):
        load(tmp_path / "nowhere")


def test_tables_of_another_tuning_are_refused(sample, written, tmp_path):
    shutil.copytree(written, tmp_path / "out")
    other_ = Plan(layers=sample.CHOSEN, provenance=sample.PLAN.provenance | {"created": "2026-11-23T04:00:00+00:00"})
    other_.save(tmp_path / "out" / "plan.json")
    with pytest.raises(InputError, match="the tuning that wrote") as problem:
        load(tmp_path / "out")
    assert problem.value.where.endswith("front.parquet")


def test_damaged_tables_are_refused(written, tmp_path):
    shutil.copytree(written, tmp_path / "out")
    costs = tmp_path / "out" / "costs.parquet"
    costs.write_bytes(costs.read_bytes()[:-9])
    with pytest.raises(InputError, match="Parquet") as problem:
        load(tmp_path / "out")
    assert problem.value.where == str(costs)


def test_units_of_time_and_size_suit_the_value():
    assert [duration(one) for one in (0.0, 812.4, 8123.0, 1.5e6, 1e10)] == [
        "0 µs",
        "812 µs",
        "8.12 ms",
        "1.5 s",
        "10000 s",
    ]
    assert [weight(one) for one in (12, 4352, 12_100_000, 3e9)] == ["12 B", "4.35 kB", "12.1 MB", "3 GB"]
    assert (duration(-812.4, sign=True), weight(2048, sign=True)) == ("-812 µs", "+2.05 kB")
