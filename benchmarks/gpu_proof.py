"""Compiles autoq's Triton kernels for GPUs that are not there, and checks what came out.

    python benchmarks/gpu_proof.py                                   everything, with the installed Triton
    python benchmarks/gpu_proof.py --also .venv/triton-3.7.1         and with the Triton in that folder
    python benchmarks/gpu_proof.py --sample 40 --seed 0              typical defaults and a sample, as CI does
    python benchmarks/gpu_proof.py --json all.json --table all.md    files to write

Every configuration that the kernels may be tuned to is compiled for each architecture, without a GPU; registers,
spills, shared memory, widths of loads and matrix instructions are read from the result. A check that fails is listed,
and the exit status is 1. Results are kept in a folder by a hash of all that they depend on: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_bench import proof_cases, proof_pool, proof_report
from gpu_bench.proof_checks import judged
from gpu_bench.proof_rows import described
from gpu_bench.proof_targets import ARCHITECTURES

_HERE = Path(__file__).resolve().parent
_CACHE = _HERE.parent / "build" / "gpu-proof"
_EVERY = 25  # compilations between two lines of progress


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--also", type=Path, help="folder with another Triton, for a second run with --main")
    parser.add_argument("--also-sample", type=int, metavar="COUNT", help="as --sample, of the second run alone")
    parser.add_argument("--sample", type=int, metavar="COUNT", help="the typical defaults and so many others, not all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--schemes", nargs="+", help="only formats whose name begins so")
    parser.add_argument("--main", action="store_true", help="only the formats whose whole space is compiled")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after these; run again to go on")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--cache", type=Path, default=_CACHE, help="folder of results")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--table", type=Path, help="file for the tables")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    started = time.monotonic()
    document = measured(options)
    if options.also:
        other = _run_with(options.also, options.also_sample)
        document["rows"] += other["rows"]
        document["left_out"] += other["left_out"]
    document["about"] = about(document, time.monotonic() - started)
    failed, known = judged(document["rows"])
    if options.json:
        options.json.write_text(json.dumps(document, indent=1))
    text = proof_report.report(document)
    if options.table:
        options.table.write_text(text)
    for row, check, found in failed[:50]:
        where = f"{row['triton']} {row['architecture']} {row['scheme']} {row['dtype']} m{row['m']} {row['kernel']}"
        print(f"FAILED {check}: {where} {row['config']}: {found[:400]}")
    print(f"{len(document['rows'])} compiled, {len(failed)} checks failed, {len(known)} known exceptions")
    return 1 if failed else 0


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The rows of the installed Triton."""
    import triton

    architectures = [ARCHITECTURES[name] for name in options.architectures]
    found = proof_cases.compilations(proof_cases.chosen(options.schemes, main=options.main), architectures)
    keys = list(found)
    if options.sample is not None:
        keys = proof_cases.sampled(found, options.sample, options.seed)
    print(f"Triton {triton.__version__}: {len(keys)} of {len(found)} kernels to compile", flush=True)
    inspector = _inspector()
    jobs = [(key, found[key][0], any(case.default for case in found[key][1])) for key in keys]
    rows: dict[str, dict[str, Any]] = {}
    started, made = time.monotonic(), Counter()

    def progress(key: str, result: dict[str, Any], kept: bool) -> None:
        one, cases = found[key]
        rows[key] = described(one, cases, triton.__version__) | result
        made[kept] += 1
        if len(rows) % _EVERY == 0 or len(rows) == len(jobs):
            print(f"{len(rows)} of {len(jobs)}, {made[True]} kept, {time.monotonic() - started:.0f} s", flush=True)

    proof_pool.run(
        jobs, processes=options.jobs, cache=options.cache / inspector, progress=progress, seconds=60 * options.minutes
    )
    command = "make gpu-proof" if options.also else "python benchmarks/gpu_proof.py"
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": [rows[key] for key in keys if key in rows],
        "left_out": len(keys) - len(rows),
    }


def _inspector() -> str:
    """A hash of what reads the results."""
    parts = [(_HERE / "gpu_bench" / f"proof_{name}.py").read_bytes() for name in ("compile", "inspect", "loads")]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def _run_with(folder: Path, sample: int | None) -> dict[str, Any]:
    """The document of this run's main formats with the Triton in a folder."""
    with tempfile.TemporaryDirectory(prefix="gpu-proof-") as scratch:
        path = Path(scratch) / "rows.json"
        own = sys.argv[1:]
        at = own.index("--also")
        rest = own[:at] + own[at + 2 :]
        if sample is not None:
            rest += ["--sample", str(sample)]
        environment = dict(os.environ, PYTHONPATH=f"{folder.resolve()}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        files = ["--json", str(path), "--table", os.devnull]
        command = [sys.executable, str(Path(__file__).resolve()), *rest, "--main", *files]
        status = subprocess.run(command, env=environment, check=False).returncode
        if not path.exists():
            raise SystemExit(f"the run with {folder} ended with {status} and no rows")
        return json.loads(path.read_text())


def about(document: dict[str, Any], seconds: float) -> list[str]:
    """What was covered, in words."""
    rows = document["rows"]
    main_rows = [row for row in rows if row["main"]]
    configurations = len({row["config"] for row in main_rows if row["config"]})
    whole = sorted({row["scheme"] for row in main_rows if not row["default"]})
    kept = sum(row.get("seconds", 0) for row in rows)
    left = document["left_out"]
    return [
        *([f"**{left} kernels were left out for lack of time: run the command again to go on.**"] if left else []),
        f"{len(rows)} kernels were compiled for {len({row['architecture'] for row in rows})} architectures, each once "
        f"for all the products that it serves ({sum(row['serves'] for row in rows)}). Shapes [N, K]: "
        f"{', '.join(f'{n}×{k}' for n, k in proof_cases.SHAPES_NK)} (Llama-3-8B) and "
        f"{'×'.join(map(str, proof_cases.ODD_NK))}; M: {', '.join(map(str, proof_cases.ROWS))}.",
        "Default configurations: every format and group size in bf16, those named below in fp16 too. The whole space "
        f"({configurations} configurations with the defaults), each at one shape and M, in bf16: "
        f"{', '.join(whole) or 'nothing'}; a second Triton, if there is one, compiled these formats only.",
        f"Took {seconds / 60:.0f} minutes, with results kept from earlier runs; {kept / 60:.0f} minutes of compiling.",
    ]


if __name__ == "__main__":
    sys.exit(main())
