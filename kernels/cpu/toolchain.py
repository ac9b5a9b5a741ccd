"""The C++ compiler: where it is, what it is told, and what a build depends on."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.utils import cpp_extension

Isa = Literal["portable", "avx2", "avxvnni", "avx512"]

_HERE = Path(__file__).parent
_COMPILERS = ("g++", "c++")
_COMPILE_SECONDS = 600
_VERSION_SECONDS = 30
# Linux's names of the features, and the compiler's flags for them.
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")
_FEATURES: dict[Isa, tuple[str, ...]] = {
    "avx512": _AVX512,
    "avxvnni": (*_AVX2, "avxvnni"),
    "avx2": _AVX2,
    "portable": (),
}
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-fno-math-errno", "-Wall", "-Wno-psabi")
_FLAGS += ("-Wno-maybe-uninitialized",)  # GCC 12 warns of its own AVX-512 header


class KernelBuildError(RuntimeError):
    """The kernels could not be compiled, or do not work on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        path: the program.
        version: the first line it prints about itself.
    """

    path: str
    version: str


def find_compiler(name: str | None) -> Compiler:
    """The compiler called `name`, or the first of g++ and c++.

    Raises:
        KernelBuildError: there is none, or it does not start.
    """
    names = _COMPILERS if name is None else (name,)
    path = next((found for found in map(shutil.which, names) if found), None)
    if path is None:
        raise KernelBuildError(f"no C++ compiler: looked for {', '.join(names)}. Install g++ 11 or later")
    version = _run([path, "--version"], timeout=_VERSION_SECONDS).partition("\n")[0]
    return Compiler(path=path, version=version)


def usable_isas() -> tuple[Isa, ...]:
    """The instruction sets that the kernels are written for and this processor has, the widest first."""
    present = _cpu_features()
    return tuple(isa for isa, needed in _FEATURES.items() if present.issuperset(needed))


def best_isa() -> Isa:
    """The widest of `usable_isas`."""
    return usable_isas()[0]


def missing_features(isa: Isa) -> tuple[str, ...]:
    """What this processor lacks for a build."""
    present = _cpu_features()
    return tuple(feature for feature in _FEATURES[isa] if feature not in present)


def build_key(isa: Isa, compiler: Compiler) -> dict[str, str]:
    """All that a build depends on, in clear."""
    digest = hashlib.sha256()
    for source in sorted(_HERE.glob("*.cpp")) + sorted(_HERE.glob("*.h")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return {
        "isa": isa,
        "sources": digest.hexdigest(),
        "torch": torch.__version__,
        "compiler": compiler.version,
        "flags": " ".join(_flags(isa)),
    }


def compile_library(isa: Isa, compiler: Compiler, folder: Path, *, extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile the kernels, one compiler process per source.

    Args:
        isa: the instruction set to compile for.
        compiler: what to compile with.
        folder: an empty folder for the objects.
        extra_flags: for compiling and linking, after the usual ones; such as a sanitizer's.

    Returns:
        The shared library, in `folder`.

    Raises:
        KernelBuildError: the compiler failed; the message has its words.
    """
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    jobs: list[tuple[list[str], subprocess.Popen[str]]] = []
    objects: list[str] = []
    try:
        for source in sorted(_HERE.glob("*.cpp")):
            objects.append(str(folder / f"{source.stem}.o"))
            command = [compiler.path, *_flags(isa), *extra_flags, *includes, "-c", str(source), "-o", objects[-1]]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
            )
            jobs.append((command, process))
        for command, process in jobs:
            output, _ = process.communicate(timeout=_COMPILE_SECONDS)
            _check(command, process.returncode, output)
    finally:
        _stop(process for _, process in jobs)
    library = folder / "kernels.so"
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    # Linked without -fopenmp: OpenMP's functions must be those of the one runtime torch has loaded.
    _run(
        [compiler.path, "-shared", *extra_flags, *objects, "-o", str(library), *paths, "-ltorch_cpu", "-lc10"],
        timeout=_COMPILE_SECONDS,
    )
    return library


def _stop(processes: Iterable[subprocess.Popen[str]]) -> None:
    """End those that still run, each with its process group: a compiler is several processes."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _flags(isa: Isa) -> tuple[str, ...]:
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return (*_FLAGS, abi, f"-DAUTOQ_ISA={isa}", *(f"-m{feature}" for feature in _FEATURES[isa]))


def _cpu_features() -> frozenset[str]:
    """The processor's features by the compiler's names; empty where Linux does not list them."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists():
        return frozenset()
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].replace("avx512_", "avx512").replace("avx_vnni", "avxvnni").split())


def _run(command: list[str], *, timeout: float) -> str:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelBuildError(f"{command[0]} did not run: {error}") from error
    _check(command, done.returncode, done.stdout)
    return done.stdout


def _check(command: list[str], code: int, output: str) -> None:
    if code != 0:
        raise KernelBuildError(f"{' '.join(command)} failed with {code}:\n{output[-4000:]}")
