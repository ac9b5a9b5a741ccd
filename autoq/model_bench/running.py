"""Runs the engines: loads one after the other, takes their losses, and then measures all of them in turn.

In a round each engine is measured once; only it runs, the others' processes are stopped. The order rotates from round
to round, and the first round, in which graphs are compiled, does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from autoq.errors import InputError
from autoq.model_bench.engine import DECODE, OWN_WORKER, PREFILL, Engine, Missing
from autoq.model_bench.protocol import Worker, WorkerError
from autoq.model_bench.rows import Found, Report, rows_of

Progress = Callable[[str, str, int, int], None]
Tokens = Sequence[Sequence[int]]
_MOST_S = 2.0  # of decode steps in an engine's turn, once it is known how long one takes
_LEAST_STEPS = 4
_ANSWERS = {"losses": "losses", PREFILL: "seconds", DECODE: "seconds", "memory": "peak_growth_bytes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is measured.

    Attributes:
        engines: started.
        missing: named in the report.
        prompts: batch → tokens [batch][context].
        rows: tokens [rows][length] of the losses; may be empty.
        steps: decode steps of each round, at most; an engine whose steps are slow takes fewer.
        rounds: that count.
        threads: of each engine.
        passes: of each breakdown; 0 for none.
        meter: starts the worker that measures the memory's bandwidth.
        facts: for the report.
    """

    engines: Sequence[Engine]
    missing: Sequence[Missing] = ()
    prompts: Mapping[int, Tokens]
    rows: Tokens
    steps: int = 32
    rounds: int = 5
    threads: int = 1
    passes: int = 8
    meter: tuple[str, ...] = OWN_WORKER
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        counts = {"steps": self.steps, "rounds": self.rounds, "threads": self.threads}
        for name, value in counts.items():
            if value < 1:
                raise InputError(f"{name} is at least 1", got=value)
        if not self.prompts or len({len(row) for prompt in self.prompts.values() for row in prompt}) != 1:
            raise InputError("there is a prompt for each batch, all of one length")

    @property
    def context(self) -> int:
        """Tokens of a prompt."""
        return len(next(iter(self.prompts.values()))[0])


def run(job: Job, progress: Progress | None = None) -> Report:
    """Measure.

    Args:
        job: what.
        progress: called with (stage, text, done, total).

    Returns:
        The report; engines that failed are named in it.
    """
    return _Run(job, progress or (lambda *_: None)).report()


class _Run:
    def __init__(self, job: Job, progress: Progress) -> None:
        self.job = job
        self.say = progress
        self.failed: list[Missing] = []
        self.found: dict[str, Found] = {}
        self.losses: dict[str, list[float]] = {}
        self.workers: dict[str, Worker] = {}
        self.order: list[list[str]] = []
        self.bandwidth: list[float] = []
        self.machine: dict[str, Any] = {}
        self.step_s: dict[tuple[str, int], float] = {}  # engine and batch → a decode step in the first round
        self.rounds = 0  # that count, and are complete

    def report(self) -> Report:
        """Do everything; what a Ctrl-C stops after a round that counts is reported as far as it went."""
        with ExitStack() as ending:
            meter = self._meter(ending)
            for done, engine in enumerate(self.job.engines):
                self.say("load", engine.name, done, len(self.job.engines))
                self._load(engine, done, ending)
            self.say("load", "", len(self.job.engines), len(self.job.engines))
            try:
                for number in range(self.job.rounds + 1):
                    self._round(number, meter)
                    self.rounds = number
                self.say("measure", "", self.job.rounds + 1, self.job.rounds + 1)
                self._memory()
                self._break_down()
            except KeyboardInterrupt:
                if self.rounds == 0:
                    raise
                return self._summed_up(stopped=True)
        return self._summed_up()

    def _meter(self, ending: ExitStack) -> Worker:
        """A process that measures the memory's bandwidth in each round."""
        worker = Worker("bandwidth", self.job.meter)
        ending.callback(worker.end)
        return worker

    def _load(self, engine: Engine, done: int, ending: ExitStack) -> None:
        try:
            _convert(engine)
            worker = Worker(engine.name, engine.command)
            ending.callback(worker.end)
            found = Found(engine=engine)
            names = {"kernel_names": True} if engine.own and self.job.passes else {}
            found.loaded = worker.ask("load", threads=self.job.threads, **names, **engine.load)
        except (WorkerError, OSError) as problem:
            self._note(engine.name, "load", problem)
            return
        self.workers[engine.name], self.found[engine.name] = worker, found
        judged = engine.judged or engine.name
        if self.job.rows and judged not in self.losses:
            self.say("load", f"{engine.name}: perplexity", done, len(self.job.engines))
            answer = self._ask(engine.name, "losses", rows=self.job.rows)
            if answer is not None:
                self.losses[judged] = answer["losses"]
        found.losses = self.losses.get(judged, [])

    def _ask(self, name: str, do: str, **details: Any) -> dict[str, Any] | None:
        """An answer; None after noting a failure. What a dead worker measured before does not count."""
        try:
            found = self.workers[name].ask(do, **details)
            if _ANSWERS[do] not in found:
                raise WorkerError(f"an answer to {do!r} has {_ANSWERS[do]!r}", where=name, got=f"only {sorted(found)}")
            return found
        except WorkerError as problem:
            self._note(name, do, problem)
            if problem.gone:
                del self.workers[name]
                self.found[name].seconds.clear()
            return None

    def _note(self, name: str, do: str, problem: Exception) -> None:
        got = getattr(problem, "got", None)
        self.failed.append(Missing(name=name, reason=f"{do}: {problem if got is None else got}"))

    def _round(self, number: int, meter: Worker) -> None:
        names = list(self.workers)
        turn = number % max(1, len(names))
        names = names[turn:] + names[:turn]
        if number:
            self.order.append(names)
        for place, name in enumerate(names):
            text = f"{name}{'' if number else ' (compiles)'}, {place + 1} of {len(names)}"
            self.say("measure", text, number, self.job.rounds + 1)
            self._turn(name, counts=number > 0)
        answer = meter.ask("bandwidth", threads=self.job.threads)
        self.bandwidth.append(answer.pop("gb_s"))
        self.machine = answer

    def _turn(self, name: str, *, counts: bool) -> None:
        """One engine's prefill and decode steps, for each batch."""
        found = self.found[name]
        for batch, tokens in self.job.prompts.items():
            for phase in found.engine.phases:
                key = (phase, batch)
                if name not in self.workers or (counts and key not in found.seconds):
                    continue
                more = {"steps": self._steps(name, batch)} if phase == DECODE else {}
                answer = self._ask(name, phase, tokens=tokens, **more)
                if answer is None:
                    found.seconds.pop(key, None)
                    continue
                if phase == DECODE and not counts:
                    self.step_s[name, batch] = median(answer["seconds"])
                times = found.seconds.setdefault(key, [])
                if counts:
                    times += [answer["seconds"]] if phase == PREFILL else answer["seconds"]

    def _steps(self, name: str, batch: int) -> int:
        """How many decode steps an engine's turn has."""
        known = self.step_s.get((name, batch))
        most = self.job.steps
        return most if known is None else min(most, max(_LEAST_STEPS, int(_MOST_S / max(known, 1e-6))))

    def _memory(self) -> None:
        for name in list(self.workers):
            answer = self._ask(name, "memory")
            if answer is not None:
                self.found[name].peak_growth_bytes = int(answer["peak_growth_bytes"])

    def _break_down(self) -> None:
        """Last, with the graphs that were timed; a failure leaves the times as they are."""
        wanted = [name for name in self.workers if self.found[name].engine.own and self.job.passes]
        for done, name in enumerate(wanted):
            self.say("break down", name, done, len(wanted))
            found = self.found[name]
            try:
                for phase, batch in found.seconds:
                    tokens, passes = self.job.prompts[batch], self.job.passes
                    found.parts[phase, batch] = self.workers[name].ask(
                        "profile", phase=phase, tokens=tokens, passes=passes
                    )
            except WorkerError as problem:
                self._note(name, "profile", problem)
        self.say("break down", "", len(wanted), len(wanted))

    def _summed_up(self, *, stopped: bool = False) -> Report:
        bandwidth = median(self.bandwidth[1:] or self.bandwidth)
        job = self.job
        about = {"context": job.context, "steps": job.steps, "rounds": self.rounds, "threads": job.threads}
        if stopped:
            about["rounds_wanted"] = job.rounds
        rows, parts = [], []
        for found in self.found.values():
            rows += rows_of(found, context=job.context, steps=job.steps, bandwidth_gb_s=bandwidth)
            for (phase, batch), one in found.parts.items():
                parts.append({"engine": found.engine.name, "phase": phase, "batch": batch, **one})
        return Report(
            facts={**job.facts, **about, **self.machine, "bandwidth_gb_s": bandwidth},
            rows=rows,
            breakdowns=parts,
            missing=job.missing,
            failed=self.failed,
            order=self.order,
        )


def _convert(engine: Engine) -> None:
    """Make the file or folder that an engine reads, in a process of its own; a complete one is kept."""
    if engine.convert is None or Path(engine.convert["target"]).exists():
        return
    target = Path(engine.convert["target"])
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"partial-{target.name}")
    worker = Worker(engine.name, engine.command)
    try:
        worker.ask("convert", **{**engine.convert, "target": str(partial)})
    finally:
        worker.end()
    partial.replace(target)
