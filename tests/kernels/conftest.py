import hashlib
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from autoq_kernels.cpu import build, toolchain

_HERE = Path(__file__).parent
_SIMDE = Path(sys.prefix) / "simde" / "usr" / "include"  # libsimde-dev, unpacked there by the Makefile
_EMULATED = {"avx512": "-DEMULATED_AVX512", "avxvnni": "-DEMULATED_AVXVNNI"}


@pytest.fixture(scope="session", params=["avx512", "avxvnni", "avx2", "portable"])
def isa(request):
    """Every instruction set the kernels are written for, emulated where this processor lacks it."""
    missing = toolchain.missing_features(request.param)
    if not missing:
        build.load(request.param)
        return request.param
    if request.param not in _EMULATED or not _SIMDE.exists():
        pytest.skip(f"this processor lacks {missing}, and there is no libsimde-dev in {_SIMDE.parents[1]}")
    return _load_emulated(request.param, request.config.cache.mkdir("emulated-kernels"))


def _load_emulated(isa, cache):
    name, compiler, emulation = f"{isa}_emulated", toolchain.find_compiler(None), _HERE / "emulation.h"
    flags = ("-O1", "-UAUTOQ_ISA", f"-DAUTOQ_ISA={name}", '-DAUTOQ_EMULATION="emulation.h"', _EMULATED[isa])
    key = repr((toolchain.build_key("avx2", compiler), flags, emulation.read_text()))
    library = cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        flags += (f"-I{_HERE}", "-isystem", str(_SIMDE))
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            toolchain.compile_library("avx2", compiler, Path(scratch), extra_flags=flags).replace(library)
        for stale in cache.glob(f"{name}-*.so"):
            if stale != library:
                stale.unlink()
    torch.ops.load_library(str(library))
    return name


@pytest.fixture(scope="session")
def operators(isa):
    return getattr(torch.ops, f"autoq_{isa}")
