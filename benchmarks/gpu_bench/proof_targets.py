"""The architectures that the kernels are compiled for, and what each one allows and should use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One instruction set.

    Attributes:
        name: as its makers write it.
        backend: Triton's: cuda or hip.
        arch: Triton's number or name.
        warp_size: threads that run in step.
        shared_bytes: that one block may have at most.
        matrix: its own matrix instruction, as it stands in PTX or in AMD's assembly.
        device: one that has it; what follows is that device's.
        lanes: instructions of single threads that it can issue in a clock.
        clock_ghz: its boost clock.
        read_gb_s: its memory's bandwidth, 10⁹ bytes a second.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    matrix: str
    device: str
    lanes: int
    clock_ghz: float
    read_gb_s: float

    def target(self) -> Any:
        """What Triton compiles for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.warp_size)


def _nvidia(
    number: int, shared_kib: int, matrix: str, device: str, processors: int, clock_ghz: float, read_gb_s: float
) -> Architecture:
    return Architecture(
        name=f"sm_{number}",
        backend="cuda",
        arch=number,
        warp_size=32,
        shared_bytes=shared_kib * 1024,
        matrix=matrix,
        device=device,
        lanes=128 * processors,
        clock_ghz=clock_ghz,
        read_gb_s=read_gb_s,
    )


ARCHITECTURES: dict[str, Architecture] = {
    one.name: one
    for one in (
        _nvidia(80, 163, "mma.sync", "A100", 108, 1.41, 2039),
        _nvidia(89, 99, "mma.sync", "RTX 4090", 128, 2.52, 1008),
        _nvidia(90, 227, "wgmma", "H100 SXM", 132, 1.98, 3350),
        _nvidia(100, 227, "tcgen05.mma", "B200", 148, 1.85, 8000),
        _nvidia(120, 99, "mma.sync", "RTX 5090", 170, 2.41, 1792),
        Architecture(
            name="gfx942",
            backend="hip",
            arch="gfx942",
            warp_size=64,
            shared_bytes=64 * 1024,
            matrix="v_mfma",
            device="MI300X",
            lanes=64 * 304,
            clock_ghz=2.1,
            read_gb_s=5300,
        ),
    )
}
