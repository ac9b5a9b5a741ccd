"""A worker process of one engine, seen from the parent: requests and answers of one JSON line, stopping, its end.

A worker dies with the parent, however that ends, even while it is stopped: the system kills it (``PR_SET_PDEATHSIG``).
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from autoq.errors import AutoqError

ANSWER_S = 1800.0  # the longest wait for an answer: compiling and exporting take minutes
_QUIT_S = 5.0
_TAIL = 2000  # characters of what a worker said before it died
# Before the engine's program: the system is asked to kill it when the parent ends; execv keeps that.
_LAUNCH = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"
    "if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])\n"
)


class WorkerError(AutoqError):
    """A worker refused a request, or is gone.

    Attributes:
        gone: whether the process ended.
    """

    gone = False


class Worker:
    """One engine's process.

    Args:
        name: of the engine, for messages.
        command: the program and its arguments; the program is an absolute path.
        environment: of the process; None for the parent's.
    """

    def __init__(self, name: str, command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the worker)
        self._buffer = b""
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _LAUNCH, str(os.getpid()), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            start_new_session=True,  # Ctrl-C reaches the parent only, which ends its workers
            env=None if environment is None else dict(environment),
        )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def ask(self, do: str, *, timeout_s: float = ANSWER_S, **details: Any) -> dict[str, Any]:
        """Send a request and wait for its answer; the worker runs only meanwhile.

        Args:
            do: what to do.
            timeout_s: a worker that takes longer is ended.
            details: the request's other fields.

        Raises:
            WorkerError: with the worker's words, if it could not; or with what is known of its end.
        """
        line = json.dumps({"do": do, **details}) + "\n"
        try:
            assert self._process.stdin is not None
            self.resume()
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
            answer = self._answer(time.monotonic() + timeout_s)
        except (BrokenPipeError, EOFError) as problem:
            raise self._gone(do) from problem
        finally:
            self.stop()
        if "error" in answer:
            raise WorkerError(f"the engine must answer {do!r}", where=self.name, got=str(answer["error"]))
        return answer

    def _answer(self, deadline: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not waiting.select(max(0.0, deadline - time.monotonic())):
                    self.end()
                    raise EOFError
                part = os.read(self._process.stdout.fileno(), 1 << 20)
                if not part:
                    raise EOFError
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            self.end()
            raise EOFError
        return found

    def _gone(self, do: str) -> WorkerError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_QUIT_S)
        self.end()
        self._words.seek(0, os.SEEK_END)
        self._words.seek(max(0, self._words.tell() - _TAIL))
        said = self._words.read().decode(errors="replace").strip().splitlines()
        code = self._process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        problem = WorkerError(
            f"the engine's process must live through {do!r}",
            where=self.name,
            got=f"its end ({how}){': ' + said[-1] if said else ''}",
        )
        problem.gone = True
        return problem

    def stop(self) -> None:
        """Let the process and its children rest: no time, no memory traffic."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self.alive:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def end(self) -> None:
        """End the process and its children at once."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
