"""Runs a reader in a forked process with little memory, and tells how it ended."""

import resource
from pathlib import Path
from typing import Any

from fault_bench import processes

from autoq.errors import AutoqError
from malicious.readers import Reader

MEMORY_BYTES = 3 << 29  # of address space beyond what the process has; more is a MemoryError
PATIENCE_S = 120.0
OWNED = "OWNED"  # a file that only code run from the attacking file would write


def outcome(reader: Reader, folder: Path) -> dict[str, Any]:
    """Read a folder in a forked process.

    Returns:
        ``how``: ``read``, the class of an AutoqError, or what else happened; ``message``, and of it ``where`` and
        ``fix``; ``peak_bytes``: by which the memory grew at most; ``owned``: whether code from a file ran.
    """
    child = processes.Child(lambda say: attempt(reader, folder))
    limit_hit = child.wait(PATIENCE_S)
    last = child.said[-1] if child.said else {}
    if "result" in last:
        found: dict[str, Any] = last["result"]
    else:
        found = {"how": f"the process ended with {limit_hit}", "message": last.get("trace", ""), "peak_bytes": 0}
    return found | {"owned": any(True for _ in folder.rglob(OWNED))}


def attempt(reader: Reader, folder: Path) -> dict[str, Any]:
    """Read a folder in this process, whose memory stays limited afterwards."""
    before = _memory("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + MEMORY_BYTES, resource.RLIM_INFINITY))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    how, message, where, fix = "read", "", "", ""
    try:
        reader.read(folder)
    except AutoqError as problem:
        how, message, where, fix = type(problem).__name__, str(problem), problem.where, problem.fix
    except BaseException as problem:
        how, message = f"not an AutoqError: {type(problem).__name__}", str(problem)
    return {
        "how": how,
        "message": message[:2000],
        "where": where,
        "fix": fix,
        "peak_bytes": max(0, _memory("VmHWM") - before),
    }


def _memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
