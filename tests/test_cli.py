"""The command line: what each verb prints, writes and exits with. Tuning itself is tested elsewhere."""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from autoq import candidates, cli, cli_export, cli_options, exporting, quantizing, reporting, tables
from autoq.errors import SearchError
from autoq.evaluation import Difference
from autoq.plan import Plan
from autoq.profiler import Timing
from autoq.workload import Workload

DOCS = Path(cli.__file__).parents[1] / "docs" / "command-line.md"
CACHE_VERBS = tuple(f"cache {name}" for name in ("ls", "show", "verify", "prune", "export", "import"))
BENCH_VERBS = ("bench plan", "bench model")
VERBS = ("tune", "apply", "eval", "bench", "show", "explain", "report", "diff", "export", "cache", "worker", "doctor")
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
    layers={"0": "int8wo", "2": "none"},
    phases={"forward": 1.0},
    provenance={"budget": {"text": "at most 1 %"}, "notes": ["A note."]},
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a module that makes a model, and a plan for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "autoq_toy", raising=False)
    (tmp_path / "autoq_toy.py").write_text(TOY)
    PLAN.save(tmp_path / "plan.json")
    return tmp_path


def _costs(layer, time_us):
    row = {"layer": layer, "unit": layer, "reason": "", "measured": False, "weight_bytes": 4000, "time_us": time_us}
    row |= {"phases_us": json.dumps({"forward": time_us})}
    row |= {"scheme": "none", "loss": 0.0, "loss_low": 0.0, "loss_high": 0.0}
    quantized = {"scheme": "int8wo", "loss": 0.004, "loss_low": 0.002, "loss_high": 0.006, "weight_bytes": 1000}
    refused = {"layer": layer, "unit": layer, "scheme": "sinq(bits=4)", "reason": "wrong: its products are wrong"}
    return [row, row | quantized | {"time_us": time_us / 2}, refused]


@dataclass
class Result:
    plan: Plan
    workload = Workload(layers=(), calls=(), phases=())
    notes = ("A note.",)
    front = tables.frame(
        [
            {
                "label": "none",
                "source": "uniform",
                "assignment": "{}",
                "loss_delta": 0.0,
                "samples": 4,
                "latency_predicted_us": 2.0,
            },
            {
                "label": "",
                "source": "optuna",
                "assignment": "{}",
                "loss_delta": 0.01,
                "samples": 4,
                "latency_predicted_us": 1.0,
            },
        ],
        tables.FRONT,
    )
    measurements = tables.frame([], tables.MEASUREMENTS)
    sensitivity = tables.frame([], tables.SENSITIVITY)
    costs = tables.frame([*_costs("0", 100.0), *_costs("2", 40.0)], tables.COSTS)


@pytest.fixture
def unwritten(monkeypatch):
    """Tune without its files, which take seconds."""
    monkeypatch.setattr(reporting, "write_files", lambda _, folder: {"plan.json": str(folder / "plan.json")})


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """What tune writes."""
    folder = tmp_path_factory.mktemp("tuned")
    reporting.write_files(Result(PLAN), folder)
    return str(folder)


@pytest.mark.parametrize("verb", ["", *VERBS, *CACHE_VERBS, *BENCH_VERBS])
def test_help_is_one_screen_with_an_example(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.run([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example:\n" in text
    assert f"autoq {verb}" in text
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("group", [[], ["cache"], ["bench"]])
def test_no_line_of_the_list_of_verbs_is_cut_off(group, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run([*group, "--help"]) == 0
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]


def test_the_page_has_every_verb_and_every_exit_code():
    page = DOCS.read_text()
    assert tuple(cli.cli.commands) == VERBS
    assert tuple(f"cache {name}" for name in cli.cli.commands["cache"].commands) == CACHE_VERBS
    for verb in VERBS:
        assert f"\n| `{verb}" in page
    assert [int(row.split("|")[1]) for row in page.partition("| exit code")[2].splitlines()[2:6]] == [0, 1, 2, 130]


def test_help_does_not_import_torch():
    code = "import sys; from autoq.cli import run; run(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "autoq", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("autoq, version ")


def test_tune_passes_the_limits_and_writes_its_files(folder, monkeypatch, capsys):
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
    assert seen["candidates"] is None
    assert (seen["seed"], seen["n_trials"], str(seen["cache_dir"])) == (3, 2, "cache")
    assert len(seen["batches"]) == 4
    assert not seen["model"].training
    made = {path.name for path in (folder / "out").iterdir()}
    assert {"front.parquet", "front.png", "plan.json", "report.html"} <= made
    printed = capsys.readouterr()
    assert "int8wo ×1" in printed.out
    assert "the batches that came with the model" in printed.out
    assert "Note: A note." in printed.out
    assert "profile 1/2" in printed.err


def test_tune_takes_schemes_beside_the_default_ones(folder, unwritten, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr("autoq.pipeline.tune", lambda *_, **given: seen.update(given) or Result(PLAN))
    command = ["tune", "autoq_toy:make", "--json", "--candidate"]
    assert cli.run([*command, "int8dq", "--candidate", "default"]) == 0
    assert seen["candidates"] == [candidates.parse("int8dq"), *candidates.DEFAULT]
    assert cli.run([*command, "int7"]) == 1
    assert "int7" in capsys.readouterr().err


def test_tune_as_json_prints_one_object(folder, unwritten, monkeypatch, capsys):
    monkeypatch.setattr("autoq.pipeline.tune", lambda *_, **__: Result(PLAN))
    assert cli.run(["tune", "autoq_toy:make", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"] == PLAN.hash
    assert found["schemes"] == {"other": {"int8wo": 1, "none": 1}}
    assert found["notes"] == ["A note."]
    assert found["files"] == {"plan.json": "autoq-out/plan.json"}


def test_cache_folder_comes_from_the_environment(folder, unwritten, monkeypatch):
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
    last = capsys.readouterr().err.splitlines()[-2:]
    assert last == [
        "Stopped. All measurements so far are kept in cache.",
        "To go on: autoq tune autoq_toy:make --cache-dir cache",
    ]


def test_autoqs_errors_are_one_message_and_exit_1(folder, monkeypatch, capsys):
    def tune(*_, **__):
        raise SearchError("a plan meets the limits", got="none", fix="Relax one.")

    monkeypatch.setattr("autoq.pipeline.tune", tune)
    assert cli.run(["tune", "autoq_toy:make"]) == 1
    printed = capsys.readouterr()
    assert "Error: a plan meets the limits; got none. Relax one." in printed.err
    assert printed.out == ""
    assert cli.run(["tune", "autoq_toy:make", "--json"]) == 1
    printed = capsys.readouterr()
    assert "Error: a plan meets the limits" in printed.err
    assert json.loads(printed.out)["error"] == {
        "message": "a plan meets the limits; got none. Relax one.",
        "kind": "SearchError",
        "rule": "a plan meets the limits",
        "got": "none",
        "fix": "Relax one.",
    }


@pytest.mark.parametrize(
    "command",
    [
        "show plan.json",
        "show plan.json --layers",
        "diff plan.json other.json",
        "cache ls --cache-dir cache",
        "cache verify --cache-dir cache",
        "cache prune --dry-run --cache-dir cache",
    ],
)
def test_json_is_one_object_and_nothing_else_on_stdout(folder, capsys, command):
    Plan(layers={"0": "int8dq"}).save("other.json")
    assert cli.run([*command.split(), "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_every_verb_takes_json():
    groups = ("cache", "bench")
    found = {name: verb for name, verb in cli.cli.commands.items() if name not in groups}
    found |= {f"{group} {name}": verb for group in groups for name, verb in cli.cli.commands[group].commands.items()}
    assert [name for name, verb in found.items() if "--json" not in verb.params[-1].opts] == []


def test_numbers_that_json_does_not_have_are_null(capsys):
    cli_options.print_json({"a": [float("inf"), 1.5], "b": {"c": float("nan")}, "d": (1, True)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": {"c": None}, "d": [1, True]}


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
def test_a_model_that_cannot_be_loaded_is_one_clear_error(folder, capsys, monkeypatch, model, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    assert cli.run(["tune", model]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("Error: ")
    assert words in error


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


def test_the_schemes_in_examples_are_among_the_default_ones(tuned, capsys):
    """So that an example can be copied after a tuning that chose nothing else."""
    named = {str(one.scheme) for one in candidates.DEFAULT}
    assert cli.run(["explain", "--help"]) == 0
    (example,) = [line for line in capsys.readouterr().out.splitlines() if "--force '" in line or "--force m" in line]
    assert shlex.split(example)[-1].partition("=")[2] in named


@pytest.mark.parametrize("verb", ["tune", "eval", "bench"])
def test_a_text_that_does_not_exist_is_refused_before_the_model_is_loaded(folder, capsys, verb):
    plan = [] if verb == "tune" else ["plan.json"]
    assert cli.run([verb, "nothing:here", *plan, "--text", "absent.txt"]) == 1
    printed = capsys.readouterr().err
    assert "absent.txt: the text must be a readable UTF-8 file" in printed
    assert "load" not in printed


def test_a_text_for_a_model_without_a_tokenizer_is_refused(folder, capsys):
    (folder / "some.txt").write_text("Some text.")
    assert cli.run(["eval", "autoq_toy:make", "plan.json", "--text", "some.txt"]) == 1
    assert "Error: --text some.txt: a text judges models that have a tokenizer; got autoq_toy:make" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("option", ["--max-increase", "--max-latency-us", "--max-weight-bytes", "--max-degradation"])
def test_a_negative_limit_is_wrong_usage(folder, capsys, option):
    assert cli.run(["tune", "autoq_toy:make", option, "-1"]) == 2
    assert option in capsys.readouterr().err


def test_bench_shows_its_stages(folder, monkeypatch, capsys):
    """Compiling and timing take minutes."""

    def measure(*_, progress, **__):
        progress("compile", "forward, unquantized", 1, 3)
        raise SearchError("only the stages are wanted")

    monkeypatch.setattr(quantizing, "measure", measure)
    assert cli.run(["bench", "autoq_toy:make", "plan.json"]) == 1
    assert "compile 1/3 forward, unquantized" in capsys.readouterr().err


def test_explain_reads_what_tune_wrote(tuned, capsys):
    assert cli.run(["explain", tuned]) == 0
    text = capsys.readouterr().out
    assert "Budget: at most 1 %." in text
    assert "wrong: its products are wrong" in text
    assert cli.run(["explain", tuned, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["unit"] for one in found["choices"]] == ["0", "2"]
    assert found["plan"] == PLAN.hash


def test_explain_tells_of_one_layer_and_of_forced_schemes(tuned, capsys):
    command = ["explain", tuned, "--layer", "2", "--force", "2=int8wo", "--force", "0=none"]
    assert cli.run(command) == 0
    text = capsys.readouterr().out
    assert text.startswith("2: none\n")
    assert "Forcing 2 to int8wo, 0 to none:\n  request +30 µs, loss " in text
    assert "weights +0 B; predicted." in text
    assert cli.run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["unit"] for one in found["layers"]] == ["2"]
    assert (found["force"]["time_us"], found["force"]["layers"]) == (30.0, {"2": "int8wo", "0": "none"})


def test_explain_takes_another_plan_of_the_same_layers(tuned, folder, capsys):
    Plan(layers={"0": "none", "2": "int8wo"}).save("other.json")
    assert cli.run(["explain", tuned, "--plan", "other.json", "--layer", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["scheme"] == "int8wo"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--force", "0"], 2, "LAYER=SCHEME is wanted"),
        (["--force", "9=none"], 1, "Error: 9: "),
        (["--force", "0=sinq(bits=4)"], 1, "wrong: its products are wrong"),
        (["--layer", "9"], 1, "Error: 9: "),
    ],
)
def test_explain_refuses_what_was_not_measured(tuned, capsys, arguments, code, words):
    assert cli.run(["explain", tuned, *arguments]) == code
    assert words in capsys.readouterr().err


def test_explain_and_report_of_no_tuning_say_what_is_missing(folder, capsys):
    for verb in ("explain", "report"):
        assert cli.run([verb, "nothing"]) == 1
        assert "Error: nothing: " in capsys.readouterr().err
    assert not (folder / "nothing").exists()


def test_report_writes_one_file(tuned, folder, capsys):
    assert cli.run(["report", tuned, "--output", "elsewhere.html"]) == 0
    assert capsys.readouterr().out == "Written: elsewhere.html\n"
    written = (folder / "elsewhere.html").read_text()
    assert written == (Path(tuned) / "report.html").read_text()
    assert cli.run(["report", tuned, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(Path(tuned) / "report.html")}
    assert (Path(tuned) / "report.html").read_text() == written


def test_export_writes_the_settings_of_another_program(folder, capsys):
    assert cli_export.TARGETS == exporting.TARGETS
    Plan(layers={"model.layers.0.mlp.down_proj": "int8wo"}).save("plan.json")
    assert cli.run(["export", "plan.json", "--to", "torchao", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert cli.run(["export", "plan.json", "--to", "torchao"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(found["text"])
    assert cli.run(["export", "plan.json", "--to", "torchao", "--output", "made.json"]) == 0
    assert capsys.readouterr().out == "Written: made.json\n"
    assert (folder / "made.json").read_text() == found["text"]
    assert cli.run(["export", "plan.json", "--to", "elsewhere"]) == 2


def test_bench_without_a_verb_measures_a_plan(folder, monkeypatch, capsys):
    def measure(*_, **__):
        raise SearchError("only the verb is wanted")

    monkeypatch.setattr(quantizing, "measure", measure)
    for words in ("bench", "bench plan", "bench --rows 2"):
        assert cli.run([*words.split(), "autoq_toy:make", "plan.json"]) == 1
        assert "only the verb is wanted" in capsys.readouterr().err


def test_bench_model_refuses_what_it_cannot_measure_before_a_model_is_loaded(folder, capsys):
    (folder / "some.txt").write_text("Some text.")
    refused = {
        "--plan no-such-scheme": (1, "no-such-scheme"),
        "--plan mine=absent.json": (1, "absent.json"),
        "--picture p.pdf": (1, "p.pdf: a picture's file ends in .png or .svg"),
        "--text absent.txt": (1, "absent.txt: the text must be a readable UTF-8 file"),
        "--batch 1,none": (2, "positive numbers"),
        "--plan a=b.json --plan a=c.json": (2, "distinct NAME=PATH"),
        "--kv-cache int3": (2, "int3"),
    }
    for options, (code, words) in refused.items():
        assert cli.run(["bench", "model", "nothing:here", *options.split()]) == code, options
        printed = capsys.readouterr().err
        assert words in printed
        assert "load 0" not in printed
    assert cli.run(["bench", "model", "autoq_toy:make", "--json", "-"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"]["kind"] == "ModelError"
    assert "the model is a causal language model; got Sequential" in printed.err
