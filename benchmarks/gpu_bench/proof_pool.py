"""Compiling in child processes, which may crash, with results kept in files.

A compiler that fails an assertion takes its process along, so each worker has one child, started again when it dies.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu_bench.proof_compile import Job

LONGEST_S = 300  # one compilation
Row = dict[str, Any]


def run(
    jobs: Iterable[tuple[str, Job, bool]],
    *,
    processes: int,
    cache: Path | None,
    progress: Callable[[str, Row, bool], None],
    seconds: float = math.inf,
) -> None:
    """Compile and inspect each job.

    Args:
        jobs: (hash, job, whether to disassemble).
        processes: how many at a time.
        cache: folder with a file for each result that is no error; they are not made again. None keeps nothing.
        progress: called with each hash, row (see `inspected`; ``error`` where that failed) and whether it was kept.
        seconds: after which nothing is begun: of the rest only what was kept is reported.
    """
    waiting = list(jobs)
    end = time.monotonic() + seconds
    lock = threading.Lock()

    def work() -> None:
        child: _Child | None = None
        while True:
            with lock:
                if not waiting:
                    break
                key, one, disassemble = waiting.pop(0)
            path = cache / f"{key}.json" if cache else None
            if path and path.exists():
                row, kept = json.loads(path.read_text()), True
            elif time.monotonic() >= end:
                continue
            else:
                child = child or _Child()
                row, kept = child.result(one, disassemble), False
                if not child.alive:
                    child = None
                if path and "error" not in row:
                    _write(path, row)
            with lock:
                progress(key, row, kept)
        if child:
            child.stop()

    threads = [threading.Thread(target=work) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _write(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    partial.write_text(json.dumps(row))
    partial.replace(path)


class _Child:
    """A process that compiles."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, sys.path), daemon=True)
        self._process.start()
        there.close()
        self.alive = True

    def result(self, one: Job, disassemble: bool) -> Row:
        try:
            self._here.send((one, disassemble))
            if not self._here.poll(LONGEST_S):
                return self._ended(f"took longer than {LONGEST_S} s")
            return self._here.recv()
        except (EOFError, OSError):
            self._process.join()
            return self._ended(f"the compiler ended its process with code {self._process.exitcode}")

    def _ended(self, reason: str) -> Row:
        self._process.kill()
        self._process.join()
        self.alive = False
        return {"error": reason}

    def stop(self) -> None:
        self._here.close()
        self._process.join()


def _serve(pipe: Connection, path: list[str]) -> None:
    """Compile what comes until the pipe is closed."""
    sys.path[:] = path
    os.environ.pop("TRITON_INTERPRET", None)  # this process is for compiling
    with tempfile.TemporaryFile("w+") as noise:
        os.dup2(noise.fileno(), 2)  # LLVM and ptxas print there why they failed
        while True:
            try:
                one, disassemble = pipe.recv()
            except EOFError:
                return
            noise.seek(0)
            noise.truncate()
            started = time.monotonic()
            row = _row(one, disassemble, noise)
            pipe.send(row | {"seconds": round(time.monotonic() - started, 2)})


def _row(one: Job, disassemble: bool, noise: Any) -> Row:
    with contextlib.suppress(ImportError):
        importlib.import_module("torch")
    from gpu_bench.proof_compile import compiled
    from gpu_bench.proof_inspect import inspected

    try:
        return inspected(compiled(one), disassemble=disassemble)
    except Exception as problem:  # whatever a compiler raises is this row's result
        while problem.__cause__:
            problem = problem.__cause__
        noise.flush()
        noise.seek(0)
        printed = noise.read()[-600:]
        last = traceback.extract_tb(problem.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno} {last.line}"
        return {"error": f"{type(problem).__name__}: {str(problem)[-600:]} ({where}) {printed}".strip()}
