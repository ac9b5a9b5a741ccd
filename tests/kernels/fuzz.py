"""Fuzzes the C++ operators of the CPU under AddressSanitizer and UndefinedBehaviorSanitizer (`make asan`).

For every instruction set of this machine the kernels are compiled with the sanitizers and loaded into a child
process whose memory functions are the sanitizer's. Before a case counts, that process must have caught three
planted errors. Cases run in forked batches, small ones first: scratch memory that a batch keeps is no larger
than its cases have needed so far. Results are held against the plain-PyTorch definitions.

    python tests/kernels/fuzz.py [--minutes 4] [--seed 0] [--isa avx2] [--case '<json>']
"""
# ruff: noqa: T201 - a command that reports what it did

import argparse
import collections
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import fuzz_cases
import torch

from autoq_kernels import layout
from autoq_kernels.cpu import build, toolchain

ISAS = ("portable", "avx2", "avxvnni", "avx512")
# vptr needs type information that torch hides; everything else ends the process at its first error.
FLAGS = (
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr",
    "-fno-sanitize-recover=all",
)
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
BATCH = 150  # cases
EXCERPT = 4000  # characters of a report's start and end
BATCH_SECONDS = 300
PLANTED = ("a byte past a block", "a weight's last code", "the end of x")


def main():
    """Compile, run the children, and tell."""
    parser = argparse.ArgumentParser(description="Fuzz the CPU kernels under sanitizers.")
    parser.add_argument("--minutes", type=float, default=4.0, help="of fuzzing, divided among the instruction sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--isa", choices=ISAS, help="only this one")
    parser.add_argument("--case", help="run this case again")
    parser.add_argument("--library", help=argparse.SUPPRESS)  # in the child: the sanitized build
    arguments = parser.parse_args()
    if arguments.library:
        sys.exit(child(arguments, Path(arguments.library)))
    if arguments.case:
        arguments.isa = json.loads(arguments.case)["isa"]
    wanted = (arguments.isa,) if arguments.isa else ISAS
    isas = [isa for isa in wanted if not toolchain.missing_features(isa)]
    if not isas:
        sys.exit(f"this processor lacks {', '.join(toolchain.missing_features(arguments.isa))}")
    print(f"seed {arguments.seed}; fuzzed: {', '.join(isas)}; of {', '.join(ISAS)}", flush=True)
    sys.exit(max([fuzz(isa, arguments, arguments.minutes / len(isas)) for isa in isas]))


def fuzz(isa, arguments, minutes):
    """Compile an instruction set with the sanitizers and fuzz it in a child; 0 if all is well."""
    compiler = toolchain.find_compiler(None)
    with tempfile.TemporaryDirectory() as scratch:
        started = time.monotonic()
        library = toolchain.compile_library(isa, compiler, Path(scratch), extra_flags=FLAGS)
        print(f"{isa}: compiled with {' '.join(FLAGS)} in {time.monotonic() - started:.0f} s", flush=True)
        command = [sys.executable, __file__, "--isa", isa, "--library", str(library)]
        command += ["--seed", str(arguments.seed), "--minutes", str(minutes)]
        command += ["--case", arguments.case] if arguments.case else []
        # libstdc++ beside the sanitizer, or it could not find the function that throws exceptions.
        names = [
            subprocess.run(
                [compiler.path, f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in ("libasan.so", "libstdc++.so")
        ]
        environment = {**os.environ, **OPTIONS, "LD_PRELOAD": " ".join(names)}
        return subprocess.run(command, env=environment, check=False).returncode


def child(arguments, library):
    """In the sanitized process: load the build, prove the sanitizer, run cases; the exit status."""
    use(arguments.isa, library)
    log = library.with_suffix(".log")
    for planted in PLANTED:
        if not forked(lambda planted=planted: plant(planted, arguments.isa), log):
            print(f"{arguments.isa}: the sanitizer does not see an access to {planted}: the fuzz would prove nothing")
            return 1
        if "ERROR: AddressSanitizer" not in log.read_text():
            print(log.read_text(), f"\n{arguments.isa}: the self-test failed otherwise than by the sanitizer")
            return 1
    print(f"{arguments.isa}: self-test passed: caught an access to {'; to '.join(PLANTED)}")
    if arguments.case:
        wrong = failed([json.loads(arguments.case)], log)
        print(f"{arguments.isa}: the case {'fails' if wrong else 'passes'}")
        return int(wrong)
    return run_batches(arguments, log)


def use(isa, library):
    """Make the sanitized library the build that autoq loads, in this process."""

    def compile_library(_isa, _compiler, folder, **_):
        return Path(shutil.copy(library, folder / "kernels.so"))

    toolchain.compile_library = compile_library
    build.best_isa = lambda: isa
    build.default_cache_dir = lambda: library.parent / "cache"
    status = build.load()
    if status.isa != isa:
        sys.exit(f"{isa}: the sanitized build does not work: {status.reason}")


def run_batches(arguments, log):
    """Random cases until the time is up."""
    rng = random.Random(f"{arguments.seed} {arguments.isa}")
    forms = fuzz_cases.weight_forms()
    counts = collections.Counter()
    until = time.monotonic() + 60 * arguments.minutes
    while time.monotonic() < until:
        batch = [fuzz_cases.draw(rng, arguments.isa, forms) for _ in range(BATCH)]
        batch.sort(key=work)
        if failed(batch, log):
            return 1
        for case in batch:
            counts[case["op"], name(case)] += 1
    totals = collections.Counter()
    for (op, _), count in counts.items():
        totals[op] += count
    for op, total in totals.most_common():
        each = ", ".join(f"{kind} {count}" for (of, kind), count in sorted(counts.items()) if of == op)
        print(f"{arguments.isa}: {op} {total} cases ({each})")
    print(f"{arguments.isa}: {totals.total()} cases, no error, seed {arguments.seed}", flush=True)
    return 0


def failed(batch, log):
    """Run cases in a fork and print the one that went wrong with how to repeat it."""
    current = log.with_suffix(".case")

    def run_all():
        for case in batch:
            current.write_text(json.dumps(case))
            wrong = fuzz_cases.run(case)
            if wrong:
                sys.exit(wrong)

    if not forked(run_all, log):
        return False
    text = log.read_text(errors="replace")
    print(text if len(text) < 2 * EXCERPT else f"{text[:EXCERPT]}\n[...]\n{text[-EXCERPT:]}")
    print(f"FAILED. To repeat it:\npython tests/kernels/fuzz.py --case '{current.read_text()}'", flush=True)
    return True


def forked(work, log):
    """Whether a function fails in a fork of this process, by an exception, exit or signal; it writes to the log."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
    status = 1
    try:
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        signal.alarm(BATCH_SECONDS)  # a kernel that does not end has failed
        work()
        status = 0
    except BaseException:  # this process ends here, whatever happens
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def plant(planted, isa):
    """Let a bad access happen: one in the C library, two in the kernels."""
    weight = {"kind": 2, "bits": 4, "activation_bits": 0, "m_switch": 0, "n": 5, "k": 96, "group_size": 32}
    with fuzz_cases.Memory() as memory:
        data = memory.copy(fuzz_cases.packed({**weight, "optional": ["minimum"]}, torch.Generator().manual_seed(0)))
        x = memory.copy(torch.ones(1, 96))
        if planted == PLANTED[0]:
            ctypes.memmove(ctypes.create_string_buffer(len(data) + 1), data.data_ptr(), len(data) + 1)
        elif planted == PLANTED[1]:
            form = layout.header(data)
            memory.forbid(data.data_ptr() + form.codes_offset + form.n * form.k_padded // 2 - 16, 16)
        else:
            memory.forbid(x.data_ptr() + x.nbytes - 8, 8)
        getattr(torch.ops, f"autoq_{isa}").linear(x, data[: layout.HEADER_BYTES], None, 5)


def work(case):
    """Products of a case, by which a batch is ordered."""
    products = 1 if case["op"] == "pack" else case["weight"]["n"] * case["weight"]["k"]
    for size in case.get("lead", ()):
        products *= size
    return products


def name(case):
    """What a case is counted under."""
    if case["op"] == "pack":
        return case["scheme"].partition("(")[0]
    if case["op"] == "broken":
        return case["fault"]
    weight = case["weight"]
    text = f"{fuzz_cases.Kind(weight['kind']).name.lower()}{weight['bits']}"
    if weight["activation_bits"]:
        text += f"a{weight['activation_bits']}"
    return text + (f"m{weight['m_switch']}" if weight["m_switch"] else "")


if __name__ == "__main__":
    main()
