"""The rows of the proof: what was read from each compiled kernel, beside what it is and what it serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_bench.proof_cases import Case
from gpu_bench.proof_compile import Job
from gpu_bench.proof_targets import ARCHITECTURES

Row = dict[str, Any]


def described(job: Job, cases: Sequence[Case], triton: str) -> Row:
    """The columns that say what was compiled: those of the first case, that is served by default if any is."""
    case = next((one for one in cases if one.default), cases[0])
    variant, config = case.variant, case.config
    return {
        "triton": triton,
        "architecture": job.architecture.name,
        "scheme": variant.label,
        "bits": variant.bits,
        "group": variant.group,
        "column": variant.column,
        "dynamic": variant.dynamic,
        "dtype": case.dtype,
        "family": case.family,
        "kernel": case.kernel,
        "main": case.main,
        "config": str(config) if config else "",
        "warps": case.launch.warps,
        "step_weights": config.block_n * config.block_k if config else 0,
        "m": case.m,
        "n": case.n,
        "k": case.k,
        "bias": case.launch.arguments.get("bias") is not None,
        "default": case.default,
        "serves": len(cases),
    }


def instructions_per_weight(row: Mapping[str, Any]) -> float | None:
    """Instructions in the longest loop of a gemv or gemm for each weight that a thread handles in a step."""
    if not row.get("loop_instructions") or not row["step_weights"] or not row["main"]:
        return None
    threads = max(32 * row["warps"], ARCHITECTURES[row["architecture"]].warp_size)
    return row["loop_instructions"] * threads / row["step_weights"]


def issue_share(row: Mapping[str, Any]) -> float | None:
    """Time to issue a gemv's instructions over the time to read its weight, on the architecture's device.

    Above 1 the instructions, not the memory, are the limit, even with all of the processor's lanes busy.
    """
    count = instructions_per_weight(row)
    if count is None or row["family"] != "gemv":
        return None
    device = ARCHITECTURES[row["architecture"]]
    weight_bytes = (row["bits"] + (32 / row["group"] if row["group"] else 0)) / 8
    return count / (device.lanes * device.clock_ghz) / (weight_bytes / device.read_gb_s)
