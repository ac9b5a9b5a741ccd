"""kill -9 while files are written: at every change of a file, at every byte, and at random times."""

import contextlib
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fault_bench import processes
from fault_bench.writers import WRITERS, Writer

ROUNDS = 8  # kills on one folder, each going on where the last one left off
MODES = ("change", "byte", "time")


def kill_writer(name: str, scratch: Path, *, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill a writer again and again, and look each time at what is left.

    Args:
        name: of the writer.
        scratch: a folder to work in.
        kills: how many.
        seed: of where the kills fall.

    Returns:
        ``kills``, ``by`` mode, ``lost``: what was finished before a kill and not found after it, ``broken``: what was
        found and is not whole, ``left``: temporary files that the next write did not remove, and what went wrong in
        words.
    """
    writer = WRITERS[name]
    drawn = random.Random(f"{seed} {name}")
    usual = _undisturbed(writer, scratch / "usual")
    result: dict[str, Any] = {"writer": name, "kills": 0, "by": Counter(), "lost": 0, "broken": 0, "left": 0}
    result["problems"] = []
    survived = 0
    while result["kills"] < kills and survived < 20 + kills:
        folder = scratch / f"round-{result['kills']}-{survived}"
        folder.mkdir(parents=True)
        done: list[int] = []
        for _ in range(ROUNDS):
            if result["kills"] == kills:
                break
            mode = MODES[result["kills"] % len(MODES)]
            at = _point(mode, usual, drawn)
            status, said = _killed(writer, folder, max(done, default=0) + 1, mode, at)
            if status not in (-signal.SIGKILL, -signal.SIGXFSZ):
                survived += 1
                if status:
                    result["problems"].append(f"{mode} {at}: the writer failed: {said[-1:]}")
                done += [one for one in said if isinstance(one, int)]
                continue
            result["kills"] += 1
            result["by"][mode] += 1
            done += [one for one in said if isinstance(one, int)]
            _judge(writer, folder, done, f"{mode} {at}", result)
        shutil.rmtree(folder)
    result["by"] = dict(result["by"])
    return result


def _undisturbed(writer: Writer, folder: Path) -> dict[str, float]:
    """What a child's writes take: changes of files, seconds, and the size of the largest file."""
    folder.mkdir(parents=True)

    def work(say: processes.Say) -> dict[str, float]:
        changes, began = processes.die_at_change(0), time.monotonic()
        for version in range(1, writer.writes + 1):
            writer.write(folder, version)
        return {"changes": changes(), "seconds": time.monotonic() - began}

    usual: dict[str, float] = processes.call(work)
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    found = processes.call(lambda say: writer.read(folder))
    assert found == (list(range(1, writer.writes + 1)) if writer.adds else [writer.writes]), f"{writer.name}: {found}"
    shutil.rmtree(folder)
    return usual | {"bytes": largest}


def _point(mode: str, usual: dict[str, float], drawn: random.Random) -> float:
    """A change's number, a byte's, or seconds after the start."""
    if mode == "time":
        return drawn.uniform(0, usual["seconds"])
    return drawn.randrange(1, int(usual["changes"] if mode == "change" else usual["bytes"]) + 1)


def _killed(writer: Writer, folder: Path, version: int, mode: str, at: float) -> tuple[int, list[Any]]:
    """Let a child write, and kill it; returns its exit status and the versions it finished."""

    def work(say: processes.Say) -> None:
        say("ready")
        if mode == "change":
            processes.die_at_change(int(at))
        elif mode == "byte":
            processes.die_at_byte(int(at))
        for one in range(version, version + writer.writes):
            writer.write(folder, one)
            say(one)

    child = processes.Child(work)
    while "ready" not in child.said and child.listen(60.0):
        pass
    if mode == "time":
        until = time.monotonic() + at
        while time.monotonic() < until and child.listen(until - time.monotonic()):
            pass
        child.kill()
    return child.wait(), child.said


def _judge(writer: Writer, folder: Path, done: list[int], point: str, result: dict[str, Any]) -> None:
    """Compare what was finished with what is found, then write once more and see what is left over."""
    try:
        found = processes.call(lambda say: writer.read(folder)) if done else _read_any(writer, folder)
    except RuntimeError as problem:
        result["broken"] += 1
        result["problems"].append(f"{point}, after {len(done)} writes: {problem}")
        return
    last = max(done, default=0)
    finished = set(done) if writer.adds else {last} - {0}
    # The write that the kill hit may have come through: it was just not reported.
    if not (finished <= set(found) or found == [last + 1]) or set(found) - set(done) - {last + 1}:
        result["lost"] += 1
        result["problems"].append(f"{point}: finished {done[-3:]}, found {found[-3:]}")
    next_version = max([*found, last]) + 1

    def work(say: processes.Say) -> list[int]:
        writer.write(folder, next_version)
        return writer.read(folder)

    try:
        after = processes.call(work)
    except RuntimeError as problem:
        result["broken"] += 1
        result["problems"].append(f"{point}, the next write: {problem}")
        return
    if next_version not in after or (writer.adds and not set(found) <= set(after)):
        result["lost"] += 1
        result["problems"].append(f"{point}: the next write gave {after[-3:]}")
    left = [path for path in folder.rglob(".*") if path.suffix in (".tmp", ".new", ".old")]
    result["left"] += len(left)
    result["problems"] += [f"{point}: {path.name} is left over" for path in left]
    for path in left:
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    done[:] = after


def _read_any(writer: Writer, folder: Path) -> list[int]:
    """The versions there; none if nothing was ever written."""

    def work(say: processes.Say) -> list[int]:
        visible = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
        if not visible:
            return []
        try:
            return writer.read(folder)
        except AssertionError:
            raise
        except Exception as problem:
            # Some kinds consist of several files, of which the first write may have made one.
            if "No such file" in str(problem) or "FileNotFound" in str(problem) or "missing" in str(problem):
                return []
            raise

    found: list[int] = processes.call(work)
    return found
