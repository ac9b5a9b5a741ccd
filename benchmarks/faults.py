"""Injects faults into everything that autoq writes, and tells what came of it.

    python benchmarks/faults.py [--kills 200] [--seed 0] [--only kills,tune,refusals] [--writer plan] \\
        [--json FILE] [--table FILE]

kill -9: each writer runs in a child process that is killed before a change of a file, at a byte or at a random time;
then everything that the child had reported finished must be there, whole, and the next write must succeed.
tune: the same for a whole tuning, which goes on where it was killed and measures nothing twice.
refusals: a limit on file sizes, a full disk, a read-only file system, missing permissions.
Exit status 1 if anything was lost, broken or refused without a clear error.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fault_bench import kills, refusals, report, tuning
from fault_bench.writers import WRITERS

WHAT = ("refusals", "kills", "tune")


def main():
    parser = argparse.ArgumentParser(description="Inject faults into everything that autoq writes.")
    parser.add_argument("--kills", type=int, default=20, help="in all: nine in ten of writers, the rest of tune")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(WHAT), help="some of " + ",".join(WHAT))
    parser.add_argument("--writer", choices=sorted(WRITERS), help="only this one")
    parser.add_argument("--json", type=Path, help="write all outcomes here")
    parser.add_argument("--table", type=Path, help="put the tables between the marks of this Markdown file")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    names = [arguments.writer] if arguments.writer else list(WRITERS)
    found = {"seed": arguments.seed, "refusals": [], "kills": [], "tune": None}
    began = time.monotonic()
    if "refusals" in wanted:
        found["refusals"] = [refusals.refuse(name, fault) for name in names for fault in refusals.FAULTS]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        if "kills" in wanted:
            of_tune = arguments.kills // 10 if "tune" in wanted else 0
            shares = [len(range(i, arguments.kills - of_tune, len(names))) for i in range(len(names))]
            for name, share in zip(names, shares, strict=True):
                one = kills.kill_writer(name, Path(scratch) / name.replace(" ", "-"), kills=share, seed=arguments.seed)
                print(f"{name}: {json.dumps(one)}", file=sys.stderr, flush=True)
                found["kills"].append(one)
        if "tune" in wanted:
            of_tune = arguments.kills // 10 if "kills" in wanted else arguments.kills
            found["tune"] = tuning.kill_tune(Path(scratch) / "tune", kills=max(1, of_tune), seed=arguments.seed)
    found["seconds"] = round(time.monotonic() - began, 1)
    text = report.tables(found)
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.table:
        report.insert(arguments.table, text)
    sys.exit(bool(report.faults(found)))


if __name__ == "__main__":
    main()
