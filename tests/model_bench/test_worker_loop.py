"""The request loop of workers, run as they are: by path, in a process of its own, with the standard library only.

The workers of llama.cpp and OpenVINO need the side environment of ``make peers`` and are not tested here.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import autoq.model_bench

LOOP = Path(autoq.model_bench.__file__).parent
PROGRAM = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from worker_loop import serve

def double(request):
    return {"twice": 2 * request["value"]}

def chatter(request):
    print("printed by Python", flush=True)
    os.system("echo printed by a child")
    os.write(1, b"written below Python\\n")
    return {"done": True}

def grow(request):
    kept = bytearray(request["bytes"])
    kept[:] = b"1" * len(kept)
    return {}

def odd(request):
    return {"value": object()}

serve({"double": double, "chatter": chatter, "grow": grow, "odd": odd})
"""


def talk(*lines):
    """The worker's answers to lines of text, and how it ended."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM, str(LOOP)],
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done


def ask(do, **details):
    return json.dumps({"do": do, **details})


def test_each_request_gets_one_line_in_order():
    answers, done = talk(ask("double", value=2), ask("double", value=5))
    assert answers == [{"twice": 4}, {"twice": 10}]
    assert done.returncode == 0


def test_what_is_printed_does_not_reach_the_answers():
    answers, done = talk(ask("chatter"), ask("double", value=1))
    assert answers == [{"done": True}, {"twice": 2}]
    for words in ("printed by Python", "printed by a child", "written below Python"):
        assert words in done.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (ask("double"), "KeyError: 'value'"),
        (ask("fly"), "no such request: 'fly'"),
        ("{}", "KeyError: 'do'"),
        ("not JSON", "JSONDecodeError"),
        ("[1]", "TypeError"),
        (ask("odd"), "not JSON serializable"),
    ],
)
def test_a_failure_is_an_answer_and_the_worker_lives_on(line, words):
    answers, _ = talk(line, ask("double", value=3))
    assert words in answers[0]["error"]
    assert answers[1:] == [{"twice": 6}]


def test_a_line_break_in_an_error_does_not_break_the_line():
    answers, _ = talk(ask("fly\nhigh"), ask("double", value=3))
    assert len(answers) == 2


def test_quit_ends_it_before_what_follows():
    answers, done = talk(ask("double", value=1), ask("quit"), ask("double", value=2))
    assert answers == [{"twice": 2}]
    assert done.returncode == 0


def test_memory_is_the_peak_since_the_start_even_after_it_was_freed():
    size = 64 << 20
    answers, _ = talk(ask("memory"), ask("grow", bytes=size), ask("memory"))
    before, after = answers[0]["peak_growth_bytes"], answers[2]["peak_growth_bytes"]
    assert before < size // 2
    assert size <= after < 3 * size
