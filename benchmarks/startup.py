"""How long `import autoq` takes beyond `import torch`, and how long `autoq --help` takes.

    python benchmarks/startup.py [--runs N] [--json]

Each is run in processes of their own, in turns; the medians are what counts. The first turn only warms the file cache.
On a machine that is busy the processor's seconds say more than the clock's.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from statistics import median

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "import torch": [sys.executable, "-c", "import torch"],
    "import torch, autoq": [sys.executable, "-c", "import torch, autoq"],
    "autoq.tune, after torch": [sys.executable, "-c", "import torch, autoq; autoq.tune"],
    "autoq --help": [sys.executable, "-m", "autoq", "--help"],
    "autoq tune --help": [sys.executable, "-m", "autoq", "tune", "--help"],
}
LIMITS_S = {"import autoq beyond torch": 0.3, "autoq --help": 0.5}


def cpu_seconds():
    """Of the child processes that ended, user's and system's."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(runs):
    """Clock → command → seconds of every run."""
    seconds = {clock: {name: [] for name in COMMANDS} for clock in ("wall", "cpu")}
    for turn in range(runs + 1):
        for name, command in COMMANDS.items():
            wall, cpu = time.perf_counter(), cpu_seconds()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if turn:
                seconds["wall"][name].append(time.perf_counter() - wall)
                seconds["cpu"][name].append(cpu_seconds() - cpu)
    return seconds


def medians(seconds):
    """Command → its median, and that of the turns' own differences, since a machine's speed drifts between turns."""
    pairs = zip(seconds["import torch, autoq"], seconds["import torch"], strict=True)
    beyond = median(both - torch for both, torch in pairs)
    return {name: median(times) for name, times in seconds.items()} | {"import autoq beyond torch": beyond}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {clock: medians(seconds) for clock, seconds in measure(arguments.runs).items()}
    if arguments.json:
        print(json.dumps({"runs": arguments.runs, "median_s": found, "limit_s": LIMITS_S}, indent=1))
        return
    for name, wall in found["wall"].items():
        limit = f"  (at most {LIMITS_S[name]} s)" if name in LIMITS_S else ""
        print(f"{name:28} {wall:7.3f} s, processor {found['cpu'][name]:7.3f} s{limit}")


if __name__ == "__main__":
    main()
