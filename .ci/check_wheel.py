"""Runs outside the repository, on an installed wheel: one kernel compiled, the Triton kernels registered."""

import sys
from pathlib import Path

import torch

import autoq
from autoq_kernels.cpu import build
from autoq_kernels.triton import register


def main() -> None:
    """Check where the modules came from, then compile and run."""
    site = Path(sys.argv[1]).resolve()
    for module in (autoq, build, register):
        assert Path(module.__file__).resolve().is_relative_to(site), f"{module.__name__} is not the wheel's"
    assert register.load().registered
    status = build.load()
    assert status.isa is not None, status.reason
    candidate = autoq.candidates.parse("int8wo")
    packed = candidate.pack(torch.randn(64, 128))
    x_MK = torch.randn(2, 128)
    expected = candidate.reference(x_MK, packed)
    error = (candidate.linear(x_MK, packed) - expected).norm() / expected.norm()
    assert error < 1e-5, float(error)
    print(f"wheel: int8wo on the {status.isa} kernels, relative error {error:.1e}")  # noqa: T201 (a CI script's result)


main()
