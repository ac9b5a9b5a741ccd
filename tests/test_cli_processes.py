"""The command line as a process of its own: Ctrl-C, shell completion, and what a pipe reads."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import autoq

ROOT = Path(autoq.__file__).parents[1]
DEADLINE_S = 120
TOY = """
import time
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    return model, [torch.randn(4, 64) for _ in range(4)]

def hang():
    print("making", flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def start(tmp_path):
    """Starts autoq in an empty folder with a module that makes models."""
    (tmp_path / "autoq_toy.py").write_text(TOY)
    started = []

    def begin(*arguments, **environment):
        known = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        command = [sys.executable, "-m", "autoq", *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=known, text=True, **streams))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def until(stream, word):
    """Read lines until one has the word."""
    for line in stream:
        if word in line:
            return
    pytest.fail(f"{word} was never said")


def interrupted(process):
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    return out, err


def test_ctrl_c_while_times_are_measured_stops_and_says_how_to_go_on(start, tmp_path):
    process = start("tune", "autoq_toy:make", "--cache-dir", "my cache", "--output", "out")
    until(process.stderr, " profile ")
    out, err = interrupted(process)
    assert out == ""
    assert err.splitlines()[-2:] == [
        "Stopped. All measurements so far are kept in my cache.",
        "To go on: autoq tune autoq_toy:make --cache-dir 'my cache' --output out",
    ]
    assert shlex.split(err.splitlines()[-1])[-4:] == ["--cache-dir", "my cache", "--output", "out"]
    assert not (tmp_path / "out").exists()


def test_ctrl_c_while_a_model_is_loaded_is_an_error_for_machines(start):
    process = start("eval", "autoq_toy:hang", "--json")
    until(process.stdout, "making")
    out, err = interrupted(process)
    assert json.loads(out) == {"error": {"message": "Stopped. Nothing was written.", "kind": "Stopped"}}
    assert err.splitlines()[-1] == "To go on: autoq eval autoq_toy:hang --json"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("autoq ex", ["plain,explain", "plain,export"]),
        ("autoq export plan.json --to ", ["plain,torchao", "plain,gptqmodel", "plain,llama.cpp"]),
        ("autoq eval autoq_t", ["file,autoq_t"]),
        ("autoq tune --max-d", ["plain,--max-degradation"]),
    ],
)
def test_shells_complete_verbs_options_choices_and_files(start, words, offered):
    at = len(words.split(" ")) - 1
    process = start(_AUTOQ_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(at))
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (out.split(), err, process.returncode) == (offered, "", 0)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_of_a_shell_is_printed(start, shell):
    process = start(_AUTOQ_COMPLETE=f"{shell}_source")
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert f"_AUTOQ_COMPLETE={shell}_complete" in out
    assert f"_AUTOQ_COMPLETE={shell}_source autoq" in (ROOT / "docs" / "command-line.md").read_text()
