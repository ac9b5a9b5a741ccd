"""The search's problem as one file: times, bytes and scores are measured once, and every part decides the same one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoq import candidates
from autoq._files import write_atomic
from autoq.errors import InputError
from autoq.judging import Judge
from autoq.loading import inputs, load_model
from autoq.profiler import LatencyModel
from autoq.results import Settings
from autoq.scheme import NONE, Scheme
from autoq.search import Assignment, Option, Problem, Unit
from autoq.summary import loss_family
from autoq.tuning import Tuning
from autoq.workload import LayerInfo, Phase, Workload

Say = Callable[[str, str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A problem and what it was made of.

    Attributes:
        problem: one unit per layer; times per request, predicted losses, bytes.
        families: unit → family.
        shapes: unit → ``NxK`` of its layer and its calls by phase; layers of one such shape take the same time.
        calls: phase → passes per request.
        fixed_us: phase → µs per pass outside the layers.
        pass_us: (layer, scheme, phase) → µs per pass.
        about: weights and tokens by hash, text, device, baseline NLL.
    """

    problem: Problem
    families: Mapping[str, str]
    shapes: Mapping[str, str]
    calls: Mapping[str, float]
    fixed_us: Mapping[str, float]
    pass_us: Mapping[tuple[str, str, str], float]
    about: Mapping[str, Any]

    @property
    def none(self) -> Assignment:
        """Every layer unquantized."""
        return self.problem.uniform(str(NONE))

    @property
    def uniform(self) -> dict[str, Assignment]:
        """Scheme → that scheme wherever it is offered."""
        offered = dict.fromkeys(option.scheme for unit in self.problem.units for option in unit.options)
        return {scheme: self.problem.uniform(scheme) for scheme in offered}

    def ratio(self, assignment: Assignment) -> float:
        """Modelled time of a request over that of ``none`` everywhere."""
        return self.problem.time_us(assignment) / self.problem.time_us(self.none)

    def phase_us(self, schemes: Mapping[str, str], phase: str) -> float:
        """Modelled µs of one pass of a phase."""
        return self.fixed_us[phase] + math.fsum(self.pass_us[layer, one, phase] for layer, one in schemes.items())

    def with_losses(self, losses: Mapping[tuple[str, str], float]) -> Frozen:
        """The same with other predicted losses by (layer, scheme)."""
        units = tuple(
            replace(
                unit, options=tuple(replace(o, loss=losses.get((unit.name, o.scheme), o.loss)) for o in unit.options)
            )
            for unit in self.problem.units
        )
        return replace(self, problem=replace(self.problem, units=units))

    def times(self) -> dict[str, Any]:
        """All times, each of a shape and scheme once: with them another machine decides the same problem."""
        layers: dict[str, dict[str, dict[str, float]]] = {}
        for (layer, scheme, phase), us in self.pass_us.items():
            layers.setdefault(self.shapes[layer], {}).setdefault(scheme, {})[phase] = us
        return {"calls": dict(self.calls), "fixed_us": dict(self.fixed_us), "pass_us": layers}

    def with_times(self, times: Mapping[str, Any]) -> Frozen:
        """The same problem with the times of ``times``.

        Raises:
            InputError: if a shape or scheme is not among them.
        """
        try:
            pass_us = {
                (layer, scheme, phase): times["pass_us"][self.shapes[layer]][scheme][phase]
                for layer, scheme, phase in self.pass_us
            }
        except KeyError as missing:
            raise InputError("the reference has times of every shape and scheme", got=f"none of {missing}") from missing
        return _with_pass_us(self, pass_us, times["calls"], times["fixed_us"])

    def save(self, path: Path) -> None:
        """Write the file."""
        content = {
            "about": self.about,
            "calls": self.calls,
            "fixed_us": self.fixed_us,
            "fixed_bytes": self.problem.fixed_bytes,
            "units": [
                {
                    "name": unit.name,
                    "layers": list(unit.layers),
                    "family": self.families[unit.name],
                    "shape": self.shapes[unit.name],
                    "options": [
                        {
                            "scheme": option.scheme,
                            "loss": option.loss,
                            "bytes": option.bytes,
                            "pass_us": {p: self.pass_us[unit.name, option.scheme, p] for p in self.calls},
                        }
                        for option in unit.options
                    ],
                }
                for unit in self.problem.units
            ],
        }
        write_atomic(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"), InputError)

    @classmethod
    def load(cls, path: Path) -> Frozen:
        """Read the file.

        Raises:
            InputError: if there is none.
        """
        if not path.is_file():
            raise InputError("the problem is made first", where=str(path), got="no such file", fix="Run: prepare")
        content = json.loads(path.read_text())
        listed = content["units"]
        units = tuple(
            Unit(
                name=unit["name"],
                layers=tuple(unit["layers"]),
                options=tuple(
                    Option(scheme=one["scheme"], time_us=0.0, loss=one["loss"], bytes=one["bytes"])
                    for one in unit["options"]
                ),
            )
            for unit in listed
        )
        bare = cls(
            problem=Problem(units=units, fixed_bytes=content["fixed_bytes"]),
            families={unit["name"]: unit["family"] for unit in listed},
            shapes={unit["name"]: unit["shape"] for unit in listed},
            calls={},
            fixed_us={},
            pass_us={},
            about=content["about"],
        )
        pass_us = {
            (unit["name"], one["scheme"], phase): us
            for unit in listed
            for one in unit["options"]
            for phase, us in one["pass_us"].items()
        }
        return _with_pass_us(bare, pass_us, content["calls"], content["fixed_us"])


def _with_pass_us(
    frozen: Frozen,
    pass_us: Mapping[tuple[str, str, str], float],
    calls: Mapping[str, float],
    fixed: Mapping[str, float],
) -> Frozen:
    """The problem at these times."""

    def timed(unit: Unit, option: Option) -> Option:
        return replace(option, time_us=sum(n * pass_us[unit.name, option.scheme, phase] for phase, n in calls.items()))

    units = tuple(
        replace(unit, options=tuple(timed(unit, option) for option in unit.options)) for unit in frozen.problem.units
    )
    fixed_us = sum(n * fixed[phase] for phase, n in calls.items())
    problem = replace(frozen.problem, units=units, fixed_time_us=fixed_us)
    return replace(frozen, problem=problem, calls=dict(calls), fixed_us=dict(fixed), pass_us=dict(pass_us))


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model's measurements, from the cache where it has them."""

    tuning: Tuning
    judge: Judge
    latency: LatencyModel
    scores: Sequence[Mapping[str, Any]]

    def frozen(self, about: Mapping[str, Any]) -> Frozen:
        """The problem they make, one unit per layer."""
        latency, tuning = self.latency, self.tuning
        phases = [phase.name for phase in tuning.workload.phases]
        problem = tuning.problem(latency, {(row["layer"], row["scheme"]): row["score"] for row in self.scores})
        pass_us = {
            (unit.name, option.scheme, phase): latency.layer_us(unit.name, Scheme.parse(option.scheme), phase)
            for unit in problem.units
            for option in unit.options
            for phase in phases
        }
        return Frozen(
            problem=problem,
            families={unit.name: loss_family(unit.name, tuning.layers) for unit in problem.units},
            shapes={layer.name: _shape(tuning.workload, layer) for layer in tuning.workload.quantizable},
            calls=dict(latency.calls),
            fixed_us=dict(latency.fixed_us),
            pass_us=pass_us,
            about=about,
        )


def _shape(workload: Workload, layer: LayerInfo) -> str:
    calls = sorted((call.phase, call.m, call.count) for call in workload.calls_of(layer.name))
    return " ".join([f"{layer.n}x{layer.k}", *(f"{phase}:{count}x{m}" for phase, m, count in calls)])


def language_tuning(model: str, text: Path | None, rows: int, cache: Path | None, say: Say | None = None) -> Tuning:
    """A tuning of a named model and text whose workload is recorded; nothing is measured yet."""
    torch.manual_seed(0)
    loaded = load_model(model)
    batches, _ = inputs(loaded, text, rows=rows)
    settings = Settings(candidates=tuple(candidates.DEFAULT), cache_dir=cache)
    tuning = Tuning(loaded.model, batches, None, settings, say)
    tuning.prepare()
    return tuning


def other_tuning(
    model: nn.Module, batches: Any, timed: Any, schemes: Sequence[str], cache: Path | None, say: Say | None = None
) -> Tuning:
    """The same for a module, judged on batches and timed on another one."""
    settings = Settings(candidates=tuple(map(candidates.parse, schemes)), cache_dir=cache)
    tuning = Tuning(model, batches, {"forward": Phase(timed)}, settings, say)
    tuning.prepare()
    return tuning


def prepare(tuning: Tuning) -> Prepared:
    """Profile, score and calibrate as ``tune`` does; what the cache has is not measured again."""
    rows = tuning.profile()
    judge = tuning.judge()
    scores = judge.scores(lambda text, done, total: tuning.say("sensitivity", text, done, total))
    latency = tuning.latency(rows)
    return Prepared(tuning=tuning, judge=judge, latency=latency, scores=scores)
