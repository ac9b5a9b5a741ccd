import pytest
import torch

from autoq_kernels.cpu import build, toolchain


@pytest.fixture(scope="session", params=["avx2", "portable"])
def isa(request):
    missing = toolchain.missing_features(request.param)
    if missing:
        pytest.skip(f"this processor lacks {missing}")
    build.load(request.param)
    return request.param


@pytest.fixture(scope="session")
def operators(isa):
    return getattr(torch.ops, f"autoq_{isa}")
