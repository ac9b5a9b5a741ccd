"""Instructions that a GEMV issues for each weight, counted in compiled code, for the roofline."""

from __future__ import annotations

import json
import subprocess
import tempfile

import torch

from autoq import candidates
from gpu_bench import proof_compile, proof_inspect, roofline
from gpu_bench.proof_targets import ARCHITECTURES
from gpu_bench.run_checks import forms

_SHAPE = (28672, 4096)
# What 64 lanes do in a clock, not 128, from compute capability 8.0 to 9.0 (CUDA programming guide, throughput of
# arithmetic instructions): integers but for their multiplication, logic, shifts, comparisons, selections.
_INTEGER = (
    "BMSK", "FMNMX", "FSEL", "FSETP", "IABS", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "PLOP3", "PRMT", "SEL",
    "SGXT", "SHF", "VIADD", "VIADDMNMX", "VIMNMX",
)  # fmt: skip


def counted(scheme: str, architecture: str) -> roofline.Instructions:
    """The longest loop of a scheme's default GEMV at one row of bfloat16, per weight.

    Args:
        scheme: a quantized one.
        architecture: such as ``sm_90``.
    """
    from autoq_kernels.triton import configs, gemv
    from autoq_kernels.triton.weight import stand_in

    form, _ = next(forms([scheme], [_SHAPE]))
    config = configs.default(form, 1)
    n, k = _SHAPE
    x_MK, y_MN = (torch.empty(1, size, dtype=torch.bfloat16, device="meta") for size in (k, n))
    (launch,) = (one for one in gemv.launches(x_MK, stand_in(form), None, y_MN, config) if one.kernel is gemv.gemv_rows)
    names = _longest_loop(proof_compile.compiled(proof_compile.job(launch, ARCHITECTURES[architecture])))
    weights = config.block_n * config.block_k / (32 * config.warps)
    integer = sum(name.partition(".")[0] in _INTEGER for name in names)
    return roofline.Instructions(round(len(names) / weights, 2), round(integer / weights, 2))


def _longest_loop(made: proof_compile.Compiled) -> list[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.binary)
        cubin.flush()
        command = [str(proof_compile.tool("nvdisasm")), "-c", "-ndf", cubin.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True)
    code = proof_inspect.sass_instructions(listing.stdout)
    loops = [(target, at) for at, _, target in code if target is not None and target < at]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    return [name for _, name, _ in code[first : last + 1]]


def write() -> None:
    """Count for every device and scheme of the roofline, and write the file that it reads."""
    import triton

    schemes = [scheme for scheme in roofline.SCHEMES if candidates.parse(scheme).key != "none"]
    blocks = []
    for device in roofline.DEVICES:
        lines = [f"    {json.dumps(one)}: {json.dumps(counted(one, device.architecture))}" for one in schemes]
        blocks.append(f'  "{device.architecture}": {{\n' + ",\n".join(lines) + "\n  }")
    head = f'{{\n "triton": "{triton.__version__}",\n "issued and integer, per weight": {{\n'
    roofline.COUNTS.write_text(head + ",\n".join(blocks) + "\n }\n}\n")
