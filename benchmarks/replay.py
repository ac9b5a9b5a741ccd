"""Time and memory of replaying a plan, and of loading a quantized checkpoint.

    python benchmarks/replay.py [--model smollm2] [--plan FILE] [--big-gb 2] [--threads 2] [--json FILE]

Each row is the median of three processes of its own. Time and peak memory start when everything is imported and the
kernels are loaded; peak memory is VmHWM reset then, less what was resident. The files are in the page cache: they were
just written, so this is what the programs cost, not the disk.

GGUF and plan       the float model read from its GGUF file and dequantized, every layer packed, the plan applied
folder and plan     the same from a Hugging Face folder (bfloat16, safetensors)
checkpoint          autoq.load_quantized, or autoq.hf.load, with all hashes checked
safetensors, read   load_file(backend="pread") of the same files: the tensors' bytes are in memory afterwards
safetensors, mapped load_file of the same files and a copy of every tensor: what a model does that keeps them
safetensors, lazy   load_file of the same files: nothing is read until it is used

The big model is a stack of random 4096×4096 layers in int8, built without float weights in all at once.
Without --plan the plan is int8wo on every linear layer but the head.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import autoq
from autoq.candidates.base import load_kernels

REPEATS = 3
SIDE = 4096
REPLAYS = ("GGUF and plan", "folder and plan")
FLOAT = "float"  # beside a checkpoint's folder: the model it was made of
WAYS = ("checkpoint", "safetensors, read", "safetensors, mapped", "safetensors, lazy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way of getting at one model."""

    model: str
    way: str
    seconds: float
    peak_bytes: int  # growth of the peak of resident memory
    tensor_bytes: int  # of all tensors loaded
    parts: dict[str, float]  # seconds of the steps, where there are several


def status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def measured(work: Callable[[], dict[str, float]]) -> tuple[float, int, dict[str, float]]:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    before, start = status_bytes("VmRSS"), time.perf_counter()
    parts = work()
    return time.perf_counter() - start, status_bytes("VmHWM") - before, parts


def big_factory(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16) for _ in range(layers)))


def save_big(folder: Path, layers: int) -> None:
    """Layers one at a time, so that the float model need not fit in memory."""
    model, plan = big_factory(0), autoq.Plan(layers={"0": "int8wo"})
    for index in range(layers):
        one = big_factory(1)
        autoq.apply(one, plan)
        one[0].plan_json = None
        model.add_module(str(index), one[0])
    autoq.save_quantized(model, folder)


def save_model(name: str, plan: Path | None, folder: Path) -> None:
    from autoq import loading

    loaded = loading.load_model(name)
    loaded.model.save_pretrained(folder.with_name(FLOAT))
    loaded.tokenizer.save_pretrained(folder.with_name(FLOAT))
    autoq.apply(loaded.model, wanted_plan(loaded.model, plan))
    autoq.save_quantized(loaded.model, folder)


def wanted_plan(model: nn.Module, path: Path | None) -> autoq.Plan:
    if path is not None:
        return autoq.Plan.load(path)
    names = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and "head" not in name]
    return autoq.Plan(layers=dict.fromkeys(names, "int8wo"))


def tensor_bytes(folder: Path) -> int:
    from autoq.checkpoint_files import opened

    with opened(folder) as checkpoint:
        return sum(form.nbytes for form in checkpoint.forms.values())


def replay(name: str, plan: Path | None) -> dict[str, float]:
    from autoq import loading

    start = time.perf_counter()
    model = loading.load_model(name).model
    read = time.perf_counter()
    autoq.apply(model, wanted_plan(model, plan))
    return {"load": read - start, "pack_apply": time.perf_counter() - read}


def load(way: str, folder: Path, layers: int) -> dict[str, float]:
    if way == "checkpoint":
        if layers:
            autoq.load_quantized(lambda: big_factory(layers), folder)
        else:
            autoq.hf.load(folder)
        return {}
    held = []
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path, backend="pread" if way.endswith("read") else "mmap")
        held.append({name: one.clone() for name, one in tensors.items()} if way.endswith("mapped") else tensors)
    return {}


def child(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    if options.child == "save":
        if options.layers:
            save_big(options.folder, options.layers)
        else:
            save_model(options.model, options.plan, options.folder)
        return
    load_kernels(torch.device("cpu"))
    if not options.layers:
        import gguf  # noqa: F401
        import transformers

        # Each is imported when it is first asked for.
        autoq.hf, transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.LlamaForCausalLM  # noqa: B018
    if options.child in REPLAYS:
        source = options.model if options.child == REPLAYS[0] else str(options.folder.with_name(FLOAT))
        found = measured(lambda: replay(source, options.plan))
    else:
        found = measured(lambda: load(options.child, options.folder, options.layers))
    print(json.dumps([*found, tensor_bytes(options.folder)]))


def in_a_child(way: str, folder: Path, layers: int, options: argparse.Namespace) -> str:
    command = [sys.executable, __file__, "--child", way, "--folder", str(folder), "--layers", str(layers)]
    command += ["--model", options.model, "--threads", str(options.threads)]
    command += ["--plan", str(options.plan)] if options.plan else []
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def row(model: str, way: str, folder: Path, layers: int, options: argparse.Namespace) -> Row:
    runs = [json.loads(in_a_child(way, folder, layers, options)) for _ in range(REPEATS)]
    return Row(
        model=model,
        way=way,
        seconds=statistics.median(run[0] for run in runs),
        peak_bytes=round(statistics.median(run[1] for run in runs)),
        tensor_bytes=runs[0][3],
        parts={name: statistics.median(run[2][name] for run in runs) for name in runs[0][2]},
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of replaying plans and loading checkpoints.")
    parser.add_argument("--model", default="smollm2", help="named as autoq does; it must be a transformers model")
    parser.add_argument("--plan", type=Path, help="a plan of this model")
    parser.add_argument("--big-gb", type=float, default=2.0, help="size of the random model's tensors; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.child:
        child(options)
        return 0
    rows = []
    print(f"{'model':12} {'way':20} {'seconds':>8} {'peak MB':>8} {'tensors MB':>10} {'peak/tensors':>12}  steps")
    with tempfile.TemporaryDirectory() as scratch:
        layers = int(options.big_gb * 1e9 / SIDE**2)
        for model, count in ((options.model, 0), *([(f"{layers} layers", layers)] if layers else [])):
            folder = Path(scratch) / f"model-{count}"
            in_a_child("save", folder, count, options)
            for way in WAYS if count else (*REPLAYS, *WAYS):
                one = row(model, way, folder, count, options)
                rows.append(one)
                peak, size = one.peak_bytes / 1e6, one.tensor_bytes / 1e6
                steps = ", ".join(f"{name} {seconds:.2f}" for name, seconds in one.parts.items())
                print(
                    f"{model:12} {way:20} {one.seconds:8.3f} {peak:8.1f} {size:10.1f} {peak / size:12.2f}  {steps}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
