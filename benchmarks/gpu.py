"""autoq's GPU kernels: every one checked against its reference, then timed against everybody else's.

    python benchmarks/gpu.py --json gpu.json               everything: hours the first time; what is tuned is kept
    python benchmarks/gpu.py --quick --json quick.json     bf16, the default schemes, two shapes, three M
    python benchmarks/gpu.py --check-only                  no timing
    python benchmarks/gpu.py --roofline                    the prediction on paper, without a GPU
    python benchmarks/gpu.py --roofline docs/gpu.md        the same, into the document's marked section
    python benchmarks/gpu.py --count                       count the instructions that the prediction knows anew
    TRITON_INTERPRET=1 python benchmarks/gpu.py --check-only --device cpu    small shapes in Triton's interpreter

Exits with 1 if a kernel was wrong or failed, with 2 where nothing can be run. The file is written after each weight
and each cell. Rivals are measured where they are installed: pip install torchao gemlite.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_bench import roofline, roofline_counts, roofline_tables, run_checks, run_report, run_timing
from gpu_bench.run_checks import Checker, DeviceLostError

from autoq import candidates
from autoq._files import write_atomic
from autoq.errors import AutoqError, InputError

_ROWS = (1, 2, 4, 8, 16, 64, 512, 2048)
_QUICK_ROWS = (1, 16, 512)
_QUICK_SHAPES = ((4096, 4096), (28672, 4096))
_CHECK_SHARE = 0.5  # of --minutes that checks may take where timing follows
NOTHING_RAN = 2


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked and with their defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few schemes, shapes and M")
    parser.add_argument("--check-only", action="store_true", help="no timing")
    parser.add_argument(
        "--all-configurations", action="store_true", help="check whole tuning spaces, not their defaults"
    )
    parser.add_argument("--json", type=Path, help="file for checks and times")
    parser.add_argument("--schemes", nargs="+", metavar="SCHEME", help="such as int8wo 'sinq(bits=4,group_size=64)'")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="NxK", help="instead of Llama-3-8B's")
    parser.add_argument("--m", type=_numbers, help="such as 1,16,512")
    parser.add_argument("--dtypes", type=_dtypes, help="of bf16,fp16; default both, quick bf16")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu for Triton's interpreter")
    parser.add_argument("--minutes", type=float, help="begin nothing after these; what is left out is listed")
    parser.add_argument(
        "--roofline", nargs="?", const="", metavar="FILE", help="print the prediction, or put it into FILE"
    )
    parser.add_argument("--count", action="store_true", help="count the GEMVs' instructions anew; compiles, no GPU")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of a file")
    options = parser.parse_args(arguments)
    if options.device.partition(":")[0] not in ("cuda", "cpu"):
        parser.error(f"--device is cuda or cpu, not {options.device}")
    if options.device == "cpu" and not options.check_only:
        parser.error("--device cpu needs --check-only: the interpreter's times mean nothing")
    interpreted = options.device == "cpu"
    if options.dtypes is None:
        options.dtypes = ["fp16"] if interpreted else ["bf16"] if options.quick else ["bf16", "fp16"]
    if interpreted and "bf16" in options.dtypes:
        parser.error("--device cpu needs --dtypes fp16: Triton's interpreter multiplies bfloat16 wrongly")
    short = options.quick or interpreted
    try:
        named = [candidates.parse(text) for text in options.schemes or ()]
    except AutoqError as problem:
        parser.error(str(problem))
    options.schemes = [str(one) for one in named or (run_checks.BASE if short else candidates.ALL)]
    options.timed = [str(one) for one in named or run_checks.BASE]
    return options


def _numbers(text: str) -> list[int]:
    numbers = [int(one) for one in text.split(",")]
    if min(numbers) < 1:
        raise ValueError
    return numbers


def _shape(text: str) -> tuple[int, int]:
    n, k = _numbers(text.replace("x", ","))
    return n, k


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(run_checks.DTYPES):
        raise ValueError
    return names


def why_not(device: str) -> str | None:
    """Why nothing can be run on a device; None if it can."""
    try:
        import triton
    except ImportError as problem:
        return f"triton cannot be imported ({problem})"
    if device == "cpu":
        if not triton.knobs.runtime.interpret:
            return "the CPU runs these kernels only in Triton's interpreter: set TRITON_INTERPRET=1"
        return None
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda or torch.version.hip
    return f"torch {torch.__version__} finds no GPU" + ("" if built else ": it is built for CPUs only")


def current_device(name: str) -> torch.device:
    """The device of that name, with its index, made the one that kernels are launched on."""
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def still_checked(options: argparse.Namespace) -> str:
    """What can be said without running a kernel, in a few words."""
    try:
        from autoq_kernels.triton import products, timing, tuning  # noqa: F401 - that they can be imported is the point
    except ImportError as problem:
        return f"the arguments; importing the kernels failed: {problem}"
    shapes, rows = options.shapes or [(one.n, one.k) for one in roofline.LLAMA_3_8B], options.m or _ROWS
    counts = [
        len(products.choices(form, m, run_checks.DTYPES[dtype], has_column_scale=has_column_scale))
        for form, has_column_scale in run_checks.forms(options.schemes, shapes)
        for m in rows
        for dtype in options.dtypes
    ]
    return f"the arguments, the imports, and that each of {len(counts)} products has choices, {min(counts)} or more"


class Run:
    """The document of a run, as it grows.

    Args:
        options: of the command.
        device: of all tensors.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self._options = options
        self._device = device
        self._started = time.monotonic()
        self.document: dict[str, Any] = {"command": " ".join(sys.argv), "checks": [], "rows": [], "left_out": []}

    def save(self) -> None:
        """Write the file, if one is wanted."""
        if self._options.json is not None:
            text = json.dumps(self.document, indent=1) + "\n"
            write_atomic(self._options.json, lambda temporary: temporary.write_text(text), InputError)

    def in_time(self, what: object, share: float = 1.0) -> bool:
        """Whether there is time to begin something; it is listed if not."""
        minutes = self._options.minutes
        if minutes is None or time.monotonic() - self._started < 60 * minutes * share:
            return True
        self.document["left_out"].append(str(what))
        return False

    def note(self, text: object) -> None:
        """A line of progress."""
        print(f"[{time.monotonic() - self._started:5.0f} s] {text}", file=sys.stderr, flush=True)

    def check(self) -> None:
        """Every kernel on small and odd shapes, then the operator."""
        options, device = self._options, self._device
        interpreted = device.type == "cpu"
        small = interpreted or options.quick
        shapes = options.shapes or (run_checks.SMALL_SHAPES if small else run_checks.SHAPES)
        rows = options.m or (run_checks.SMALL_ROWS if small else run_checks.ROWS)
        checker = Checker(device, everything=options.all_configurations)
        share = 1.0 if options.check_only else _CHECK_SHARE
        last = None
        for case in run_checks.cases(options.schemes, shapes, rows, options.dtypes):
            if not self.in_time(f"check {case}", share):
                continue
            if last != (case.scheme, case.n, case.k, case.dtype):
                last = (case.scheme, case.n, case.k, case.dtype)
                self.note(f"check {case.scheme} {case.n}x{case.k} {case.dtype}")
                self.save()
            self.document["checks"] += checker.rows(case)
        if not interpreted:
            for scheme in options.schemes:
                if self.in_time(f"check autoq::linear {scheme}", share):
                    self.document["checks"] += [
                        run_checks.operator(scheme, (512, 1024), m, "bf16", device) for m in (1, 17)
                    ]
        self.save()

    def measure(self) -> None:
        """All cells, and what the device is."""
        from autoq_kernels.triton.device import Device

        options, device = self._options, self._device
        shapes = options.shapes or (_QUICK_SHAPES if options.quick else [(one.n, one.k) for one in roofline.LLAMA_3_8B])
        rows = options.m or (_QUICK_ROWS if options.quick else _ROWS)
        bench = run_timing.Bench.of(device, options.timed, seconds=1.0 if options.quick else 3.0)
        self.document["machine"] = Device.current(device).to_json() | {
            "bandwidth_gb_s": bench.bandwidth_gb_s,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        }
        cells = run_timing.cells(shapes, rows, options.dtypes)
        for number, cell in enumerate(cells):
            if self.in_time(cell):
                self.note(f"{number + 1}/{len(cells)} {cell}")
                self.document["rows"] += bench.rows(cell)
                self.save()


def print_roofline(file: str) -> None:
    """The tables, printed or put into a file."""
    if not file:
        print(roofline_tables.markdown())
        return
    path = Path(file)
    text = roofline_tables.put_into(path.read_text())
    write_atomic(path, lambda temporary: temporary.write_text(text), InputError)


def main() -> int:
    options = parse()
    if options.count:
        roofline_counts.write()
        return 0
    if options.roofline is not None:
        print_roofline(options.roofline)
        return 0
    if options.table is not None:
        document = json.loads(options.table.read_text())
        print(run_report.checks(document["checks"]), run_report.tables(document), sep="\n\n")
        return 0
    reason = why_not(options.device)
    if reason is not None:
        print(f"Nothing was run: {reason}. Checked: {still_checked(options)}.", file=sys.stderr)
        return NOTHING_RAN
    run = Run(options, current_device(options.device))
    try:
        run.check()
        print(run_report.checks(run.document["checks"]))
        if not options.check_only:
            run.measure()
            print("", run_report.tables(run.document), sep="\n")
    except DeviceLostError as problem:
        run.save()
        print(run_report.checks(run.document["checks"]))
        print(f"The GPU cannot be used any more after {problem}", file=sys.stderr)
        return 1
    left = run.document["left_out"]
    if left:
        print(f"\nNot done for lack of time ({len(left)}):", *left, sep="\n")
    failed = [row for row in run.document["checks"] if row["status"] in ("wrong", "error")]
    failed += [
        row for row in run.document["rows"] if row["engine"] in run_timing.OURS and row["status"] in ("wrong", "error")
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
