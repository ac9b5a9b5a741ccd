"""The request loop of a worker process: one JSON object a line in, one out, and nothing else on its stdout.

Standard library only: side environments run it by path.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Handler = Callable[[dict[str, Any]], Mapping[str, Any]]


def resident_bytes(peak: bool = False) -> int:
    """Memory of this process now, or its largest so far, in bytes."""
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(key))
    return int(line.split()[1]) * 1024


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answer requests until ``quit`` or the end of stdin.

    Args:
        handlers: name of a request → what answers it; ``memory`` and ``quit`` are answered here.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to stderr
    before = resident_bytes()

    def memory(_: dict[str, Any]) -> dict[str, Any]:
        return {"peak_growth_bytes": resident_bytes(peak=True) - before}

    known = {**handlers, "memory": memory}
    for line in sys.stdin:
        try:
            request = json.loads(line)
            do = request.pop("do")
            if do == "quit":
                return
            if do not in known:
                raise ValueError(f"no such request: {do!r}")
            answer = json.dumps(known[do](request))
        except Exception as problem:
            answer = json.dumps({"error": f"{type(problem).__name__}: {problem}"})
        answers.write(answer + "\n")
