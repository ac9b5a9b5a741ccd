"""kill -9 of whole tunings, each of which goes on with what the one before it left."""

import random
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoq.cache import ProfileCache, SensitivityCache
from autoq.judging import Judge
from autoq.pipeline import tune  # here, not in each child
from autoq.profiler import isolated
from autoq_kernels.cpu import build
from fault_bench import processes

SCHEMES = ("int8wo", "int4wo-hqq(group_size=64)")
PATIENCE_S = 300.0


def kill_tune(scratch: Path, *, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill tunings at random times and before random changes of files.

    Args:
        scratch: a folder to work in.
        kills: how many.
        seed: of where the kills fall.

    Returns:
        ``kills``, ``runs`` that came to their end, ``finished``: measurements reported before a kill, ``lost``: those
        not found by the next run, ``repeated``: those measured again, ``stages`` in which the kills fell, and what went
        wrong in words.
    """
    build.load()  # once, here: loading starts no threads
    drawn = random.Random(f"{seed} tune")
    usual = processes.call(lambda say: _tune(scratch / "usual", say, count=True))
    result: dict[str, Any] = {"kills": 0, "runs": 0, "finished": 0, "lost": 0, "repeated": 0, "stages": {}}
    result |= {"problems": [], "usual_seconds": round(usual["seconds"], 1), "usual_changes": usual["changes"]}
    folder, known, failures = scratch / "round-0", _Known(), 0
    while result["kills"] < kills and failures < 10:
        mode = ("change", "time")[result["kills"] % 2]
        at = drawn.uniform(0, usual["seconds"]) if mode == "time" else drawn.randrange(1, usual["changes"] + 1)
        status, said = _killed(folder, mode, at)
        known.take(said, result, f"kill {result['kills']} ({mode} {at:.2f})")
        if status == -signal.SIGKILL:
            result["kills"] += 1
            stages = [one["stage"] for one in said if "stage" in one]
            stage = stages[-1] if stages else "before the first stage"
            result["stages"][stage] = result["stages"].get(stage, 0) + 1
        elif status == 0:
            result["runs"] += 1
            folder, known = scratch / f"round-{result['runs']}-{failures}", _Known()
        else:
            failures += 1
            result["problems"].append(f"{mode} {at}: the tuning failed: {said[-1:]}")
            folder, known = scratch / f"round-{result['runs']}-{failures}", _Known()
    if result["kills"]:
        status, said = _killed(folder, "", 0)
        known.take(said, result, "the last run")
        result["runs"] += status == 0
        if status:
            result["problems"].append(f"the run after the last kill failed: {said[-1:]}")
    return result


class _Known:
    """What a folder's runs said they had finished."""

    def __init__(self) -> None:
        self.kept: dict[str, set[str]] = {"profile": set(), "scores": set()}
        self.evaluated: set[str] = set()

    def take(self, said: list[dict[str, Any]], result: dict[str, Any], point: str) -> None:
        """Hold what a run found and measured against what earlier ones finished, and add what it finished."""
        before = {kind: set(items) for kind, items in self.kept.items()}
        evaluated, pending = set(self.evaluated), set()
        for one in said:
            if "found" in one:
                lost = before[one["found"]] - set(one["items"])
                self._note(result, "lost", point, lost)
            elif "kept" in one:
                if one["kept"] == "profile":
                    self._note(result, "repeated", point, before["profile"] & set(one["items"]))
                result["finished"] += len(set(one["items"]) - self.kept[one["kept"]])
                self.kept[one["kept"]] |= set(one["items"])
            elif "evaluated" in one:
                self._note(result, "repeated", point, evaluated & {one["evaluated"]})
                pending.add(one["evaluated"])
            elif one.get("stage") == "search":
                result["finished"] += len(pending - self.evaluated)
                self.evaluated |= pending
                pending = set()

    @staticmethod
    def _note(result: dict[str, Any], what: str, point: str, items: Iterable[str]) -> None:
        items = sorted(items)
        result[what] += len(items)
        result["problems"] += [f"{point}: {what} {item}" for item in items[:3]]


def _killed(folder: Path, mode: str, at: float) -> tuple[int, list[dict[str, Any]]]:
    def work(say: processes.Say) -> Any:
        if mode == "change":
            processes.die_at_change(int(at))
        return _tune(folder, say, count=False)

    child = processes.Child(work)
    if mode == "time":
        until = time.monotonic() + at
        while time.monotonic() < until and child.listen(until - time.monotonic()):
            pass
        child.kill()
    return child.wait(PATIENCE_S), child.said


def _tune(folder: Path, say: processes.Say, *, count: bool) -> dict[str, Any]:
    """Tune a small classifier, telling what is found in the caches, what is kept, and what is evaluated."""
    isolated._SECONDS_PER_SHAPE, isolated._MAX_COPIES = 0.0, 2  # times are not judged here
    _listen(ProfileCache, "profile", _measured, say)
    _listen(SensitivityCache, "scores", _scored, say)
    evaluate = Judge.evaluate

    def evaluated(self: Judge, assignment: Any, fidelity: int) -> Any:
        found = evaluate(self, assignment, fidelity)
        say({"evaluated": f"{sorted(assignment.items())} {fidelity}"})
        return found

    Judge.evaluate = evaluated  # type: ignore[method-assign]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 16)).eval()
    changes, began = processes.die_at_change(0) if count else (lambda: 0), time.monotonic()
    found = tune(
        torch.compile(model, backend="eager"),  # type: ignore[arg-type]
        list(torch.randn(4, 16, 128)),
        cache_dir=folder,
        max_increase=0.05,
        candidates=SCHEMES,
        n_trials=6,
        progress=lambda stage, text, done, total: say({"stage": stage, "text": text, "done": done}),
    )
    return {"changes": changes(), "seconds": time.monotonic() - began, "layers": len(found.plan.layers)}


def _listen(cache: type[Any], kind: str, items: Callable[[Any], list[str]], say: processes.Say) -> None:
    append, rows = cache.append, cache.rows

    def kept(self: Any, new: Any) -> None:
        new = list(new)
        append(self, new)
        say({"kept": kind, "items": items(new)})

    def found(self: Any, *arguments: Any, **named: Any) -> Any:
        there = rows(self, *arguments, **named)
        say({"found": kind, "items": items(there)})
        return there

    cache.append, cache.rows = kept, found


def _measured(rows: list[dict[str, Any]]) -> list[str]:
    return [f"M={row['m']} K={row['k']} N={row['n']} {row['dtype']} {row['scheme']}" for row in rows]


def _scored(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['layer']} {row['scheme']} {name}={row[name]}"
        for row in rows
        for name in ("score", "measured")
        if row.get(name) is not None
    ]
