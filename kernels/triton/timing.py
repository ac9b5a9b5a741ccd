"""Times of work on a GPU: CUDA events around graph replays, with a cold L2, functions in turn.

What is timed is the device alone. A function is recorded into a CUDA graph, so that the launches of its kernels
follow each other without waiting for Python, as they do in a model compiled with CUDA graphs. One that cannot be
recorded is timed as it is called; then each call is given a head start by flushing several times, during which the
host queues its launches, but a long sequence of small kernels may still show the host's pace.

Before every timed call the L2 is filled with other data: a layer of a model finds its weight in memory, not in the L2.
The filler is written, which evicts everything, then read, which leaves the L2 clean: otherwise the timed
kernel's loads would wait for the filler's lines to be written back. A cold call cannot be repeated within
one measurement, so a time is as fine as the events that bracket it: about 0.5 µs. Quote medians of many calls, and
no small difference between products of less than 20 µs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

_log = logging.getLogger(__name__)
_WARM_UP = 2  # calls before the first timed one: compilation, allocation, clocks
_HEAD_START = 4  # flushes before a call that is not recorded: some 0.2 ms in which the host gets ahead
_LEAST_FLUSH_BYTES = 64 << 20  # where the driver tells no L2 size
_HIP_FLUSH_BYTES = 512 << 20  # AMD's driver does not tell of the cache behind the L2, of up to 256 MiB


class Backend(Protocol):
    """What timing needs of a device."""

    def active(self) -> AbstractContextManager[object]:
        """Entered once around everything: chooses the device and its stream."""

    def synchronize(self) -> None:
        """Wait for all that is queued."""

    def capture(self, function: Callable[[], object]) -> Callable[[], object]:
        """Record what a function queues; returns what replays it. Raises where it cannot be recorded."""

    def flush(self) -> None:
        """Queue work after which the L2 holds nothing that the functions read."""

    def mark(self) -> Any:
        """Queue a time stamp."""

    def elapsed_us(self, begin: Any, end: Any) -> float:
        """Microseconds between two marks that the device has passed."""

    def seconds(self) -> float:
        """The host's clock."""


class CudaBackend:
    """A GPU that torch can use, NVIDIA's or AMD's.

    Args:
        device: which.
        flush_bytes: written and read before each timed call; None: twice the L2.
    """

    def __init__(self, device: torch.device | str | int, flush_bytes: int | None = None) -> None:
        self._device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()  # one for all graphs: no result is looked at, so they may share
        if flush_bytes is None:
            least = _LEAST_FLUSH_BYTES if torch.version.hip is None else _HIP_FLUSH_BYTES
            flush_bytes = max(2 * l2_bytes(self._device), least)
        self._filler = torch.empty(flush_bytes // 4, dtype=torch.float32, device=self._device)
        self._sum = torch.empty((), dtype=torch.float32, device=self._device)

    def active(self) -> AbstractContextManager[object]:
        """A stream of its own: recording is not possible on the default one."""
        context: AbstractContextManager[object] = torch.cuda.stream(self._stream)
        return context

    def synchronize(self) -> None:
        """Wait for the whole device."""
        torch.cuda.synchronize(self._device)

    def capture(self, function: Callable[[], object]) -> Callable[[], object]:
        """Record a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        # torch's context leaves its stream current when the end of a recording fails; the outer one puts ours back.
        # What other threads of the process do on the GPU meanwhile is no reason to fail.
        recording = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        with torch.cuda.stream(self._stream), recording:
            function()
        return graph.replay

    def flush(self) -> None:
        """Write and read the filler."""
        self._filler.zero_()
        torch.sum(self._filler, dim=0, out=self._sum)

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def elapsed_us(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Between two events, which know it to about 0.5 µs."""
        return float(begin.elapsed_time(end)) * 1000

    def seconds(self) -> float:
        """Seconds of ``time.perf_counter``."""
        return time.perf_counter()


def l2_bytes(device: torch.device | str | int = "cuda") -> int:
    """The size of the GPU's last cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def time_interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    device: torch.device | str | int = "cuda",
    graphs: bool | Collection[str] = True,
    flush_bytes: int | None = None,
    min_rounds: int = 5,
    max_rounds: int = 200,
    backend: Backend | None = None,
) -> dict[str, list[float]]:
    """Time functions in turn, A B C A B C …, after two untimed calls of each.

    Args:
        functions: name → what to time; it queues work on the current stream and waits for nothing.
        budget_s: rounds go on until this much time has passed; warm-up and recording are not counted.
        device: that the functions run on.
        graphs: True: record every function into a CUDA graph, and call those that cannot be; or the names of those
            to try. A recording that fails costs a warning, so leave out what is known to wait for the device.
        flush_bytes: written and read before each timed call; None: twice the L2.
        min_rounds: rounds taken whatever the budget.
        max_rounds: never more than these.
        backend: instead of the device's own.

    Returns:
        Name → microseconds of every timed call, in order.
    """
    used = CudaBackend(device, flush_bytes) if backend is None else backend
    times: dict[str, list[float]] = {name: [] for name in functions}
    with used.active():
        used.synchronize()
        runs = {name: _ready(used, name, function, graphs) for name, function in functions.items()}
        started = used.seconds()
        for done in range(1, max_rounds + 1):
            marks = {name: _timed(used, *run) for name, run in runs.items()}
            used.synchronize()
            for name, (begin, end) in marks.items():
                times[name].append(used.elapsed_us(begin, end))
            if done >= min_rounds and used.seconds() - started >= budget_s:
                break
    return times


def _ready(
    backend: Backend, name: str, function: Callable[[], object], graphs: bool | Collection[str]
) -> tuple[Callable[[], object], int]:
    """What a timed call calls, warmed up, and the flushes before it."""
    for _ in range(_WARM_UP):
        function()
    backend.synchronize()
    if not (graphs if isinstance(graphs, bool) else name in graphs):
        return function, _HEAD_START
    try:
        replay = backend.capture(function)
    except Exception as problem:  # whatever a function does that cannot be recorded: it is timed without
        _log.warning("%s is timed without a CUDA graph: %s: %s", name, type(problem).__name__, problem)
        backend.synchronize()
        return function, _HEAD_START
    replay()  # the first replay uploads the graph
    return replay, 1


def _timed(backend: Backend, run: Callable[[], object], flushes: int) -> tuple[Any, Any]:
    """One call behind a cold L2; the marks around it."""
    for _ in range(flushes):
        backend.flush()
    begin = backend.mark()
    run()
    return begin, backend.mark()
