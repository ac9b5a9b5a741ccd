"""Time and memory of packing weights.

    python benchmarks/packing.py [--model smollm2] [--schemes int8wo sinq ...] [--threads 2] [--json FILE]

Packs a 4096×11008 float32 matrix in every scheme, and with --model every linear layer of the model (and a tied
head) in the model's own dtype. Each scheme has a process of its own, in which small weights are packed first, so
that nothing is compiled or loaded while the clock runs; the time is the median of three. Peak memory is the
kernel's own figure, VmHWM reset before packing: all that was resident at once beyond what was before, the result
included. For a model the packed layers are kept until the last is done, as applying a plan would.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from autoq import candidates

N, K = 4096, 11_008
REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One scheme's packing of one matrix, or of a model (k is 0, n the number of layers)."""

    scheme: str
    n: int
    k: int
    seconds: float
    peak_extra_bytes: int
    bytes_per_second: float  # of float weights read


def status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def matrix() -> list[torch.Tensor]:
    return [torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02]


def model_weights(name: str) -> list[torch.Tensor]:
    from autoq import loading

    model = loading.load_model(name).model
    return [module.weight.detach() for module in model.modules() if isinstance(module, torch.nn.Linear)]


def measure(scheme: str, model: str | None, threads: int) -> Row:
    torch.set_num_threads(threads)
    candidate = candidates.parse(scheme)
    weights = matrix() if model is None else model_weights(model)
    candidate.pack(torch.randn(64, 256))
    times = []
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading left behind would hide what packing needs
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    before = status_bytes("VmRSS")
    for _ in range(REPEATS):
        start = time.perf_counter()
        packed = [candidate.pack(weight) for weight in weights]
        times.append(time.perf_counter() - start)
        del packed
    seconds = statistics.median(times)
    n, k = (N, K) if model is None else (len(weights), 0)
    return Row(
        scheme=str(candidate),
        n=n,
        k=k,
        seconds=seconds,
        peak_extra_bytes=status_bytes("VmHWM") - before,
        bytes_per_second=sum(weight.nbytes for weight in weights) / seconds,
    )


def in_a_child(scheme: str, options: argparse.Namespace, model: str | None) -> Row:
    command = [sys.executable, __file__, "--child", scheme, "--threads", str(options.threads)]
    done = subprocess.run([*command, *(["--model", model] if model else [])], stdout=subprocess.PIPE, check=True)
    return Row(**json.loads(done.stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description="Time and memory of packing weights.")
    parser.add_argument("--model", help="also pack every linear layer of this model, named as autoq does")
    parser.add_argument("--schemes", nargs="+", default=[str(c) for c in candidates.ALL if c.key != "none"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(asdict(measure(options.child, options.model, options.threads))))
        return 0
    rows = []
    for model in (None, options.model) if options.model else (None,):
        title = f"{options.model}" if model else f"{N}x{K} float32"
        print(f"\n{title}, {options.threads} threads\n{'scheme':44} {'seconds':>8} {'extra MB':>9} {'GB/s':>6}")
        for scheme in options.schemes:
            row = in_a_child(scheme, options, model)
            rows.append(row)
            peak, rate = row.peak_extra_bytes / 1e6, row.bytes_per_second / 1e9
            print(f"{row.scheme:44} {row.seconds:8.3f} {peak:9.1f} {rate:6.2f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
