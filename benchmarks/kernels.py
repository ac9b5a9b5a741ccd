"""autoq's CPU kernels against the machine's limits and against everybody else's, interleaved, weights out of cache.

    python benchmarks/kernels.py --quick --json quick.json       about two minutes, the figures' main cells
    python benchmarks/kernels.py --json all.json --resume --minutes 60 --rivals
    python benchmarks/kernels.py --table all.json                print the tables again
    python benchmarks/kernels.py --figures all.json              every figure, its target, met or missed
    python benchmarks/kernels.py --picture roofline.png --from all.json

A run is a series of cells, one for each weight [N, K], M, dtype and number of threads. In a cell every engine's
result is checked first; then all are timed in turn, round by round, beside a kernel that only reads memory. The
rates of oneDNN's products, for the roofline, are sampled between the cells. The file is written after each cell;
--resume continues it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_bench import figures, machine, report, roofline, shapes
from kernel_bench.measure import Measurer
from kernel_bench.rivals import RivalProcess, Rivals, make_environment
from kernel_bench.shapes import Cell

from autoq import candidates
from autoq._files import write_atomic
from autoq.candidates import Candidate
from autoq.errors import AutoqError, InputError

_DTYPES = {short: long for long, short in roofline.SHORT.items()}
_RATE_ROUNDS = 3
_RATE_SHARE = 0.1  # of a run's time that may go into sampling the rates


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the subset of about two minutes, base schemes")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has already")
    parser.add_argument("--minutes", type=float, help="begin no cell after these; what is left out is listed")
    parser.add_argument("--rivals", action="store_true", help="make .venv-rivals and measure torchao and onnxruntime")
    parser.add_argument(
        "--schemes", nargs="+", help="such as int8wo 'sinq(bits=4,group_size=64)', or base; default all"
    )
    parser.add_argument("--models", nargs="+", choices=list(shapes.MODELS), help="whose shapes; default all")
    parser.add_argument("--shapes", nargs="+", metavar="NxK", help="instead of the models' shapes")
    parser.add_argument("--m", type=_numbers, help="such as 1,8,512; default all")
    parser.add_argument("--dtypes", default="bf16", help="of bf16,fp16,fp32")
    parser.add_argument("--threads", type=_numbers, default=[torch.get_num_threads()], help="such as 1,2")
    parser.add_argument("--table", type=Path, help="print the tables of a file")
    parser.add_argument("--figures", type=Path, help="judge the figures on a file")
    parser.add_argument("--picture", type=Path, help="draw the roofline of the file --from")
    parser.add_argument("--from", type=Path, dest="source", help="the file to draw")
    options = parser.parse_args()
    if options.picture and not options.source:
        parser.error("--picture needs --from FILE.json")
    unknown = set(options.dtypes.split(",")) - set(_DTYPES)
    if unknown:
        parser.error(f"--dtypes are of {', '.join(_DTYPES)}, not {', '.join(sorted(unknown))}")
    return options


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def wanted_cells(options: argparse.Namespace) -> list[Cell]:
    dtypes = [_DTYPES[short] for short in options.dtypes.split(",")]
    wanted = shapes.shapes(options.models or shapes.MODELS)
    if options.shapes:
        wanted = [(int(n), int(k)) for n, k in (text.split("x") for text in options.shapes)]
    if options.quick:
        cells = shapes.quick_cells(dtypes, options.threads)
        return [cell for cell in cells if (cell.n, cell.k) in wanted and cell.m in (options.m or shapes.ROWS)]
    return shapes.ordered_cells(wanted, options.m or shapes.ROWS, dtypes, options.threads)


def wanted_candidates(options: argparse.Namespace) -> Sequence[Candidate]:
    if options.schemes == ["base"] or (options.quick and not options.schemes):
        return shapes.base_candidates()
    return [candidates.parse(text) for text in options.schemes] if options.schemes else candidates.ALL


class Run:
    """The document of a run, as it grows.

    Args:
        path: of the JSON; None keeps it in memory.
        resume: whether to go on with what the file holds.

    Raises:
        InputError: if the file is another machine's or of other kernels: their rows do not compare.
    """

    def __init__(self, path: Path | None, *, resume: bool) -> None:
        self._path = path
        self.document: dict[str, Any] = {"machine": machine.describe(), "command": " ".join(sys.argv), "rows": []}
        if not (resume and path is not None and path.exists()):
            return
        old = json.loads(path.read_text())
        same = ("name", "isa", "cores", "torch", "kernels")
        differing = [name for name in same if old["machine"][name] != self.document["machine"][name]]
        if differing:
            raise InputError(
                "a run is resumed on the machine and the kernels it was begun with",
                where=str(path),
                got=f"another {', '.join(differing)}",
                fix="Name another --json file.",
            )
        self.document = old

    def missing(self, cell: Cell, wanted: Sequence[Candidate]) -> bool:
        """Whether a cell lacks a scheme."""
        have = {row["scheme"] for row in self._of(cell) if row["engine"] == "autoq"}
        return not {str(one) for one in shapes.candidates_of(cell, wanted)[0]} <= have

    def _of(self, cell: Cell) -> list[roofline.Row]:
        return [row for row in self.document["rows"] if Cell(*(row[name] for name in Cell._fields)) == cell]

    def add(self, cell: Cell, rows: list[roofline.Row]) -> None:
        """Put a cell's rows in the place of older ones."""
        old = self._of(cell)
        self.document["rows"] = [row for row in self.document["rows"] if row not in old] + rows

    def save(self, rates: machine.Rates) -> None:
        """Give every row its roofline by all rates sampled so far, and write the file."""
        about = self.document["machine"]
        about["rates"], about["rate_samples"] = rates.best(), dict(rates.samples)
        roofline.fill(self.document["rows"], about["rates"])
        if self._path is not None:
            text = json.dumps(self.document, indent=1) + "\n"
            write_atomic(self._path, lambda temporary: temporary.write_text(text), InputError)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what is wanted and not there yet; returns the run's document."""
    wanted = wanted_candidates(options)
    run = Run(options.json, resume=options.resume)
    about = run.document["machine"]
    rivals = Rivals()
    if options.rivals:
        rivals = RivalProcess(make_environment(Path(__file__).parents[1] / ".venv-rivals"))
        about["rivals"] = rivals.describe()
    cells = [cell for cell in wanted_cells(options) if run.missing(cell, wanted)]
    if not cells:
        print("Nothing to measure: no such cells, or the file has them all.", file=sys.stderr)
    needed = {*options.dtypes.split(","), "fp32", roofline.U8S8}
    rates = machine.Rates(2048 if options.quick else 4096, sorted(needed), about.get("rate_samples"))
    measurer = Measurer(wanted, rivals, seconds=2.0 if options.quick else 5.0)
    for threads in options.threads:
        read = measurer.read(threads)
        about.setdefault("bandwidth_gb_s", {})[str(threads)] = read.found_gb_s[read.name]
        about.setdefault("read_kernels_gb_s", {})[str(threads)] = read.found_gb_s
    visit = shapes.Visit(cells, options.minutes and 60 * options.minutes)
    started = time.perf_counter()
    skipped = []
    for number, cell in enumerate(visit):
        print(f"[{time.perf_counter() - started:5.0f} s] {number + 1}/{len(cells)} {cell}", file=sys.stderr, flush=True)
        if rates.rounds(cell.threads) == 0 or rates.spent_s < _RATE_SHARE * (time.perf_counter() - started):
            rates.sample(cell.threads)
        chosen, left = shapes.candidates_of(cell, wanted)
        skipped += [f"{cell}: {one}" for one in left]
        run.add(cell, measurer.rows(cell, chosen))
        run.save(rates)
    rivals.close()
    while cells and min(rates.rounds(threads) for threads in {cell.threads for cell in cells}) < _RATE_ROUNDS:
        for threads in sorted({cell.threads for cell in cells}):
            rates.sample(threads)
    run.document["left_out"] = [str(cell) for cell in visit.left_out] + skipped
    run.save(rates)
    return run.document


def main() -> int:
    options = parse()
    if options.table or options.figures:
        for path, text in ((options.table, report.table), (options.figures, figures.text)):
            if path:
                print(text(json.loads(path.read_text())))
        return 0
    if options.picture:
        report.picture(json.loads(options.source.read_text()), options.picture)
        return 0
    try:
        document = measure(options)
    except AutoqError as problem:
        print(problem, file=sys.stderr)
        return 1
    print(report.table(document))
    if document["left_out"]:
        print(f"\nNot measured ({len(document['left_out'])}):")
        print("\n".join(document["left_out"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
