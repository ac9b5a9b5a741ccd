"""Makes every malicious file, lets its reader read it in a process with little memory, and tells how that ended.

    python tests/attacks/run.py [--only WORDS] [--json FILE]

Exit status 1 if anything was read that should not be, raised something that is no AutoqError, took much memory, ended
the process or ran code.
"""
# ruff: noqa: T201 - a command that reports what it did

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "benchmarks")]

from fault_bench import processes  # noqa: E402
from malicious import readers  # noqa: E402
from malicious.catalogue import CASES  # noqa: E402
from malicious.harness import outcome  # noqa: E402

MOST_BYTES = 160 << 20  # of memory, besides four times what the file has: pyarrow and the kernels' libraries are in it


def main():
    parser = argparse.ArgumentParser(description="Try every malicious file.")
    parser.add_argument("--only", default="", help="attacks whose name has these words")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # what is damaged and measured again is said each time
    names = [name for name in CASES if arguments.only in name]
    found = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        samples = {}
        for reader in sorted({CASES[name].reader for name in names}):
            samples[reader] = Path(scratch) / "samples" / reader.replace(" ", "-")
            samples[reader].mkdir(parents=True)
            processes.call(lambda say, reader=reader: readers.READERS[reader].make(samples[reader]) and None)
            whole = outcome(readers.READERS[reader], samples[reader])
            found[f"{reader}: untouched"] = whole | {"expected": ["read"], "fault": _fault(whole, ("read",), 0)}
            if whole["how"] != "read":
                print(f"{reader}: untouched: {whole['message']}", flush=True)
        for name in names:
            began = time.monotonic()
            found[name] = attacked(name, samples[CASES[name].reader], Path(scratch) / "attacked")
            found[name]["seconds"] = round(time.monotonic() - began, 2)
            if found[name]["fault"]:
                print(f"{name}: {found[name]['fault']}", flush=True)
    faults = {name: one["fault"] for name, one in found.items() if one["fault"]}
    peak = max(found.values(), key=lambda one: one["peak_bytes"])["peak_bytes"]
    print(f"{len(found)} files, {len(faults)} faults, at most {peak / 1e6:.0f} MB of memory")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(bool(faults))


def attacked(name, sample, folder):
    """The outcome of one attack."""
    case = CASES[name]
    reader = readers.READERS[case.reader]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sample, folder, symlinks=True)

    def attack(say):
        case.attack(case.place(folder))
        if case.seal:
            readers.seal(folder / reader.sealed)

    processes.call(attack)
    size = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    expected = (*reader.errors, "read") if case.may_read else reader.errors
    found = outcome(reader, folder)
    return found | {"expected": list(expected), "fault": _fault(found, expected, size)}


def _fault(found, expected, size):
    """What is wrong with an outcome; empty if nothing."""
    if found["owned"]:
        return "code from the file ran"
    if found["how"] not in expected:
        return f"{found['how']}: {found['message'][-500:]}"
    if found["peak_bytes"] > MOST_BYTES + 4 * size:
        return f"{found['peak_bytes'] / 1e6:.0f} MB of memory for a file of {size / 1e6:.1f} MB"
    return ""


if __name__ == "__main__":
    main()
