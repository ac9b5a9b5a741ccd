"""The whole path on small models: what a user asks, what comes back, and every kind of bad input."""

import json
import logging
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import autoq
from autoq import pairs, sensitivity, tables
from autoq.errors import AutoqError, CacheError, InputError, ModelError, SearchError
from autoq.figures import relative_latency
from autoq.modules import compile_arguments
from autoq.profiler import isolated as isolated_module
from autoq.quantizing import loss_meter
from autoq.reporting import write_files
from autoq.scheme import Scheme
from autoq.summary import loss_family


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(128, 128), nn.GELU()) for _ in range(3)])
        self.head = nn.Linear(128, 8)

    def forward(self, x):
        return {"logits": 4 * self.head(self.blocks(x))}


def classifier(dtype=torch.float32):
    torch.manual_seed(0)
    return Classifier().eval().to(dtype)


def inputs(batches=4):
    torch.manual_seed(1)
    return list(torch.randn(batches, 16, 128))


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    """Times are not judged here: one round of each is enough."""
    monkeypatch.setattr(isolated_module, "_SECONDS_PER_SHAPE", 0.0)
    monkeypatch.setattr(isolated_module, "_MAX_COPIES", 2)


QUICK = {"candidates": ["int8wo", "int4wo-hqq(group_size=64)"], "n_trials": 6}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """One tuned classifier: (model, result, cache folder, stages seen)."""
    folder = tmp_path_factory.mktemp("cache")
    model, stages = classifier(), []
    result = autoq.tune(
        model, inputs(), cache_dir=folder, max_increase=0.05, progress=lambda stage, *_: stages.append(stage), **QUICK
    )
    return model, result, folder, stages


def test_the_stages_come_in_order(tuned):
    order = list(dict.fromkeys(tuned[3]))
    assert order == ["record", "profile", "baseline", "sensitivity", "compile", "calibrate", "search", "verify"]


def test_the_model_is_not_touched(tuned):
    model = tuned[0]
    fresh = classifier()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))
    assert all(not module._forward_pre_hooks and "forward" not in module.__dict__ for module in model.modules())
    assert autoq.plan_of(model) is None


def test_uniform_plans_are_measured_and_one_row_is_chosen(tuned):
    front = tuned[1].front
    assert list(front.columns) == tables.FRONT.names
    assert {"none", "int8wo", "int4wo-hqq(group_size=64)"} <= set(front["label"])
    assert front["chosen"].sum() == 1
    none = front[front["label"] == "none"].iloc[0]
    assert none["loss_delta"] == 0
    assert none["latency_measured_us"] > 0
    int4, int8 = (front[front["label"].str.startswith(name)].iloc[0] for name in ("int4", "int8"))
    assert int4["loss_delta"] > int8["loss_delta"] > 0
    assert int4["weight_bytes"] < int8["weight_bytes"] < none["weight_bytes"]


def test_the_chosen_plan_is_never_slower_as_measured_than_the_others_in_budget(tuned):
    front = tuned[1].front
    timed = front[front["latency_measured_us"].notna() & front["in_budget"]]
    chosen = front[front["chosen"]].iloc[0]
    assert chosen["latency_measured_us"] == timed["latency_measured_us"].min()


def test_every_row_of_the_measurements_says_what_ran(tuned):
    rows = tuned[1].measurements
    assert len(rows) == 2 * 3  # two shapes, three schemes
    assert set(rows["status"]) == {"ok"}
    assert (rows["kernel"].str.len() > 0).all()
    assert len(tuned[1].sensitivity) == 4 * 2  # layers, schemes


def test_the_costs_add_up_to_the_problem_that_was_searched(tuned):
    result = tuned[1]
    costs = result.costs
    assert list(costs.columns) == tables.COSTS.names
    assert len(costs) == 4 * 3
    for unit in result.problem.units:
        for option in unit.options:
            (row,) = costs[(costs["layer"] == unit.name) & (costs["scheme"] == option.scheme)].to_dict("records")
            assert row["time_us"] == pytest.approx(option.time_us)
            assert row["loss"] == pytest.approx(option.loss)
            assert row["weight_bytes"] == option.bytes
            assert row["loss_low"] <= row["loss"] <= row["loss_high"]
            assert sum(json.loads(row["phases_us"]).values()) == pytest.approx(4 * option.time_us)  # batches a request
    none = costs[costs["scheme"] == "none"]
    assert none["loss"].tolist() == [0.0] * 4
    assert costs["measured"].any()


def test_a_tuning_explains_itself_from_its_folder(tuned, tmp_path):
    result = tuned[1]
    write_files(result, tmp_path)
    found = autoq.explain(tmp_path)
    assert [one.unit for one in found.choices] == [unit.name for unit in result.problem.units]
    assert {one.unit: one.scheme for one in found.choices} == {name: str(s) for name, s in result.plan.layers.items()}
    other = next(one for one in found.choices[0].alternatives if one.scheme.startswith("int4"))
    assert other.change.weight_bytes < 0
    assert str(found) == str(autoq.explain(result))


def test_the_plan_carries_its_provenance_and_survives_the_file(tuned, tmp_path):
    plan = tuned[1].plan
    plan.save(tmp_path / "plan.json")
    again = autoq.Plan.load(tmp_path / "plan.json")
    assert again.layers == plan.layers
    facts = json.loads(json.dumps(plan.to_json(), allow_nan=False))["provenance"]
    assert facts["budget"]["metric"] == "kl"
    assert facts["request"]["max_increase"] == 0.05
    assert facts["measured"]["samples"] == 64
    assert facts["measured"]["loss_low"] <= facts["measured"]["loss_delta"] <= facts["measured"]["loss_high"] <= 0.05
    assert facts["device"]["threads"] == torch.get_num_threads()
    (kernels,) = plan.kernels.values()
    assert len(kernels) == 6
    assert "int8" in kernels["int8wo M=16 K=128 N=128 float32"]


def test_replaying_the_plan_gives_bit_equal_outputs(tuned, tmp_path):
    plan = tuned[1].plan.replace({"head": "int8wo", "blocks.0.0": "int4wo-hqq(group_size=64)"})
    plan.save(tmp_path / "plan.json")
    one, two = classifier(), classifier()
    autoq.apply(one, plan)
    autoq.autoquant(two, plan=tmp_path / "plan.json", accept_plan=True)
    x = inputs()[0]
    with torch.no_grad():
        assert torch.equal(one(x)["logits"], two(x)["logits"])
        assert not torch.equal(one(x)["logits"], classifier()(x)["logits"])


def test_a_second_run_measures_nothing_again(tuned, monkeypatch):
    _, first, folder, _ = tuned
    for name in ("interleaved", "read_bandwidth_gb_s"):
        monkeypatch.setattr(isolated_module, name, None)
    monkeypatch.setattr(sensitivity, "scores", None)
    monkeypatch.setattr(pairs, "measure", None)
    seen = []
    again = autoq.tune(
        classifier(), inputs(), cache_dir=folder, max_increase=0.05, progress=lambda *args: seen.append(args), **QUICK
    )
    assert again.plan.provenance["study"] == first.plan.provenance["study"]
    assert again.front["plan"].tolist() == first.front["plan"].tolist()
    assert again.front["loss_delta"].tolist() == first.front["loss_delta"].tolist()
    assert "calibrate" not in {stage for stage, *_ in seen}


def test_retargeting_predicts_and_runs_nothing(tuned, monkeypatch):
    result = tuned[1]
    monkeypatch.setattr(nn.Module, "__call__", None)
    small = result.retarget(objective="memory", max_increase=1.0)
    assert set(small.counts()) == {"int4wo-hqq(group_size=64)"}
    assert set(result.retarget(max_increase=0.0).counts()) == {"none"}
    assert "measured" not in small.provenance
    assert small.provenance["predicted"]["weight_bytes"] == small_bytes(result)
    with pytest.raises(SearchError, match="bytes"):
        result.retarget(max_increase=1.0, max_weight_bytes=10)


def small_bytes(result):
    front = result.front
    return int(front[front["label"].str.startswith("int4")].iloc[0]["weight_bytes"])


def test_memory_and_loss_objectives_and_their_limits(tmp_path):
    model = classifier()
    common = {"cache_dir": tmp_path, **QUICK}
    memory = autoq.tune(model, inputs(), objective="memory", max_increase=10.0, **common)
    assert set(memory.plan.counts()) == {"int4wo-hqq(group_size=64)"}
    limit = memory.plan.provenance["measured"]["weight_bytes"] + 4096
    loss = autoq.tune(model, inputs(), objective="loss", max_weight_bytes=limit, **common)
    assert loss.plan.provenance["measured"]["weight_bytes"] <= limit
    assert loss.plan.provenance["measured"]["loss_delta"] <= memory.plan.provenance["measured"]["loss_delta"]
    with pytest.raises(InputError, match="limits"):
        autoq.tune(model, inputs(), objective="loss", **common)


def test_a_budget_nothing_meets_returns_the_unquantized_plan_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="autoq"):
        result = autoq.tune(classifier(), inputs(), cache_dir=tmp_path, max_increase=0.0, **QUICK)
    assert set(result.plan.counts()) == {"none"}
    assert any("nothing is quantized" in note for note in result.notes)
    assert result.plan.provenance["notes"] == list(result.notes)
    unreachable = autoq.tune(classifier(), inputs(), cache_dir=tmp_path, max_increase=0.1, max_latency_us=1e-3, **QUICK)
    assert set(unreachable.plan.counts()) == {"none"}
    assert any("nothing is quantized" in note for note in unreachable.notes)


def test_an_eval_fn_judges_in_its_own_unit(tmp_path):
    labels = classifier()(torch.cat(inputs()))["logits"].argmax(dim=1)

    def errors(model):
        return (model(torch.cat(inputs()))["logits"].argmax(dim=1) != labels).float() + 1

    result = autoq.tune(classifier(), inputs(), eval_fn=errors, max_degradation=0.05, cache_dir=tmp_path, **QUICK)
    budget = result.plan.provenance["budget"]
    assert (budget["metric"], budget["baseline"]) == ("eval_fn", 1.0)
    front = result.front
    assert np.allclose(front["loss_delta"] * 64, (front["loss_delta"] * 64).round())  # whole errors
    assert front[front["chosen"]].iloc[0]["loss_high"] <= 0.05


def test_a_loss_fn_and_a_filter_fn_are_obeyed(tmp_path):
    result = autoq.tune(
        classifier(),
        inputs(),
        loss_fn=lambda outputs, batch: outputs["logits"].square().mean(dim=1),
        filter_fn=lambda name, module: name != "head",
        max_degradation=0.5,
        cache_dir=tmp_path,
        **QUICK,
    )
    assert "head" not in result.plan.layers
    assert next(one for one in result.workload.layers if one.name == "head").reason == "left alone by filter_fn"
    assert result.plan.provenance["budget"]["metric"] == "loss_fn"


PHASES = {"prompt": autoq.Phase(torch.ones(64, 128)), "answer": autoq.Phase(torch.ones(1, 128), calls=4)}


def test_a_plan_with_mixes_is_judged_by_its_worst_phase(tmp_path):
    common = {"phases": PHASES, "objective": "memory", "n_trials": 2}
    scheme = "int8mix(m_switch=8)"
    result = autoq.tune(classifier(), inputs(), candidates=[scheme], max_increase=1.0, cache_dir=tmp_path, **common)
    assert set(result.plan.counts()) == {scheme}
    facts = json.loads(json.dumps(result.plan.provenance))
    meter = loss_meter(classifier(), None, inputs())
    deltas = {}
    for phase, name in (("prompt", "int8dq"), ("answer", "int8wo")):
        expected = meter.difference(dict.fromkeys(result.plan.layers, Scheme.parse(name)))
        found = facts["measured"]["phases"][phase]
        assert [found[key] for key in ("loss_delta", "loss_low", "loss_high")] == pytest.approx(
            [expected.mean, expected.low, expected.high], rel=1e-4
        )
        deltas[phase] = found["loss_delta"]
    assert deltas["prompt"] > deltas["answer"] > 0
    assert facts["measured"]["loss_delta"] == deltas["prompt"]
    chosen = result.front[result.front["chosen"]].iloc[0]
    assert chosen["loss_delta"] == deltas["prompt"]
    assert set(result.sensitivity["scheme"]) == {scheme}
    measured = autoq.measure(classifier(), result.plan, inputs(), phases=PHASES)
    assert {phase: one.mean for phase, one in measured.phase_differences.items()} == pytest.approx(deltas, rel=1e-4)
    assert measured.difference == measured.phase_differences["prompt"]
    over = autoq.tune(
        classifier(), inputs(), candidates=[scheme], max_increase=deltas["answer"] * 1.01, cache_dir=tmp_path, **common
    )
    assert set(over.plan.counts()) == {"none"}


def test_a_plan_without_mixes_has_one_loss(tuned):
    phases = tuned[1].plan.provenance["measured"]["phases"]
    assert all("loss_delta" not in phase for phase in phases.values())
    measured = autoq.measure(classifier(), tuned[1].plan, inputs(), phases=PHASES)
    assert measured.phase_differences == {}


# -- unquantized weights in autoq's kernels ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned_bfloat16(tmp_path_factory):
    """A tuned bfloat16 classifier, and the cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    batches = [one.bfloat16() for one in inputs()]
    return autoq.tune(classifier(torch.bfloat16), batches, cache_dir=folder, max_increase=0.05, **QUICK), folder


def test_none_is_timed_as_a_plan_of_its_own_where_it_has_kernels(tuned_bfloat16, tuned):
    result, folder = tuned_bfloat16
    front, measured = result.front, result.plan.provenance["measured"]
    none, stock = (front[front["label"] == name].iloc[0] for name in ("none", "unquantized"))
    assert front["chosen"].sum() == 1
    assert none["latency_measured_us"] == measured["none_latency_us"]
    assert stock["latency_measured_us"] == measured["baseline_latency_us"]
    assert measured["phases"]["forward"]["none_us"] > 0
    assert none["loss_delta"] == stock["loss_delta"] == 0
    assert none["weight_bytes"] == stock["weight_bytes"] == measured["baseline_weight_bytes"]
    ratios = relative_latency(front)["latency"]
    assert ratios[front["label"] == "unquantized"].tolist() == [1.0]
    rows = result.measurements[result.measurements["scheme"] == "none"]
    assert rows["kernel"].str.endswith(".bf16.gemv").all()
    assert (rows["ratio"] == rows["time_us"] / rows["baseline_us"]).all()
    (kernels,) = result.plan.kernels.values()
    assert kernels["none M=16 K=128 N=128 bfloat16"] == rows["kernel"].iloc[0]
    (calibration,) = (json.loads(one.read_text()) for one in (folder / "calibration").iterdir())
    assert set(calibration["times_us"]) == set(front["label"]) - {"", "unquantized"}
    assert "none_latency_us" not in tuned[1].plan.provenance["measured"]  # float32: none is the stock model
    assert "unquantized" not in set(tuned[1].front["label"])


def test_the_unquantized_model_is_a_plan_without_layers_then(tmp_path):
    model, batches = classifier(torch.bfloat16), [one.bfloat16() for one in inputs()]
    result = autoq.tune(model, batches, cache_dir=tmp_path, max_increase=0.05, max_latency_us=1e-3, **QUICK)
    assert result.plan.layers == {}
    assert any("nothing is quantized" in note for note in result.notes)
    assert result.front[result.front["chosen"]]["label"].tolist() == ["unquantized"]
    facts = result.plan.provenance
    assert facts["measured"]["latency_us"] == facts["measured"]["baseline_latency_us"]
    assert facts["measured"]["loss_delta"] == 0
    assert "latency_us" not in facts["predicted"]
    write_files(result, tmp_path)
    before = dict(model.named_modules())
    assert autoq.autoquant(model, plan=tmp_path / "plan.json", accept_plan=True) is model
    assert dict(model.named_modules()) == before
    assert autoq.plan_of(model) is None


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[], torch.empty(0, 128), None])
def test_empty_batches(tmp_path, batches):
    with pytest.raises(InputError, match="batches"):
        autoq.tune(classifier(), batches, cache_dir=tmp_path)


def test_a_model_without_linear_layers(tmp_path):
    with pytest.raises(ModelError, match="linear layers"):
        autoq.tune(nn.Sequential(nn.Conv2d(3, 3, 3)), torch.randn(1, 3, 8, 8), cache_dir=tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(tmp_path, value):
    model = classifier()
    model.blocks[1][0].weight.data[3, 5] = value
    with pytest.raises(ModelError, match=r"blocks\.1\.0.*1 NaN or infinite"):
        autoq.tune(model, inputs(), cache_dir=tmp_path)


def test_a_nan_from_eval_fn(tmp_path):
    with pytest.raises(InputError, match=r"eval_fn.*NaN"):
        autoq.tune(classifier(), inputs(), eval_fn=lambda model: math.nan, cache_dir=tmp_path, **QUICK)


def test_a_cache_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="writable"):
        autoq.tune(classifier(), inputs(), cache_dir=tmp_path / "file")


@pytest.mark.parametrize(
    "arguments",
    [
        {"objective": "speed"},
        {"candidates": ["int3"]},
        {"max_degradation": -1},
        {"max_increase": math.nan},
        {"max_latency_us": -1.0},
        {"max_weight_bytes": math.inf},
        {"n_trials": 0},
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_runs(tmp_path, arguments):
    stages = []
    with pytest.raises(AutoqError):
        autoq.tune(
            classifier(),
            inputs(),
            cache_dir=tmp_path,
            progress=lambda stage, *_: stages.append(stage),
            **{"n_trials": 4, **arguments},
        )
    assert stages == []


def test_a_relative_budget_of_a_kl_divergence_is_not_ignored_in_silence(tmp_path):
    result = autoq.tune(classifier(), inputs(), cache_dir=tmp_path, max_degradation=0.05, **QUICK)
    assert result.metric == "kl"
    (note,) = [one for one in result.notes if one.startswith("max_degradation=0.05 is relative")]
    assert "its limit is 0.01 nats. max_increase" in note
    with pytest.raises(InputError, match="Pass max_increase= in nats"):
        result.retarget(max_degradation=0.2)
    assert result.retarget(max_increase=0.2).provenance["budget"]["max_increase"] == pytest.approx(0.2)


def test_measure_tells_its_stages():
    stages = []
    plan = autoq.Plan(layers={"blocks.0.0": "int8wo"})
    autoq.measure(classifier(), plan, inputs(), progress=lambda stage, *_: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["record", "evaluate", "compile", "measure"]


@pytest.mark.parametrize("stage", ["profile", "sensitivity", "search"])
def test_an_interrupted_run_leaves_a_readable_cache_and_goes_on_from_it(tmp_path, stage, tuned):
    class Stop(KeyboardInterrupt):
        pass

    reached = []

    def interrupt(now, text, done, total):
        reached.append(now)
        if now == stage and done >= 1:
            raise Stop

    with pytest.raises(Stop):
        autoq.tune(classifier(), inputs(), cache_dir=tmp_path, max_increase=0.05, progress=interrupt, **QUICK)
    assert reached[-1] == stage
    assert not list(tmp_path.rglob("*.tmp"))
    result = autoq.tune(classifier(), inputs(), cache_dir=tmp_path, max_increase=0.05, **QUICK)
    wanted = tuned[1].front.set_index(["label", "samples"])["loss_delta"]
    found = result.front.set_index(["label", "samples"])["loss_delta"]
    same = wanted.index.intersection(found.index)
    assert ("none", 64) in same  # a plan may have stopped at fewer samples in one of the runs
    assert all(found[key] == pytest.approx(wanted[key], abs=1e-6) for key in same)


def test_without_a_compiler_atens_kernels_run_and_the_status_says_so(tmp_path):
    code = """
import logging, sys, torch
from pathlib import Path
from autoq_kernels.cpu import build
messages = []
class Keep(logging.Handler):
    def emit(self, record): messages.append(record.getMessage())
logging.getLogger().addHandler(Keep())
from autoq import candidates
c = candidates.parse("int8wo")
w, x = torch.randn(32, 64), torch.randn(3, 64)
p = c.pack(w)
y = c.linear(x, p)
assert (y - c.reference(x, p)).abs().max() < 1e-4
assert build.status().isa is None or build.status().reason, build.status()
print(build.status().reason)
assert messages, "the fallback was silent"
"""
    environment = os.environ | {"PATH": str(tmp_path), "HOME": str(tmp_path), "CXX": ""}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert "compiler" in found.stdout.lower()


def test_families_are_roles_and_ends():
    names = [f"model.layers.{i}.{part}" for i in range(8) for part in ("self_attn.q_proj", "mlp.up_proj")]
    assert loss_family("model.layers.0.mlp.up_proj", names) == "first blocks"
    assert loss_family("model.layers.7.self_attn.q_proj", names) == "last blocks"
    assert loss_family("model.layers.3.self_attn.q_proj", names) == "attention"
    assert loss_family("model.layers.3.mlp.up_proj", names) == "mlp"
    assert loss_family("lm_head", names) == "lm_head"
    assert loss_family("0", ["0", "2"]) == "other"


def test_the_arguments_of_a_compiled_model_are_found_and_compile_another_model_alike():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = classifier()
    assert compile_arguments(model) == {}
    found = compile_arguments(torch.compile(model, backend=backend, dynamic=True))
    assert found.keys() == {"backend", "dynamic"}
    assert found["dynamic"] is True
    other = torch.compile(nn.Linear(128, 8), **found)
    with torch.no_grad():
        other(inputs()[0])
    assert len(graphs) == 1
