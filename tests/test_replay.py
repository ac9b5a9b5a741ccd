"""A plan on another device: what is named as stale or slow, and measuring again what is stale."""

import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import autoq
from autoq import cli, device_check, quantizing, remeasuring
from autoq.apply_report import ApplyReport
from autoq.cache import Fingerprint
from autoq.candidates import Candidate
from autoq.checkpoint import load_quantized
from autoq.errors import InputError, PlanError
from autoq.evaluation import Difference
from autoq.modules import QuantLinear
from autoq.plan import Plan
from autoq.profiler import Timing
from autoq.profiler.end_to_end import UNQUANTIZED
from autoq.scheme import NONE

HERE = Fingerprint.current("cpu").to_json()
THREADS = HERE["threads"]
AMD = HERE | {"name": "AuthenticAMD family 26", "threads": 64, "torch": "2.11.0", "cores": 64}
MEASURED = {
    "loss_delta": 0.01,
    "loss_low": 0.008,
    "loss_high": 0.012,
    "baseline_loss": 0.5,
    "samples": 4,
    "latency_us": 9.0,
    "baseline_latency_us": 30.0,
    "phases": {"forward": {"time_us": 36.0, "calls": 0.25, "loss_delta": 0.01}},
    "weight_bytes": 5000,
    "baseline_weight_bytes": 20000,
}
PREDICTED = {"loss_delta": 0.011, "latency_us": 8.0, "phases": {"forward": 32.0}, "latency_error": {"forward": 0.1}}
PLAN = Plan(
    layers={"0": "int8wo", "2": "none"},
    phases={"forward": 0.25},
    provenance={"seed": 3, "measured": MEASURED, "predicted": PREDICTED, "certificate": None, "device": AMD},
)


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).to(dtype).eval()


def made_on(**parts):
    return replace(PLAN, provenance=PLAN.provenance | {"device": HERE | parts})


# --- stale -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "stale"),
    [
        ({}, []),
        (
            {"name": "Intel model 207", "threads": 64, "torch": "2.11.0"},
            [f"latency was measured on Intel model 207 (64 threads), not on {HERE['name']} ({THREADS} threads)"],
        ),
        (
            {"device": "cuda", "name": "NVIDIA H100 sm_90"},
            [f"latency was measured on NVIDIA H100 sm_90, not on {HERE['name']} ({THREADS} threads)"],
        ),
        ({"threads": 999}, [f"latency was measured with threads 999, not with {THREADS}"]),
        ({"caches": "L2 1K"}, [f"latency was measured with caches L2 1K, not with {HERE['caches']}"]),
        ({"torch": "2.11.0"}, [f"latency was measured with torch 2.11.0, not with {HERE['torch']}"]),
        ({"kernels": "0"}, ["latency was measured with another version of autoq's kernels"]),
        (
            {"threads": 999, "torch": "2.11.0"},
            [
                f"latency was measured with threads 999, not with {THREADS}",
                f"latency was measured with torch 2.11.0, not with {HERE['torch']}",
            ],
        ),
    ],
)
def test_stale_latency_is_named(parts, stale):
    report = autoq.apply(net(), made_on(**parts))
    assert list(report.stale) == stale
    assert str(report).splitlines() == ["1 layers quantized", *(f"stale: {text}" for text in stale)]
    assert report.differs == bool(stale)


@pytest.mark.parametrize(
    ("provenance", "stale"),
    [
        ({"device": AMD}, 0),  # it says nothing of latency
        ({"measured": MEASURED}, 0),  # nor where
        ({"device": AMD, "measured": {"loss_delta": 0.1}}, 0),
        ({"device": {"name": AMD["name"]}, "measured": MEASURED}, 1),
        ({"device": AMD, "predicted": PREDICTED}, 1),
    ],
)
def test_only_a_latency_with_its_device_can_be_stale(provenance, stale):
    report = autoq.apply(net(), replace(PLAN, provenance=provenance))
    assert len(report.stale) == stale
    verb = "measured" if "measured" in provenance else "predicted"
    assert all(text.startswith(f"latency was {verb} on AuthenticAMD family 26") for text in report.stale)


def test_the_assignment_is_applied_all_the_same_and_carried_as_it_was():
    model, other = net(), net()
    autoq.apply(model, PLAN)
    autoq.apply(other, made_on())
    assert torch.equal(model(torch.ones(2, 64)), other(torch.ones(2, 64)))
    assert autoq.plan_of(model) == PLAN


def test_autoquant_logs_what_is_stale(caplog):
    with caplog.at_level(logging.WARNING, logger="autoq"):
        autoq.autoquant(net(), plan=PLAN)
    assert "stale: latency was measured on AuthenticAMD family 26 (64 threads)" in caplog.text


# --- slow ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_kernels(monkeypatch):
    """A machine without compiled kernels, as far as the check sees; what is packed is counted."""
    packed = []
    pack = Candidate.pack
    monkeypatch.setattr(device_check, "load_kernels", lambda device: False)
    monkeypatch.setattr(device_check, "_reason", lambda device: f"no compiler for the {device}")
    monkeypatch.setattr(Candidate, "pack", lambda self, w, layer="": packed.append(layer) or pack(self, w, layer=layer))
    return packed


SLOW = "1 layer in int8wo: no compiler for the cpu; each call dequantizes the weight"


def test_schemes_without_a_kernel_are_named_before_anything_is_packed(no_kernels, caplog):
    seen = []

    class Watch(logging.Handler):
        def emit(self, record):
            seen.append((record.getMessage(), list(no_kernels)))

    watch = Watch(logging.WARNING)
    logging.getLogger("autoq").addHandler(watch)
    try:
        report = autoq.apply(net(), Plan(layers={"0": "int8wo", "2": "none"}))
    finally:
        logging.getLogger("autoq").removeHandler(watch)
    assert seen == [(f"slow: {SLOW}", [])]
    assert no_kernels == ["0"]
    assert report.slow == (SLOW,)
    assert str(report).splitlines() == ["1 layers quantized", f"slow: {SLOW}"]


def test_strict_refuses_schemes_without_a_kernel_before_anything_is_packed(no_kernels):
    model = net()
    with pytest.raises(PlanError, match=r"every scheme of the plan has a kernel on this device; got 1 layer in int8wo"):
        autoq.apply(model, Plan(layers={"0": "int8wo", "2": "none"}), strict=True)
    assert no_kernels == []
    assert type(model[0]) is nn.Linear


def test_layers_are_counted_by_scheme(no_kernels):
    plan = Plan(layers={"0": "int8wo", "2": "int8wo"})
    assert autoq.apply(net(), plan).slow == (SLOW.replace("1 layer", "2 layers"),)
    assert autoq.apply(net(), Plan(layers={"0": "none", "2": "none"}), strict=True).slow == ()


def test_without_a_compiler_the_report_says_so(tmp_path):
    code = """
import sys, torch, autoq
from torch import nn
model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 32))
plan = autoq.Plan(layers={"0": "int8wo", "1": "fp6"})
try:
    autoq.apply(model, plan, strict=True)
except autoq.AutoqError as problem:
    print(problem)
print(type(model[0]).__name__)
print(autoq.apply(model, plan))
"""
    environment = {"HOME": str(tmp_path), "PATH": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    refusal, kind, *report = done.stdout.splitlines()
    assert refusal.startswith("every scheme of the plan has a kernel on this device; got 1 layer in int8wo: ")
    assert kind == "Linear"
    assert report[0] == "2 layers quantized"
    assert [line.partition(":")[0] for line in report[1:]] == ["slow", "slow"]
    assert "compiler" in report[1]


# --- measuring again -------------------------------------------------------------------------------------------------


def timing(us):
    return Timing(median_us=us, low_us=us - 1, high_us=us + 1, repeats=5)


class Clock:
    """In the place of the timer: remembers what it was to time."""

    asked: dict

    def __init__(self, model, store, phases, arguments, progress):
        self.phases = phases

    def time(self, plans, stage):
        Clock.asked = dict(plans)
        known = {UNQUANTIZED: 40.0, "none": 32.0, "plan": 20.0}
        return {label: {name: timing(known[label]) for name in self.phases} for label in (UNQUANTIZED, *plans)}

    def how(self):
        return dict.fromkeys(self.phases, "whole")


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(remeasuring, "Timer", Clock)
    return Clock


X = [torch.ones(2, 64) for _ in range(4)]


def test_remeasuring_replaces_times_and_device_and_keeps_the_loss(clock):
    model = net()
    found = autoq.remeasure(model, PLAN, X)
    assert clock.asked == {"plan": PLAN.layers}
    assert found.layers == PLAN.layers
    assert found.phases == {"forward": 0.25}
    known = found.provenance
    phase = {"time_us": 20, "low_us": 19, "high_us": 21, "baseline_us": 40, "baseline_low_us": 39}
    phase |= {"baseline_high_us": 41, "calls": 0.25, "compiled": "whole", "loss_delta": 0.01}
    times = {"latency_us": 5, "baseline_latency_us": 10, "phases": {"forward": phase}}
    assert known["measured"] == MEASURED | times
    assert known["predicted"] == {"loss_delta": 0.011}
    assert known["device"] == HERE
    assert known["versions"]["torch"] == torch.__version__
    assert known["remeasured"]["loss_device"] == AMD
    assert known["seed"] == 3
    assert "certificate" not in known
    assert autoq.apply(model, found).stale == ()
    assert Plan.from_json(found.to_json()) == found


def test_remeasuring_again_remembers_where_the_loss_was_measured(clock):
    once = autoq.remeasure(net(), PLAN, X)
    assert autoq.remeasure(net(), once, X).provenance["remeasured"]["loss_device"] == AMD
    assert "loss_device" not in autoq.remeasure(net(), made_on(), X).provenance["remeasured"]


def test_remeasuring_a_plan_without_figures_gives_it_times_alone(clock):
    found = autoq.remeasure(net(), Plan(layers={"0": "int8wo"}), X)
    assert found.phases == {"forward": 0.25}
    assert set(found.provenance) == {"measured", "device", "versions", "remeasured"}
    assert set(found.provenance["measured"]) == {"latency_us", "baseline_latency_us", "phases"}


def test_remeasuring_times_none_where_it_runs_in_autoqs_kernels(clock):
    found = autoq.remeasure(net(torch.bfloat16), PLAN, [x.bfloat16() for x in X])
    assert clock.asked == {"plan": PLAN.layers, "none": dict.fromkeys(PLAN.layers, NONE)}
    assert found.provenance["measured"]["none_latency_us"] == 8
    assert found.provenance["measured"]["phases"]["forward"]["none_us"] == 32


@pytest.mark.parametrize(
    ("plan", "phases", "says"),
    [
        (PLAN, {"prompt": autoq.Phase(X)}, r"on its phases: forward; got prompt\. Pass phases= with"),
        (PLAN.rebase(nn.ModuleDict({"m": net()})), None, r"got m\.0, m\.2\. .* plan\.rebase\(model\)"),
    ],
)
def test_remeasuring_another_models_plan_or_other_phases_is_refused(clock, plan, phases, says):
    with pytest.raises(PlanError, match=says):
        autoq.remeasure(net(), plan, None if phases else X, phases=phases)


@pytest.fixture
def untimed(clock, monkeypatch):
    """Timing anything fails the test."""

    def time(self, plans, stage):
        raise AssertionError("timed")

    monkeypatch.setattr(clock, "time", time)


def test_remeasuring_names_schemes_without_a_kernel_before_anything_is_packed(clock, no_kernels, monkeypatch, caplog):
    seen = []
    monkeypatch.setattr(clock, "time", lambda *_: seen.append((caplog.messages[:], no_kernels[:])) or {})
    with caplog.at_level(logging.WARNING, logger="autoq"), pytest.raises(KeyError):
        autoq.remeasure(net(), PLAN, X)
    assert seen == [([f"slow: {SLOW}"], [])]


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (PLAN, f"got {SLOW}"),
        (Plan(layers={"0": "none"}), "plan and model name the same layers; got 2 is not in the plan"),
    ],
)
def test_strict_refuses_before_anything_is_remeasured(untimed, no_kernels, plan, says):
    with pytest.raises(PlanError, match=says):
        autoq.remeasure(net(), plan, X, strict=True)
    assert no_kernels == []


def test_phases_that_no_plan_can_have_are_refused_before_anything_is_timed(untimed):
    phases = {"a\nb": autoq.Phase(X)}
    with pytest.raises(PlanError, match=r"\$\.phases has printable text as its keys; got 'a\\nb'"):
        autoq.remeasure(net(), Plan(layers={"0": "int8wo"}), phases=phases)


def test_tune_refuses_phases_that_no_plan_can_have_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr("autoq.tuning.Tuning.profile", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError, match=r"a phase's name is printable text; got 'a\\nb'"):
        autoq.tune(net(), phases={"a\nb": autoq.Phase(X)}, cache_dir=tmp_path)


def test_remeasuring_really_times_the_model_and_leaves_it_alone():
    model = net()
    before = model(X[0])
    found = autoq.remeasure(torch.compile(model, backend="eager"), PLAN, X)
    measured = found.provenance["measured"]
    phase = measured["phases"]["forward"]
    assert 0 < phase["low_us"] <= phase["time_us"] <= phase["high_us"]
    assert measured["latency_us"] == pytest.approx(0.25 * phase["time_us"])
    assert measured["baseline_latency_us"] == pytest.approx(0.25 * phase["baseline_us"])
    assert not [one for one in model.modules() if isinstance(one, QuantLinear)]
    assert torch.equal(model(X[0]), before)


TOY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)), [torch.ones(2, 64)] * 4
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "autoq_replayed", raising=False)
    (tmp_path / "autoq_replayed.py").write_text(TOY)
    PLAN.save(tmp_path / "plan.json")
    return tmp_path


def test_the_command_names_what_is_stale_and_remeasures_it(folder, clock, capsys):
    command = ["apply", "autoq_replayed:make", "plan.json", "--output"]
    assert cli.run([*command, "old"]) == 0
    assert "stale: latency was measured on AuthenticAMD family 26 (64 threads)" in capsys.readouterr().out
    assert Plan.load("old/plan.json") == PLAN
    assert cli.run([*command, "new", "--remeasure", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stale"] == []
    plan = Plan.load("new/plan.json")
    assert plan.provenance["device"] == HERE
    assert plan.provenance["measured"]["latency_us"] == 5
    assert autoq.plan_of(load_quantized(net, "new")) == plan
    assert cli.run(["show", "new/plan.json"]) == 0
    assert "the loss was measured on AuthenticAMD family 26" in " ".join(capsys.readouterr().out.split())


def test_the_command_refuses_what_strict_refuses_before_remeasuring(folder, untimed, no_kernels, capsys):
    command = ["apply", "autoq_replayed:make", "plan.json", "--output", "new", "--remeasure", "--strict"]
    assert cli.run(command) == 1
    assert f"every scheme of the plan has a kernel on this device; got {SLOW}" in capsys.readouterr().err
    assert not (folder / "new").exists()


def test_a_text_without_remeasure_is_wrong_usage(folder, capsys):
    command = ["apply", "autoq_replayed:make", "plan.json", "--output", "new", "--text", "test.txt"]
    assert cli.run(command) == 2
    assert "--text is the text to time on: it goes with --remeasure." in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["apply", "autoq_replayed:make", "plan.json", "--remeasure", "--output", "plan.json/new"],
        ["bench", "autoq_replayed:make", "plan.json", "--output", "plan.json/here.json"],
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(folder, monkeypatch, capsys, command):
    monkeypatch.setattr("autoq.loading.load_model", lambda _: pytest.fail("loaded"))
    assert cli.run(command) == 1
    says = f"Error: {command[-1]}: the output must be writable; got {folder / 'plan.json'}, which is no folder."
    assert says in capsys.readouterr().err


def test_the_command_shows_that_a_plan_was_edited(folder, capsys):
    text = (folder / "plan.json").read_text()
    assert cli.run(["show", "plan.json"]) == 0
    assert "3.33 × as fast" in capsys.readouterr().out
    (folder / "plan.json").write_text(text.replace('"0": {"scheme": "int8wo"}', '"0": {"scheme": "int8dq"}'))
    assert cli.run(["show", "plan.json"]) == 0
    shown = capsys.readouterr().out
    assert "int8dq ×1, none ×1" in shown
    assert "yes; the original plan's figures were dropped" in shown
    assert "as fast" not in shown


def test_the_command_applies_a_plan_under_another_prefix_when_asked(folder, capsys):
    PLAN.rebase(nn.ModuleDict({"model": net()})).save("other.json")
    command = ["apply", "autoq_replayed:make", "other.json", "--output", "saved"]
    assert cli.run(command) == 1
    assert "another model" in capsys.readouterr().err
    assert cli.run([*command, "--rebase", "--strict"]) == 0
    assert Plan.load("saved/plan.json") == PLAN


MEASUREMENT = quantizing.Measured(
    metric="relative_rms",
    baseline_loss=0.25,
    difference=Difference(mean=0.02, low=0.01, high=float("inf"), samples=8),
    phases={"forward": timing(20.0)},
    baseline_phases={"forward": timing(40.0)},
    weight_bytes=5001,
    baseline_weight_bytes=20001,
    calls={"forward": 0.5},
    compiled={"forward": "whole"},
)


def test_bench_writes_the_plan_with_all_figures_anew(folder, monkeypatch, capsys):
    monkeypatch.setattr(quantizing, "measure", lambda *_, **__: MEASUREMENT)
    assert cli.run(["bench", "autoq_replayed:make", "plan.json", "--output", "here.json"]) == 0
    assert "Written: here.json" in capsys.readouterr().out
    known = Plan.load("here.json").provenance
    measured = known["measured"]
    assert [measured[name] for name in ("loss_delta", "loss_high", "samples", "weight_bytes")] == [0.02, None, 8, 5001]
    assert (measured["latency_us"], measured["baseline_latency_us"]) == (5, 10)
    assert measured["phases"]["forward"]["compiled"] == "whole"
    assert (known["device"], known["seed"]) == (HERE, 3)
    assert "loss_device" not in known["remeasured"]


def test_bench_of_a_plan_for_other_phases_shows_figures_but_is_refused_an_output_first(folder, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(quantizing, "measure", lambda *_, **given: asked.append(given) or MEASUREMENT)
    replace(PLAN, phases={"prompt": 1.0}).save("prompt.json")
    command = ["bench", "autoq_replayed:make", "prompt.json"]
    assert cli.run([*command, "--output", "here.json"]) == 1
    assert "on its phases: prompt; got forward" in capsys.readouterr().err
    assert asked == []
    assert not (folder / "here.json").exists()
    assert cli.run(command) == 0
    assert "2.00 × as fast" in capsys.readouterr().out
    assert list(asked[0]["phases"]) == ["forward"]


def test_a_plan_without_phases_takes_the_measured_ones():
    found = remeasuring.measured_plan(Plan(layers={"0": "int8wo"}), MEASUREMENT, "cpu")
    assert found.phases == {"forward": 0.5}
    assert found.provenance["budget"] == {"metric": "relative_rms"}


def test_a_report_is_made_without_what_is_stale_or_slow():
    report = ApplyReport(applied={}, unquantized=(), skipped=(), unmatched=(), missing=())
    assert (report.stale, report.slow, report.differs) == ((), (), False)
