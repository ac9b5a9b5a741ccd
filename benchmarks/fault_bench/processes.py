"""Child processes forked from one that has imported everything and computed nothing: cheap to kill by the hundred."""

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Say = Callable[[Any], None]
# What changes files, of Python's audit events.
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
_CHANGES |= {"tempfile.mkstemp", "tempfile.mkdtemp", "shutil.rmtree", "fcntl.flock"}


class Child:
    """A forked process that says JSON values, one a line.

    Args:
        work: run in the child with a function that says a value; what it returns is said last, as ``{"result": …}``.
    """

    def __init__(self, work: Callable[[Say], Any]) -> None:
        sys.stdout.flush()
        source, sink = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(source)
            os.setpgid(0, 0)  # what it starts is killed with it
            _run(work, sink)
        os.close(sink)
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)
        self._source = source
        self._open = True
        self._rest = b""
        self.said: list[Any] = []

    def listen(self, seconds: float) -> bool:
        """Take in what is said, until something is or the time is over; False at the end."""
        if self._open and select.select([self._source], [], [], max(0.0, seconds))[0]:
            data = os.read(self._source, 1 << 16)
            if data:
                *lines, self._rest = (self._rest + data).split(b"\n")
                self.said += map(json.loads, lines)
            else:
                self._open = False
                os.close(self._source)
        return self._open

    def kill(self) -> None:
        """kill -9, of whatever it started too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = 600.0) -> int:
        """The exit status, negative for a signal; everything said is in ``said``."""
        until = time.monotonic() + seconds
        while self.listen(until - time.monotonic()):
            if time.monotonic() > until:
                self.kill()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _run(work: Callable[[Say], Any], sink: int) -> None:
    # Threads of a pool do not survive a fork; one thread needs no pool.
    torch.set_num_threads(1)

    def say(value: Any) -> None:
        os.write(sink, json.dumps(value).encode() + b"\n")

    status = 1
    try:
        say({"result": work(say)})
        status = 0
    except BaseException:
        say({"trace": traceback.format_exc()})
    finally:
        os._exit(status)


def call(work: Callable[[Say], Any]) -> Any:
    """What a function returns in a forked process.

    Raises:
        RuntimeError: with the traceback, if it raised.
    """
    child = Child(work)
    status = child.wait()
    last = child.said[-1] if child.said else None
    if not isinstance(last, dict) or "result" not in last:
        trace = last.get("trace") if isinstance(last, dict) else last
        raise RuntimeError(f"the child ended with {status}: {trace}")
    return last["result"]


def die_at_change(number: int) -> Callable[[], int]:
    """Make this process kill itself before its ``number``-th change of a file from now; 0 only counts.

    Returns:
        What tells how many changes there were.
    """
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in _CHANGES:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count


def die_at_byte(number: int) -> None:
    """Make the system kill this process when a file grows beyond ``number`` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))


def files_of(folder: Path) -> dict[str, str]:
    """Relative path → hash of the content, of all files; links by where they lead. Locks hold nothing."""
    import hashlib

    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file() and not name.endswith(".lock"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
