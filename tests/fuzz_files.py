"""Fuzzes every reader of autoq's files, byte by byte and value by value (`make fuzz-files`).

A case takes a valid sample, changes a file of it, makes a checkpoint's hashes fit again more often than not, and reads
it in a forked process with little memory. Reading may succeed or raise an AutoqError of the reader's kind; anything
else ends the run with the line that repeats the case.

    python tests/fuzz_files.py [--minutes 4] [--seed 0] [--cases 1000] [--reader plan] [--case 17] [--json FILE]
"""
# ruff: noqa: T201 - a command that reports what it did

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "attacks"), str(HERE.parent / "benchmarks")]

from fault_bench import processes  # noqa: E402
from malicious import harness, mutations, readers  # noqa: E402

BATCH = 200  # cases in one process
BATCH_SECONDS = 240.0
MOST_BYTES = 160 << 20  # of memory that a case may take


def main():
    parser = argparse.ArgumentParser(description="Fuzz the readers of autoq's files.")
    parser.add_argument("--minutes", type=float, default=4.0, help="of fuzzing, divided among the readers")
    parser.add_argument("--cases", type=int, help="of each reader, however long they take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=sorted(readers.READERS), help="only this one")
    parser.add_argument("--case", type=int, help="run this case of the reader again")
    parser.add_argument("--json", type=Path, help="write the counts here")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # what is damaged and measured again is said each time
    names = [arguments.reader] if arguments.reader else list(readers.READERS)
    report, faults = {}, []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        for name in names:
            until = None if arguments.cases else time.monotonic() + 60 * arguments.minutes / len(names)
            found = fuzz(name, Path(scratch) / name.replace(" ", "-"), arguments, until)
            faults += found.pop("faults")
            report[name] = found
            print(f"{name}: {json.dumps(found)}", flush=True)
    for fault in faults:
        print(f"{fault['message'][-1500:]}\npython tests/fuzz_files.py --seed {arguments.seed} {fault['repeat']}")
    print(f"seed {arguments.seed}: {sum(one['cases'] for one in report.values())} cases, {len(faults)} faults")
    if arguments.json:
        arguments.json.write_text(json.dumps(report | {"faults": faults}, indent=1) + "\n")
    sys.exit(bool(faults))


def fuzz(name, folder, arguments, until):
    """Fuzz one reader until the time is over or its cases are run."""
    reader = readers.READERS[name]
    sample = folder / "sample"
    sample.mkdir(parents=True)
    processes.call(lambda say: reader.make(sample) and None)
    found = {"cases": 0, "outcomes": Counter(), "peak_bytes": 0, "faults": []}
    number = arguments.case if arguments.case is not None else 0
    wanted = 1 if arguments.case is not None else arguments.cases
    while not found["faults"] and (found["cases"] < wanted if wanted else time.monotonic() < until):
        count = min(BATCH, wanted - found["cases"]) if wanted else BATCH
        batch = range(number, number + count)
        child = processes.Child(lambda say, batch=batch: run(name, sample, folder / "case", arguments.seed, batch, say))
        status = child.wait(BATCH_SECONDS)
        done = [one for one in child.said if "how" in one]
        for one in done:
            found["cases"] += 1
            found["outcomes"][one["how"]] += 1
            found["peak_bytes"] = max(found["peak_bytes"], one["peak_bytes"])
            fault = wrong(reader, one)
            if fault:
                found["faults"].append({"message": fault, "repeat": f"--reader '{name}' --case {one['case']}"})
        if len(done) < count:
            case = number + len(done)
            message = f"the process ended with {status} at {child.said[-1:]}"
            found["faults"].append({"message": message, "repeat": f"--reader '{name}' --case {case}"})
        number += count
    found["outcomes"] = dict(sorted(found["outcomes"].items()))
    return found


def run(name, sample, folder, seed, batch, say):
    """Run cases in this process, and say how each ended."""
    reader = readers.READERS[name]
    contents = {path.relative_to(sample): path.read_bytes() for path in readers.targets(reader, sample)}
    for number in batch:
        drawn = random.Random(f"{seed} {name} {number}")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sample, folder)
        changed = drawn.choice(sorted(contents))
        data = mutations.mutated(contents[changed], drawn, [contents[one] for one in sorted(contents)])
        (folder / changed).write_bytes(data)
        if reader.sealed and drawn.random() < 0.8:
            readers.seal(folder / reader.sealed)
        say(harness.attempt(reader, folder) | {"case": number, "file": str(changed)})


def wrong(reader, one):
    """What is wrong with a case's outcome; empty if nothing."""
    if one["how"] not in (*reader.errors, "read"):
        return f"{one['file']}: {one['how']}: {one['message']}"
    if one["peak_bytes"] > MOST_BYTES:
        return f"{one['file']}: {one['peak_bytes'] / 1e6:.0f} MB of memory"
    return ""


if __name__ == "__main__":
    main()
