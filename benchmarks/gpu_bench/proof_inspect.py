"""What a compiled kernel takes and does: registers, spills, shared memory, widths of loads, matrix instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_bench.proof_compile import Compiled, tool
from gpu_bench.proof_loads import loads, places_reading, widths

WEIGHT_ARGUMENTS = ("codes_offset", "high_offset")  # loads whose address is computed from these read codes
_MATRIX = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b|^\s*(v_s?mfma)_", re.MULTILINE)
_MATRIX_NAMES = {"wgmma.mma_async": "wgmma", "v_smfma": "v_mfma"}
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*)")
_SASS_LABEL = re.compile(r"^(\.L_x_\d+):")
_AMD_CODE = re.compile(r"^\t([a-z][a-z0-9_]+)\b(.*)$")
_AMD_LABEL = re.compile(r"^(\.LBB\d+_\d+):")
_AMD_KEYS = {
    "registers": "vgpr_count",
    "spilled": "vgpr_spill_count",
    "scalar_spilled": "sgpr_spill_count",
    "stack_bytes": "private_segment_fixed_size",
}

Row = dict[str, Any]


def inspected(made: Compiled, *, disassemble: bool) -> Row:
    """All that is read from a compiled kernel.

    Args:
        made: the kernel.
        disassemble: count machine instructions, which for NVIDIA's takes half a second.

    Returns:
        ``registers`` of a thread, ``stack_bytes`` (what spills take), ``spilled`` (loads and stores of spilled
        registers; AMD: registers), ``scalar_spilled`` (AMD's scalar registers kept in vector registers),
        ``shared_bytes``, ``tensor_memory``, ``matrix`` (instruction → count), ``loads`` and ``weight_loads`` (bytes →
        count), and where disassembled ``instructions`` and ``loop_instructions``, of its longest loop.
    """
    assembly = made.texts.get("ptx") or made.texts["amdgcn"]
    found = loads(assembly)
    places = places_reading(made.texts["ttgir"], WEIGHT_ARGUMENTS)
    row: Row = {
        "shared_bytes": made.shared_bytes,
        "tensor_memory": made.tensor_memory,
        "matrix": matrix_instructions(assembly),
        "loads": widths(found),
        "weight_loads": widths(found, places),
    }
    if "ptx" in made.texts:
        return row | _nvidia(made.binary, disassemble=disassemble)
    return row | amd_usage(assembly) | counts(amd_instructions(assembly))


def matrix_instructions(assembly: str) -> dict[str, int]:
    """Matrix instruction → count, in PTX or AMD's assembly."""
    names = (first or second for first, second in _MATRIX.findall(assembly))
    return dict(sorted(Counter(_MATRIX_NAMES.get(name, name) for name in names).items()))


def nvidia_usage(report: str) -> Row:
    """The numbers of ``cuobjdump -res-usage``."""
    match = _USAGE.search(report)
    if not match:
        raise ValueError(f"cuobjdump -res-usage must list REG and STACK; got {report!r}")
    registers, stack, _, local = map(int, match.groups())
    return {"registers": registers, "stack_bytes": stack + local, "scalar_spilled": 0}


def _nvidia(cubin: bytes, *, disassemble: bool) -> Row:
    with tempfile.TemporaryDirectory(prefix="gpu-proof-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        row = nvidia_usage(_output([tool("cuobjdump"), "-res-usage", path]))
        if row["stack_bytes"] or disassemble:
            code = sass_instructions(_output([tool("nvdisasm"), "-c", "-ndf", path]))
            row["spilled"] = sum(name.startswith(("STL", "LDL")) for _, name, _ in code)
            return row | counts(code)
    return row | {"spilled": 0}


def _output(command: list[Any]) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


Instruction = tuple[int, str, int | None]  # its position, name, and where it jumps to


def sass_instructions(listing: str) -> list[Instruction]:
    """The instructions of ``nvdisasm -c``, without the padding at the end."""
    code, labels = [], {}
    for line in listing.splitlines():
        if match := _SASS_LABEL.match(line):
            labels[match[1]] = len(code)
        elif match := _SASS.match(line):
            jump = re.search(r"`\((\.L_x_\d+)\)", match[3])
            code.append((len(code), match[2], jump[1] if jump and match[2].startswith("BRA") else None))
    resolved = [(at, name, labels.get(jump)) for at, name, jump in code]
    while resolved and (resolved[-1][1] == "NOP" or resolved[-1][2] == resolved[-1][0]):
        resolved.pop()
    return resolved


def amd_instructions(assembly: str) -> list[Instruction]:
    """The instructions in AMD's assembly."""
    code, labels = [], {}
    for line in assembly.split("\n\t.section\t.rodata", 1)[0].splitlines():
        if match := _AMD_LABEL.match(line):
            labels[match[1]] = len(code)
        elif match := _AMD_CODE.match(line):
            jump = re.search(r"\.LBB\d+_\d+", match[2]) if "branch" in match[1] else None
            code.append((len(code), match[1], jump[0] if jump else None))
    return [(at, name, labels.get(jump)) for at, name, jump in code]


def counts(code: list[Instruction]) -> Row:
    """How many instructions there are, and in the longest loop."""
    loops = [at - target + 1 for at, _, target in code if target is not None and target < at]
    return {"instructions": len(code), "loop_instructions": max(loops, default=0)}


def amd_usage(assembly: str) -> Row:
    """The numbers of a kernel's metadata."""
    row = {}
    for name, key in _AMD_KEYS.items():
        match = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if not match:
            raise ValueError(f"AMD's metadata must list .{key}")
        row[name] = int(match[1])
    return row
