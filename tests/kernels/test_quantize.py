"""The compiled half-quadratic quantization against its reference in plain PyTorch."""

import pytest
import torch

from autoq import numerics
from autoq_kernels.cpu import build


@pytest.fixture(scope="module")
def isa():
    return build.load().isa


def compiled(groups, bits=4):
    found = build.quantize_hqq(
        groups, bits, beta=numerics.HQQ_BETA, kappa=numerics.HQQ_KAPPA, iterations=numerics.HQQ_ITERATIONS
    )
    return numerics.Grid(*found)


def values(grid):
    return grid.codes.float() * grid.scale.float().unsqueeze(-1) + grid.minimum.float().unsqueeze(-1)


@pytest.mark.parametrize("size", [1, 5, 32, 64, 100, 128])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_agrees_with_the_reference_within_rounding(isa, bits, size):
    if isa is None:
        pytest.skip("no compiled kernels on this machine")
    generator = torch.Generator().manual_seed(bits * 1000 + size)
    groups = 512 * torch.randn(200, 3, size, generator=generator)
    found, wanted = compiled(groups, bits), numerics.hqq(groups, bits)
    assert torch.equal(found.scale, wanted.scale)
    # Sums in another order may tip a tie between iterates; where they do not, everything is equal.
    same = (found.minimum == wanted.minimum) & (found.codes == wanted.codes).all(dim=-1)
    assert same.float().mean() > 0.97
    errors = [(values(grid) - groups).norm() / groups.norm() for grid in (found, wanted)]
    assert errors[0].item() == pytest.approx(errors[1].item(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("offset", [0.0, 3.0, -4000.0])
def test_zero_constant_and_far_off_groups_are_as_in_the_reference(isa, offset):
    if isa is None:
        pytest.skip("no compiled kernels on this machine")
    groups = torch.full((4, 64), offset)
    groups[2:] += torch.linspace(0, 1, 64)
    found, wanted = compiled(groups), numerics.hqq(groups, 4)
    assert torch.equal(found.scale, wanted.scale)
    assert torch.allclose(values(found), values(wanted), rtol=2**-10, atol=1e-3)
    assert torch.isfinite(values(found)).all()


def test_refuses_what_it_cannot_hold(isa):
    if isa is None:
        pytest.skip("no compiled kernels on this machine")
    for groups in (torch.zeros(2, 300), torch.zeros(2, 64, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="groups must be float32"):
            compiled(groups)
