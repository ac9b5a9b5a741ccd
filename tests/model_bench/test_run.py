"""Whole runs: in real processes of PyTorch on a tiny model, and with workers that only answer."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import autoq
from autoq.errors import InputError
from autoq.model_bench import Job, Missing, run
from autoq.model_bench.breakdown import REST
from autoq.model_bench.protocol import Worker, WorkerError

NAMES = ("bf16-eager", "bf16-compiled", "autoq-int8wo")
FIELDS = {"engine", "plan", "phase", "batch", "context", "time_ms", "tokens_per_s", "perplexity", "weight_bytes"}
BANDWIDTH = '{"gb_s": 20.0, "device": "a machine"}'
METER = (sys.executable, "-c", f"import sys; [print({BANDWIDTH!r}, flush=True) for _ in sys.stdin]")


def job(engines, **changes):
    settings = {"prompts": {1: [[1, 2, 3, 4]]}, "rows": [[1, 2, 3]], "steps": 2, "rounds": 3, "passes": 0}
    return Job(engines=engines, **settings | {"facts": {}, "meter": METER} | changes)


def test_every_engine_has_a_row_for_each_phase(ran):
    _, report = ran
    assert report.failed == []
    found = {(row["engine"], row["phase"], row["batch"]) for row in report.rows}
    assert found == {(name, phase, 2) for name in NAMES for phase in ("prefill", "decode")}
    for row in report.rows:
        assert set(row) >= FIELDS
        assert 0 < row["low_ms"] <= row["time_ms"] <= row["high_ms"]
        assert row["context"] == 24
        tokens = 2 if row["phase"] == "decode" else 48
        assert row["tokens_per_s"] == pytest.approx(1000 * tokens / row["time_ms"])
        assert row["peak_mb"] > 0
        assert row["measurements"] == (2 if row["phase"] == "prefill" else 6)


def test_bytes_are_those_of_the_model(ran, toy):
    model = toy[1].model
    size = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    for row in ran[1].rows:
        assert row["weight_bytes"] == size if row["plan"] == "none" else row["weight_bytes"] < 0.7 * size
        assert row["kv_bytes"] == 2 * 24 * 2 * 2 * 16 * 4  # rows, tokens, keys and values, heads, size, bytes


def test_the_perplexity_is_that_of_the_library(ran, toy):
    expected = autoq.perplexity(toy[1].model, toy[1].batches)
    for row in ran[1].rows:
        assert row["perplexity"] == pytest.approx(expected, rel=1e-5 if row["plan"] == "none" else 0.02)


def test_missing_engines_are_named(ran):
    assert ran[1].to_json()["missing"] == [{"name": "llamacpp-Q4_0", "reason": "make peers"}]


def test_the_order_rotates(ran):
    assert ran[1].order == [[*NAMES[1:], NAMES[0]], [NAMES[2], *NAMES[:2]]]


def test_the_parts_add_up_to_the_wall_time(ran):
    found = ran[1].breakdowns
    assert {(one["engine"], one["phase"]) for one in found} == {
        (name, phase) for name in NAMES for phase in ("prefill", "decode")
    }
    for one in found:
        assert sum(one["parts"].values()) == pytest.approx(one["wall_ms"])
        assert min(one["parts"].values()) >= -1e-9
        assert one["parts"]["attention"] > 0
        assert REST in one["parts"]


def test_the_report_is_saved_whole(ran, tmp_path):
    file = tmp_path / "rows.json"
    ran[1].save(file)
    found = json.loads(file.read_text())
    assert found["schema"] == 1
    assert len(found["rows"]) == 6
    assert found["threads"] == 1
    assert found["bandwidth_gb_s"] > 0


def test_engines_are_measured_in_turn(fake, tmp_path):
    report = run(job([fake("a"), fake("b"), fake("c")]))
    asked = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    begin = next(at for at, line in enumerate(asked) if line[1] == "prefill")
    assert asked[:begin] == [[name, do] for name in "abc" for do in ("load", "losses")]
    rounds = ["abc", "bca", "cab", "abc"]
    turns = [[name, do] for one in rounds for name in one for do in ("prefill", "decode")]
    assert asked[begin:] == turns + [[name, "memory"] for name in "abc"]
    assert [row["time_ms"] for row in report.rows] == [20.0, 1.0] * 3
    assert report.rows[0]["perplexity"] == pytest.approx(7.389056)
    assert report.rows[1]["bandwidth_share"] == pytest.approx((1000 + 10 * 5) / 1e-3 / 20e9)
    assert report.facts["device"] == "a machine"


def test_engines_of_one_model_share_their_losses(fake, tmp_path):
    report = run(job([replace(fake(name), judged="same") for name in "ab"] + [fake("c")]))
    asked = (tmp_path / "log").read_text().splitlines()
    assert [line for line in asked if line.endswith("losses")] == ["a losses", "c losses"]
    assert {row["perplexity"] for row in report.rows} == {report.rows[0]["perplexity"]}


def test_only_the_engine_that_is_measured_runs(fake):
    worker = Worker("one", fake("one").command)
    try:
        worker.ask("load")
        assert _state(worker.pid) == "T"
        worker.resume()
        assert _state(worker.pid, "S") == "S"
    finally:
        worker.end()
    assert not worker.alive


def _state(pid, wanted="T"):
    """Of a process, once it is the one wanted; the kernel takes a moment."""
    for _ in range(500):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state == wanted:
            break
        time.sleep(0.01)
    return state


@pytest.mark.parametrize("do", ["load", "losses", "prefill", "decode", "memory"])
def test_an_engine_that_dies_is_reported_and_the_others_go_on(fake, do):
    report = run(job([fake("lost", dies=do), fake("kept")]))
    assert [one["engine"] for one in report.rows] == ["kept", "kept"]
    (failure,) = report.failed
    assert failure == Missing(name="lost", reason=f"{do}: its end (exit code 7): out of luck")


def test_an_engine_that_cannot_do_one_thing_does_the_others(fake):
    report = run(job([fake("odd", refuses="decode"), fake("mute", refuses="losses"), fake("no", refuses="load")]))
    found = [(row["engine"], row["phase"], row["perplexity"] is None) for row in report.rows]
    assert found == [("odd", "prefill", False), ("mute", "prefill", True), ("mute", "decode", True)]
    assert {(one.name, one.reason) for one in report.failed} == {
        ("odd", "decode: no"),
        ("mute", "losses: no"),
        ("no", "load: no"),
    }


def test_a_program_that_does_not_exist_is_reported(fake):
    report = run(job([replace(fake("gone"), command=("/nowhere/python",)), fake("kept")]))
    assert [one.name for one in report.failed] == ["gone"]
    assert {row["engine"] for row in report.rows} == {"kept"}


def test_an_answer_that_takes_too_long_ends_the_worker():
    worker = Worker("slow", (sys.executable, "-c", "import time; time.sleep(600)"))
    with pytest.raises(WorkerError, match="must live through 'load'"):
        worker.ask("load", timeout_s=0.2)
    assert not worker.alive


def test_words_that_are_no_answer_end_the_worker():
    worker = Worker("odd", (sys.executable, "-c", "input(); print('loading…'); input()"))
    with pytest.raises(WorkerError, match="must live through 'load'"):
        worker.ask("load")
    assert not worker.alive


PARENT = """
import sys, time
from autoq.model_bench.protocol import Worker

echo = "import sys; [print('{}', flush=True) for _ in sys.stdin]"
worker = Worker("one", (sys.executable, "-c", echo))
worker.ask("load")
print(worker.pid, flush=True)
time.sleep(600)
"""


def test_stopped_workers_die_with_their_parent():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert _state(pid) == "T"
        parent.send_signal(signal.SIGKILL)
    for _ in range(500):
        if not _lives(pid):
            break
        time.sleep(0.01)
    assert not _lives(pid)


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_interrupting_ends_every_worker(fake):
    def children():
        return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))

    pids, before = set(), children()

    def stop(stage, *_):
        if stage == "measure":
            pids.update(children() - before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job([fake("a"), fake("b")]), stop)
    assert len(pids) >= 3  # with the one that measures the memory
    assert not any(_lives(pid) for pid in pids)


CONVERTS = """
import json, pathlib, sys

for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "convert":
        with pathlib.Path(request["target"]).open("a") as made:
            made.write(request["type"])
    print(json.dumps({"weight_bytes": 1, "seconds": 0.1}), flush=True)
"""


def test_a_run_that_is_stopped_after_a_round_reports_what_it_has(fake):
    def stop(stage, text, done, total):
        if stage == "measure" and done == 2:
            raise KeyboardInterrupt

    report = run(job([fake("a"), fake("b")], rounds=5), stop)
    assert (report.facts["rounds"], report.facts["rounds_wanted"]) == (1, 5)
    assert len(report.order) == 2
    assert {row["engine"]: row["measurements"] for row in report.rows if row["phase"] == "prefill"} == {"a": 1, "b": 1}


def test_slow_steps_are_fewer(fake):
    report = run(job([fake("slow", step=0.4), fake("slower", step=9.0), fake("quick")], rounds=2, steps=16))
    counts = {row["engine"]: row["measurements"] for row in report.rows if row["phase"] == "decode"}
    assert counts == {"slow": 10, "slower": 8, "quick": 32}


def test_converted_files_are_made_once(fake, tmp_path):
    target = tmp_path / "deep" / "made"
    engine = replace(
        fake("x"),
        command=(sys.executable, "-c", CONVERTS),
        convert={"source": "a", "target": str(target), "type": "Q8_0"},
        phases=("prefill",),
    )
    for _ in range(2):
        report = run(job([engine], rows=[]))
        assert [one.reason.partition(":")[0] for one in report.failed] == ["memory"]  # it answers something else
        assert target.read_text() == "Q8_0"
        assert [path.name for path in target.parent.iterdir()] == ["made"]


@pytest.mark.parametrize("change", [{"steps": 0}, {"rounds": 0}, {"prompts": {}}, {"prompts": {2: [[1], [1, 2]]}}])
def test_a_job_that_measures_nothing_is_refused(change):
    with pytest.raises(InputError):
        job([], **change)
