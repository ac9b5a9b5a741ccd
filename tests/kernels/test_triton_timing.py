"""Timing on a GPU, with a stand-in for it whose clock moves by what it is told to run."""

from contextlib import nullcontext
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from autoq_kernels.triton import timing
from autoq_kernels.triton.timing import time_interleaved


class FakeGpu:
    """A device whose clock moves by what is run on it."""

    FLUSH_US = 50

    def __init__(self, uncapturable=()):
        self.now_us = 0.0
        self.log = []
        self.recording = False
        self.uncapturable = uncapturable

    def work(self, name, us):
        def run():
            if self.recording:
                if name in self.uncapturable:
                    raise RuntimeError(f"{name} waits for the device")
                self.log.append(f"record {name}")
                return
            self.log.append(name)
            self.now_us += us() if callable(us) else us

        return run

    def active(self):
        return nullcontext()

    def synchronize(self):
        self.log.append("wait")

    def capture(self, function):
        self.recording = True
        try:
            function()
        finally:
            self.recording = False

        def replay():
            self.log.append("replay")
            function()

        return replay

    def flush(self):
        self.log.append("flush")
        self.now_us += self.FLUSH_US

    def mark(self):
        self.log.append("mark")
        return self.now_us

    def elapsed_us(self, begin, end):
        return end - begin

    def seconds(self):
        return self.now_us / 1e6


def test_rounds_are_interleaved_each_call_replayed_behind_one_flush():
    gpu = FakeGpu()
    times = time_interleaved(
        {"a": gpu.work("a", 10), "b": gpu.work("b", 30)}, budget_s=0, min_rounds=3, max_rounds=9, backend=gpu
    )
    assert times == {"a": [10, 10, 10], "b": [30, 30, 30]}
    call = lambda name: ["flush", "mark", "replay", name, "mark"]  # noqa: E731 - what one timed call does
    one_round = [*call("a"), *call("b"), "wait"]
    assert gpu.log[-3 * len(one_round) :] == 3 * one_round
    before = gpu.log[: -3 * len(one_round)]
    assert "mark" not in before  # warm-up and recording are not timed
    assert "flush" not in before
    assert [one for one in before if one != "wait"] == [
        *("a", "a", "record a", "replay", "a"),
        *("b", "b", "record b", "replay", "b"),
    ]


def test_what_cannot_be_recorded_is_called_and_the_reason_is_logged(caplog):
    gpu = FakeGpu(uncapturable=("b",))
    times = time_interleaved(
        {"a": gpu.work("a", 10), "b": gpu.work("b", 30)}, budget_s=0, min_rounds=2, max_rounds=2, backend=gpu
    )
    assert times == {"a": [10, 10], "b": [30, 30]}
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == "b is timed without a CUDA graph: RuntimeError: b waits for the device"
    timed = " ".join(gpu.log).rpartition("wait flush")[0]
    flushes = " ".join(["flush"] * timing._HEAD_START)
    assert f"mark {flushes} mark b mark" in timed


@pytest.mark.parametrize(("graphs", "recorded"), [(True, "ab"), (False, ""), (["b"], "b"), ([], "")])
def test_graphs_are_tried_for_the_functions_named(graphs, recorded, caplog):
    gpu = FakeGpu()
    runs = {name: gpu.work(name, 10) for name in "ab"}
    time_interleaved(runs, budget_s=0, min_rounds=1, graphs=graphs, backend=gpu)
    assert [one for one in gpu.log if one.startswith("record")] == [f"record {name}" for name in recorded]
    assert not caplog.records


def test_rounds_end_with_the_budget_but_never_before_the_fewest_nor_after_the_most():
    def rounds(budget_s, **limits):
        gpu = FakeGpu()
        runs = {"slow start": gpu.work("a", 50)}
        return len(time_interleaved(runs, budget_s=budget_s, backend=gpu, **limits)["slow start"])

    assert rounds(1000e-6, min_rounds=1, max_rounds=100) == 10  # a flush and a call take 100 µs
    assert rounds(1000e-6, min_rounds=20, max_rounds=100) == 20
    assert rounds(1000e-6, min_rounds=1, max_rounds=4) == 4


def test_every_call_is_kept_so_that_one_slow_call_does_not_move_the_median():
    gpu = FakeGpu()
    pace = iter([0, 0, 0, 10, 11, 500, 12, 9])  # two calls to warm up, one replay, five timed
    times = time_interleaved({"a": gpu.work("a", lambda: next(pace))}, budget_s=0, min_rounds=5, backend=gpu)
    assert times["a"] == [10, 11, 500, 12, 9]
    assert median(times["a"]) == 11


def test_a_function_that_fails_is_not_swallowed():
    def broken():
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        time_interleaved({"a": broken}, budget_s=0, backend=FakeGpu())


def test_the_gpu_is_used_as_torch_documents_it(monkeypatch):
    """With stand-ins for torch.cuda's classes: what they are given and in which order, not what a GPU does."""
    log = []

    class Noted(nullcontext):
        def __init__(self, text):
            super().__init__()
            self.text = text

        def __enter__(self):
            log.append(f"enter {self.text}")

        def __exit__(self, *problem):
            log.append(f"leave {self.text}")

    def event(*, enable_timing):
        return SimpleNamespace(
            record=lambda stream: log.append(f"event on {stream}"),
            elapsed_time=lambda end: 0.25 if enable_timing else 0,
        )

    fakes = {
        "Stream": lambda _: "stream",
        "stream": Noted,
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: log.append("replay")),
        "graph": lambda graph, pool, stream, *, capture_error_mode: Noted(f"recording on {stream} into {pool}"),
        "Event": event,
        "synchronize": lambda _: log.append("wait"),
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=40 << 20),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    backend = timing.CudaBackend("cpu")
    assert backend._filler.nbytes == 80 << 20
    times = time_interleaved({"a": lambda: log.append("a")}, budget_s=0, min_rounds=1, backend=backend)
    assert times == {"a": [250.0]}  # elapsed_time gives milliseconds
    recording = ["enter stream", "enter recording on stream into pool", "a"]
    assert log == [
        *("enter stream", "wait", "a", "a", "wait"),
        *recording, *(one.replace("enter", "leave") for one in reversed(recording[:2])),
        "replay",
        *("event on stream", "replay", "event on stream", "wait", "leave stream"),
    ]  # fmt: skip
