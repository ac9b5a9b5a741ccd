"""What ``autoq doctor`` tells: the device, what runs on it, and what to do about each problem."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from autoq.cache import Fingerprint, default_folder
from autoq.profiler import read_bandwidth_gb_s

_PACKAGES = ("torch", "triton", "optuna", "pandas", "pyarrow", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One line of the diagnosis.

    Attributes:
        name: what it is about.
        value: what was found.
        advice: what to do about it; empty where all is well.
    """

    name: str
    value: str
    advice: str = ""


def diagnose(cache_dir: Path | None = None) -> list[Fact]:
    """Look at this machine; compiles the kernels if they are not in the cache.

    Args:
        cache_dir: the cache folder; None is the default one.
    """
    device = Fingerprint.current("cpu")
    return [
        Fact(name="autoq", value=f"{_version('autoq')}, Python {platform.python_version()}"),
        Fact(name="packages", value=", ".join(f"{name} {_version(name)}" for name in _PACKAGES)),
        Fact(name="processor", value=device.name),
        Fact(name="instruction sets", value=device.isa or "none that autoq has kernels for"),
        Fact(name="caches", value=device.caches or "unknown"),
        Fact(name="threads", value=f"{device.threads} of {device.cores} logical processors"),
        _gpu(),
        Fact(name="read bandwidth", value=f"{read_bandwidth_gb_s():.1f} GB/s, measured now"),
        _compiler(),
        _kernels(),
        _cache(cache_dir or default_folder()),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> Fact:
    import torch

    if not torch.cuda.is_available():
        return Fact(name="GPU", value="none that torch can use")
    from autoq.candidates.base import load_cuda_kernels

    name = Fingerprint.current("cuda").name
    if not load_cuda_kernels():
        advice = "Install triton, in the version that torch names; without it quantized layers are slow on the GPU."
        return Fact(name="GPU", value=f"{name}, no kernels of autoq", advice=advice)
    return Fact(name="GPU", value=f"{name}, Triton kernels")


def _compiler() -> Fact:
    from autoq_kernels.cpu import toolchain

    try:
        found = toolchain.find_compiler(None)
    except toolchain.KernelBuildError as problem:
        advice = "Install a C++ compiler (Debian: apt-get install g++); torch.compile needs one as well."
        return Fact(name="compiler", value=str(problem), advice=advice)
    return Fact(name="compiler", value=f"{found.version} ({found.path})")


def _kernels() -> Fact:
    from autoq_kernels.cpu import build

    status = build.load()
    if status.isa is None:
        advice = "Quantized layers run on PyTorch's own operators, which is slow. Repair the compiler and run again."
        return Fact(name="kernels", value=status.reason or "not built", advice=advice)
    value = f"{status.isa}: {', '.join(status.operators)}"
    return Fact(name="kernels", value=value, advice=status.reason or "")


def _cache(folder: Path) -> Fact:
    near = next((place for place in (folder, *folder.parents) if place.exists()), Path("/"))
    if not os.access(near, os.W_OK):
        return Fact(name="cache", value=f"{folder} is not writable", advice="Pass --cache-dir, or set AUTOQ_CACHE_DIR.")
    profiles = folder / "profiles"
    devices = sum(1 for _ in profiles.iterdir()) if profiles.is_dir() else 0
    return Fact(name="cache", value=f"{folder}, measurements of {devices} device{'s' if devices != 1 else ''}")
