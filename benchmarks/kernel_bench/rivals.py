"""torchao and onnxruntime, in an environment and a process of their own, timed on request.

A child process holds their weights; for every measurement the parent asks it over a pipe, so that its calls lie
between ours in one window.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from autoq.cache.fingerprint import last_level_cache_bytes
from kernel_bench.roofline import Row
from kernel_bench.shapes import Cell

LIBRARIES = ("onnxruntime", "torchao")
# --no-deps: torch and numpy are those of the environment that runs the benchmark, made visible by a .pth file.
_PACKAGES = ("onnxruntime", "torchao==0.18.0", "onnx", "protobuf", "ml_dtypes", "typing_extensions", "flatbuffers")
_SETTLE_S = 3e-3  # idle threads spin this long at most before they leave their core to the other process


class RivalError(RuntimeError):
    """The side environment could not be made, or its process died."""


def make_environment(folder: Path) -> Path:
    """Create the side environment unless it is complete.

    Args:
        folder: of the virtual environment.

    Returns:
        Its Python.

    Raises:
        RivalError: with the end of pip's output.
    """
    python, done = folder / "bin" / "python", folder / ".complete"
    wanted = "\n".join((*_PACKAGES, sys.prefix))
    if done.exists() and done.read_text() == wanted:
        return python
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--no-deps", *_PACKAGES],
    ):
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            raise RivalError(f"{' '.join(command)} failed: {(ran.stderr or ran.stdout)[-2000:]}")
    site = next((folder / "lib").glob("python3.*/site-packages"))
    (site / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done.write_text(wanted)
    return python


class Rivals:
    """No side environment: every cell gets a row per library that says so."""

    def prepare(self, cell: Cell) -> list[tuple[Row, RivalRunner | None]]:
        """The rivals' rows for a cell, and what to time."""
        return [
            ({"scheme": "", "engine": name, "status": "absent", "reason": "measured with --rivals"}, None)
            for name in LIBRARIES
        ]

    def describe(self) -> dict[str, Any]:
        """Library → version."""
        return {}

    def close(self) -> None:
        """End the process, if there is one."""


class RivalProcess(Rivals):
    """The side environment's process.

    Args:
        python: of the side environment.
    """

    def __init__(self, python: Path) -> None:
        script = Path(__file__).with_name("rival_process.py")
        self._child = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        """Send a request and wait for the answer.

        Raises:
            RivalError: if the process has ended.
        """
        if self._child.stdin is None or self._child.stdout is None:
            raise RivalError("the process has no pipes")
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError as problem:
            raise RivalError(f"the rivals' process has ended with {self._child.wait()}") from problem
        answer = self._child.stdout.readline()
        if not answer:
            raise RivalError(f"the rivals' process ended with {self._child.wait()} on {request}")
        return json.loads(answer)

    def prepare(self, cell: Cell) -> list[tuple[Row, RivalRunner | None]]:
        """The rivals' rows for a cell, and what to time."""
        rows = self.ask(do="prepare", cache_bytes=last_level_cache_bytes(), **cell._asdict())
        return [
            (row, RivalRunner(self, number, row.pop("copies")) if row["status"] == "ok" else None)
            for number, row in enumerate(rows)
        ]

    def describe(self) -> dict[str, Any]:
        """Library → version, or why it cannot be used."""
        return dict(self.ask(do="describe"))

    def close(self) -> None:
        """End the process."""
        if self._child.stdin is not None:
            self._child.stdin.close()
        self._child.wait(timeout=30)


class RivalRunner:
    """One of the child's engines."""

    first_us = 0.0

    def __init__(self, process: RivalProcess, number: int, copies: int) -> None:
        self.max_burst = copies
        self._process, self._number = process, number

    def time(self, calls: int) -> float:
        """Microseconds per call, taken in the child once this process's threads are idle."""
        time.sleep(_SETTLE_S)
        found = float(self._process.ask(do="time", number=self._number, calls=calls))
        time.sleep(_SETTLE_S)
        return found
