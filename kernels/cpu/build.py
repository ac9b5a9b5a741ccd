"""Compiles, tries out, caches and loads the C++ kernels.

A build is a shared library in the cache folder, named after its instruction set and a hash of all it depends
on. It is compiled once, tried out once in a child process, and from then on loaded in milliseconds. Where
nothing can be built, the plain-PyTorch definitions of `autoq_kernels.ops` keep working, and
`BuildStatus.reason` says why.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from autoq_kernels import ops
from autoq_kernels.cpu import probe, toolchain
from autoq_kernels.cpu.toolchain import Isa, KernelBuildError, best_isa

__all__ = [
    "BuildStatus",
    "Isa",
    "KernelBuildError",
    "best_isa",
    "default_cache_dir",
    "kernel_name",
    "load",
    "quantize",
    "sinkhorn",
    "status",
]

_log = logging.getLogger(__name__)
_OPERATORS = ("linear", "dequantize", "embedding", "attention", "store_kv", "kernel_name", "quantize", "sinkhorn")
_DEFAULT_OPERATORS = ("linear", "dequantize", "embedding", "attention", "store_kv")
_REFERENCE = "torch.reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildStatus:
    """What runs autoq's operators on the CPU.

    Attributes:
        isa: the instruction set of the build; None where the plain-PyTorch definitions run.
        path: the shared library.
        operators: the operators it registered.
        reason: why there is no build, or not the best one; None where all is well.
    """

    isa: Isa | None
    path: Path | None
    operators: tuple[str, ...]
    reason: str | None


def default_cache_dir() -> Path:
    """``~/.cache/autoq/kernels``."""
    return Path.home() / ".cache" / "autoq" / "kernels"


def load(isa: Isa | None = None, *, cache_dir: Path | None = None, compiler: str | None = None) -> BuildStatus:
    """Build the kernels if they are not in the cache, and load them into this process.

    The operators appear as ``torch.ops.autoq_<isa>``. With ``isa=None`` the best build that works also becomes
    the CPU implementation of ``autoq::linear`` and ``autoq::dequantize``. Repeated calls cost nothing.

    Args:
        isa: one instruction set, refused if it does not work; None tries the best, then the portable one.
        cache_dir: where builds are kept; None is `default_cache_dir`.
        compiler: the C++ compiler; None looks for g++ and c++.

    Returns:
        What was loaded; with ``isa=None`` possibly nothing, with the reason.

    Raises:
        KernelBuildError: the instruction set asked for cannot be built or does not work here.
    """
    folder = cache_dir or default_cache_dir()
    return _load_best(folder, compiler) if isa is None else _load_one(isa, folder, compiler)


def status() -> BuildStatus:
    """What ``autoq::linear`` runs on the CPU, built first if need be."""
    return load()


def kernel_name(head: Tensor, m: int, dtype: torch.dtype) -> str:
    """The kernel ``autoq::linear`` runs on the CPU for M rows of x.

    Args:
        head: uint8 [128], a view of the packed weight's first bytes.
        m: rows of x.
        dtype: of x.

    Returns:
        Such as ``"avx2.int4.gemv"``; ``"torch.reference"`` without a build.
    """
    built = status().isa
    if built is None:
        return _REFERENCE
    return cast(str, getattr(torch.ops, f"autoq_{built}").kernel_name(head, m, dtype))


def quantize(
    weight: Tensor,
    buffer: Tensor,
    *,
    method: Literal["rtn", "hqq"] = "rtn",
    column_scale: Tensor | None = None,
    beta: float = 0.0,
    kappa: float = 0.0,
    iterations: int = 0,
) -> bool:
    """Quantize a weight into an allocated buffer, on as many threads as torch uses.

    Args:
        weight: float32, bfloat16 or float16 [N, K] on the CPU, finite; any strides.
        buffer: from `layout.allocate`, of an int8, fp6 or affine weight [N, K]; every section is filled.
        method: rounding to nearest, or, affine only, half-quadratic quantization.
        column_scale: float32 [K], given exactly where the buffer has one; the weight is divided by it.
        beta: of half-quadratic quantization: initial strength of the quadratic penalty, at most 500 at the end.
        kappa: the factor on `beta` per iteration.
        iterations: iterates judged.

    Returns:
        False without a build; the buffer is then as it was.
    """
    built = status().isa
    if built is None:
        return False
    getattr(torch.ops, f"autoq_{built}").quantize(weight, buffer, method, column_scale, beta, kappa, iterations)
    return True


def sinkhorn(weight: Tensor, group_size: int, iterations: int) -> Tensor | None:
    """The column factors that even out every tile of all rows × `group_size` columns.

    Args:
        weight: float32, bfloat16 or float16 [N, K] on the CPU, finite; any strides.
        group_size: columns of a tile; the last may be narrower.
        iterations: iterates judged; the first is the tile as it is.

    Returns:
        float32 [K]; None without a build.
    """
    built = status().isa
    if built is None:
        return None
    return cast(Tensor, getattr(torch.ops, f"autoq_{built}").sinkhorn(weight, group_size, iterations))


@functools.cache
def _load_best(folder: Path, compiler: str | None) -> BuildStatus:
    reasons: list[str] = []
    for isa in toolchain.usable_isas():
        try:
            built = _load_one(isa, folder, compiler)
        except KernelBuildError as error:
            reasons.append(f"{isa}: {error}")
            _log.warning("autoq's %s CPU kernels are not available: %s", isa, error)
            continue
        ctypes.CDLL(str(built.path)).autoq_register_default()
        operators = (*built.operators, *(f"{ops.NAMESPACE}::{name}" for name in _DEFAULT_OPERATORS))
        return BuildStatus(isa=isa, path=built.path, operators=operators, reason="; ".join(reasons) or None)
    return BuildStatus(isa=None, path=None, operators=(), reason="; ".join(reasons))


@functools.cache
def _load_one(isa: Isa, folder: Path, compiler: str | None) -> BuildStatus:
    missing = toolchain.missing_features(isa)
    if missing:
        raise KernelBuildError(f"this processor lacks {', '.join(missing)}, which the {isa} kernels need")
    path = _ensure_built(isa, folder, toolchain.find_compiler(compiler))
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    operators = tuple(f"autoq_{isa}::{name}" for name in _OPERATORS)
    return BuildStatus(isa=isa, path=path, operators=operators, reason=None)


def _ensure_built(isa: Isa, folder: Path, compiler: toolchain.Compiler) -> Path:
    """The library's path, compiled and tried out unless the cache has it unharmed."""
    key = toolchain.build_key(isa, compiler)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    library = folder / f"{isa}-{digest}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(library.with_suffix(".lock")):
            if not _intact(library):
                _refuse_known(library)
                _build(isa, key, library, compiler)
    except OSError as error:
        raise KernelBuildError(f"the kernel cache {folder} cannot be used: {error}") from error
    return library


def _build(isa: Isa, key: dict[str, str], library: Path, compiler: toolchain.Compiler) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as scratch:
        made = toolchain.compile_library(isa, compiler, Path(scratch))
        broken = probe.failure(made, f"autoq_{isa}")
        if broken is not None:
            reason = f"the {isa} kernels compiled but do not work: {broken.reason}"
            if broken.lasting:
                _write_failure(library, reason)
            raise KernelBuildError(reason)
        record = made.with_suffix(".json")
        record.write_text(json.dumps({"key": key, "sha256": _sha256(made)}, indent=1))
        made.replace(library)  # the record last: a library without its record is built anew
        record.replace(library.with_suffix(".json"))


def _write_failure(library: Path, reason: str) -> None:
    """Keep why a build does not work, so that not every process compiles it again to find out."""
    part = library.with_suffix(".part")
    part.write_text(reason)
    part.replace(library.with_suffix(".failed"))


def _refuse_known(library: Path) -> None:
    """Raise what an earlier process found out about this build."""
    record = library.with_suffix(".failed")
    if record.exists():
        raise KernelBuildError(f"{record.read_text()} (found out before; delete {record} to try again)")


def _intact(library: Path) -> bool:
    """Whether the library is the one its record describes."""
    record = library.with_suffix(".json")
    if not (library.exists() and record.exists()):
        return False
    try:
        expected = json.loads(record.read_text())["sha256"]
    except (ValueError, KeyError, TypeError):
        _log.warning("the record of %s is damaged; it is built anew", library)
        return False
    if expected != _sha256(library):
        _log.warning("%s is damaged; it is built anew", library)
        return False
    return True


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock among processes; the kernel of the system releases it if this one dies."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
