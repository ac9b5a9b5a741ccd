"""A process that searches a synthetic problem; test_workers starts several on one storage, and kills some.

Every evaluation is written to a file as it starts and as it ends, so that none goes unseen.
"""

import argparse
import json
import math
import os
import time
import zlib
from pathlib import Path

from autoq import leases
from autoq.search import Budget, Evaluation, Option, Problem, Unit, search

SCHEMES = {"none": (1.0, 0.0), "int8wo": (0.6, 0.01), "int4wo-hqq": (0.4, 0.12)}


def problem():
    units = []
    for number in range(5):
        size = 5.0 + 3 * number
        options = [
            Option(scheme=name, time_us=size * time_, loss=loss * (1 + number % 3) / 4, bytes=int(1000 * size * time_))
            for name, (time_, loss) in SCHEMES.items()
        ]
        units.append(Unit(name=f"u{number}", layers=(f"u{number}",), options=tuple(options)))
    return Problem(units=tuple(units), fixed_time_us=2.0)


PROBLEM = problem()
BUDGET = Budget(max_loss=0.15)
ARGUMENTS = {
    "budget": BUDGET,
    "families": {unit.name: "mlp" for unit in PROBLEM.units},
    "uniform": {scheme: PROBLEM.uniform(scheme) for scheme in SCHEMES},
    "fingerprint": "weights and tokens",
    "n_trials": 12,
}


def measured(assignment, fidelity=1):
    """The loss: the additive one, a little more than added up, and noise that depends on the plan alone."""
    loss = PROBLEM.loss(assignment)
    noise = zlib.crc32(repr(assignment).encode()) / 2**32 - 0.5
    delta = loss * (1 + loss) * (1 + 0.1 * noise)
    spread = (0.03 * loss + 3e-4) * (1.0 if fidelity else 2.0)
    return Evaluation(loss_delta=delta, low=delta - spread, high=delta + spread, samples=32 if fidelity else 4)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("storage")
    parser.add_argument("log", type=Path)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--patience", type=int, default=leases.PATIENCE)
    parser.add_argument("--hang-at", type=int, help="the evaluation, counted from 0, that ends when LOG.go is there")
    parser.add_argument("--place", help="the machine this process says it runs on")
    arguments = parser.parse_args()
    if arguments.place:
        leases._place = lambda: arguments.place
    calls = 0

    def write(event, **facts):
        line = json.dumps({"event": event, "pid": os.getpid(), **facts}) + "\n"
        with arguments.log.open("a") as stream:
            stream.write(line)

    def evaluate(schemes, fidelity):
        nonlocal calls
        assignment = PROBLEM.assignment(schemes)
        write("start", plan=assignment, fidelity=fidelity)
        if calls == arguments.hang_at:
            write("hang", plan=assignment, fidelity=fidelity)
            while not arguments.log.with_suffix(".go").exists():
                time.sleep(0.05)
        calls += 1
        time.sleep(arguments.pause)
        write("end", plan=assignment, fidelity=fidelity)
        return measured(assignment, fidelity)

    found = search(PROBLEM, evaluate=evaluate, storage=arguments.storage, patience=arguments.patience, **ARGUMENTS)
    assert math.isfinite(found.pareto[0].evaluation.loss_delta)
    write(
        "done",
        evaluations=found.evaluations,
        points=[point.assignment for point in found.points],
        pareto=[[point.assignment, point.evaluation.loss_delta] for point in found.pareto],
        study=found.study_name,
    )


if __name__ == "__main__":
    main()
