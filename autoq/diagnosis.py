"""What ``autoq doctor`` tells: the device, what runs on it and how fast, and what to do about each problem."""

from __future__ import annotations

import math
import os
import platform
import shutil
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from autoq import candidates, plugins
from autoq.cache import Fingerprint, default_folder
from autoq.errors import CandidateError
from autoq.profiler import read_bandwidth_gb_s

Progress = Callable[[str, str, int, int], None]
_PACKAGES = ("torch", "triton", "optuna", "pandas", "pyarrow", "transformers")
_OLDEST_TORCH = (2, 11)
_LITTLE_DISK = 1 << 30
_LITTLE_MEMORY = 2 << 30
_CGROUP = Path("/sys/fs/cgroup")
_ROWS, _SIZE, _ROUNDS = 256, 2048, 3  # of the products timed: rows of x, inputs and outputs of the weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One line of the diagnosis.

    Attributes:
        name: what it is about.
        value: what was found.
        advice: what to do about it; empty where all is well.
        problem: whether it stops autoq or makes it slow; advice without a problem is a hint.
        figures: what was measured, by its unit.
    """

    name: str
    value: str
    advice: str = ""
    problem: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All but the name."""
        return {name: value for name, value in asdict(self).items() if name != "name"}


def diagnose(cache_dir: Path | None = None, progress: Progress | None = None) -> list[Fact]:
    """Look at this machine; compiles the kernels if they are not in the cache, and measures for a few seconds.

    Args:
        cache_dir: the cache folder; None is the default one.
        progress: called with (``doctor``, text, done, total).
    """
    device = Fingerprint.current("cpu")
    checks: dict[str, Callable[[], Fact]] = {
        "autoq": lambda: Fact(name="autoq", value=f"{_version('autoq')}, Python {platform.python_version()}"),
        "packages": _packages,
        "processor": lambda: Fact(name="processor", value=f"{device.name}; caches {device.caches or 'unknown'}"),
        "instruction sets": lambda: _instruction_sets(device),
        "threads": lambda: _threads(device.threads, processors()),
        "load": _load,
        "memory": _memory,
        "GPU": _gpu,
        "compiler": _compiler,
        "kernels": _kernels,
        "plugins": _plugins,
        "read bandwidth": _bandwidth,
        "products": _products,
        "cache": lambda: _cache(cache_dir or default_folder()),
    }
    found = []
    for done, (name, check) in enumerate(checks.items()):
        if progress is not None:
            progress("doctor", name, done, len(checks))
        found.append(check())
    if progress is not None:
        progress("doctor", "", len(checks), len(checks))
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _packages() -> Fact:
    value = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        return Fact(name="packages", value=value, advice=f"Install torch {oldest} or later.", problem=True)
    hint = "" if _version("transformers") != "not installed" else "For Hugging Face models: pip install 'autoq[hf]'."
    return Fact(name="packages", value=value, advice=hint)


def _instruction_sets(device: Fingerprint) -> Fact:
    from autoq_kernels.cpu import toolchain

    usable = ", ".join(toolchain.usable_isas())
    if toolchain.best_isa() == "portable":
        advice = "autoq's fast kernels are for x86-64 with AVX2 or more; here they are plain C++."
        return Fact(name="instruction sets", value=device.isa or "none of AVX2, AVX-VNNI, AVX-512", advice=advice)
    return Fact(name="instruction sets", value=f"{device.isa}; kernels: {usable}")


def processors() -> float:
    """How many logical processors this process may use: its affinity, or a container's quota if that is less."""
    allowed = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota, period = [*_words(_CGROUP / "cpu.max"), "max", "max"][:2]
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        allowed = min(allowed, int(quota) / int(period))
    return allowed


def _threads(threads: int, allowed: float) -> Fact:
    value = f"{threads}, on {allowed:g} of {os.cpu_count()} logical processors"
    if threads <= math.ceil(allowed):
        return Fact(name="threads", value=value)
    advice = f"Set OMP_NUM_THREADS={math.ceil(allowed)}: threads that share a processor wait for each other."
    return Fact(name="threads", value=value, advice=advice, problem=True)


def _load() -> Fact:
    busy, allowed = os.getloadavg()[0], processors()
    advice = "" if busy < 0.5 * allowed else "Other programs are running; stop them before tuning, or times scatter."
    return Fact(name="load", value=f"{busy:.2f} processes in the last minute", advice=advice)


def _memory() -> Fact:
    lines = dict(line.split(":", 1) for line in _text(Path("/proc/meminfo")).splitlines() if ":" in line)
    total, free = (int(lines.get(name, "0 kB").split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    limit, used = (_words(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit and limit[0].isdigit() and used:
        total = min(total, int(limit[0]))
        free = min(free, max(0, int(limit[0]) - int(used[0])))
    if not total:
        return Fact(name="memory", value="unknown")
    little = "" if free >= _LITTLE_MEMORY else "Little is left: tuning keeps the model and copies of its layers."
    return Fact(name="memory", value=f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB available", advice=little)


def _gpu() -> Fact:
    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").exists():
            advice = (
                "Install a build of torch for CUDA, or its driver: there is an NVIDIA driver that torch cannot use."
            )
            return Fact(name="GPU", value="none that torch can use", advice=advice, problem=True)
        return Fact(name="GPU", value="none that torch can use")
    from autoq.candidates.base import load_cuda_kernels

    name = Fingerprint.current("cuda").name
    if not load_cuda_kernels():
        advice = "Install triton, in the version that torch names; without it quantized layers are slow on the GPU."
        return Fact(name="GPU", value=f"{name}, no kernels of autoq", advice=advice, problem=True)
    return Fact(name="GPU", value=f"{name}, Triton kernels")


def _compiler() -> Fact:
    from autoq_kernels.cpu import toolchain

    try:
        found = toolchain.find_compiler(None)
    except toolchain.KernelBuildError as problem:
        advice = "Install a C++ compiler (Debian: apt-get install g++); torch.compile needs one as well."
        return Fact(name="compiler", value=str(problem), advice=advice, problem=True)
    value = f"{found.version} ({found.path})"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        advice = "Install Python's headers (Debian: apt-get install python3-dev): torch.compile needs them."
        return Fact(name="compiler", value=f"{value}, no Python.h", advice=advice, problem=True)
    return Fact(name="compiler", value=value)


def _kernels() -> Fact:
    from autoq_kernels.cpu import build

    status = build.load()
    if status.isa is None:
        advice = "Quantized layers run on PyTorch's own operators, which is slow. Repair the compiler and run again."
        return Fact(name="kernels", value=f"not built: {status.reason}", advice=advice, problem=True)
    value = f"{status.isa}, {status.path}"
    if status.reason:
        advice = f"Slower than they could be. Repair what is named, then run again. {status.reason}"
        return Fact(name="kernels", value=value, advice=advice, problem=True)
    return Fact(name="kernels", value=value)


def _plugins() -> Fact:
    """The schemes of other packages; each is imported, as a search would."""
    try:
        found = plugins.installed()
    except CandidateError as problem:
        return Fact(name="plugins", value="not usable", advice=str(problem), problem=True)
    broken = []
    for one in found:
        try:
            plugins.load(one.key)
        except CandidateError as problem:
            broken.append(str(problem))
    value = ", ".join(f"{one.key} ({one.package})" for one in found) or "none"
    return Fact(name="plugins", value=value, advice=" ".join(broken), problem=bool(broken))


def _bandwidth() -> Fact:
    found = read_bandwidth_gb_s()
    return Fact(name="read bandwidth", value=f"{found:.1f} GB/s, measured now", figures={"GB/s": found})


def _products() -> Fact:
    rates = product_rates()
    text = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    return Fact(name="dot products", value=f"{text} · 10⁹ multiply-adds/s, measured now", figures=rates)


def product_rates(rows: int = _ROWS, size: int = _SIZE) -> dict[str, float]:
    """The best rate of a large product, in 10⁹ multiply-adds per second: the ceiling of prompts.

    Args:
        rows: of x.
        size: inputs and outputs of the weight.

    Returns:
        ``float32`` and ``bfloat16`` by PyTorch's own product; ``int8`` by autoq's kernel, where there is one.
    """
    from autoq_kernels.cpu import build

    generator = torch.Generator().manual_seed(0)
    x_MK, w_NK = (torch.randn(n, size, generator=generator) for n in (rows, size))
    half = x_MK.bfloat16(), w_NK.bfloat16()
    calls: dict[str, Callable[[], object]] = {
        "float32": lambda: torch.nn.functional.linear(x_MK, w_NK),
        "bfloat16": lambda: torch.nn.functional.linear(*half),
    }
    if build.status().isa is not None:
        int8 = candidates.parse("int8dq")
        packed = int8.pack(w_NK)
        calls["int8"] = lambda: int8.linear(x_MK, packed)
    return {name: rows * size**2 / _best_s(call) / 1e9 for name, call in calls.items()}


def _best_s(call: Callable[[], object]) -> float:
    call()
    best = math.inf
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def _cache(folder: Path) -> Fact:
    near = next((place for place in (folder, *folder.absolute().parents) if place.exists()), Path("/"))
    if not near.is_dir() or not os.access(near, os.W_OK):
        advice = "Pass --cache-dir, or set AUTOQ_CACHE_DIR."
        return Fact(name="cache", value=f"{folder} is not writable", advice=advice, problem=True)
    profiles = folder / "profiles"
    devices = sum(1 for _ in profiles.iterdir()) if profiles.is_dir() else 0
    free = shutil.disk_usage(near).free
    value = f"{folder}, measurements of {devices} device{'s' if devices != 1 else ''}, {free / 1e9:.1f} GB free"
    advice = "" if free >= _LITTLE_DISK else "Free space there, or pass --cache-dir: a full disk ends a tuning."
    return Fact(name="cache", value=value, advice=advice, problem=bool(advice))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # another system, or a container that hides it
        return ""


def _words(path: Path) -> list[str]:
    return _text(path).split()
