"""A kernel launch as data: it can be run on a device, or compiled for one that is not there."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_THREADS = 32  # of a warp, as configurations count them


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: the function under ``triton.jit``.
        grid: programs in three dimensions.
        arguments: what changes from call to call, by name: tensors (or None) and numbers.
        constants: what the kernel is compiled for, by name.
        warps: of a program, 32 threads each.
        stages: of software pipelining.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 1

    def options(self, warp_size: int) -> dict[str, Any]:
        """What the compiler is told, for a device whose warps have so many threads."""
        return {
            "num_warps": max(1, self.warps * _THREADS // warp_size),
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }

    def run(self) -> None:
        """Queue it on the current stream of the tensors' device."""
        device = next(one.device for one in self.arguments.values() if isinstance(one, Tensor))
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options(_warp_size(device)))


@functools.cache
def _warp_size(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip is None:
        return _THREADS
    return int(torch.cuda.get_device_properties(device).warp_size)


def run(launches: Sequence[Launch]) -> None:
    """Queue launches one after the other."""
    for launch in launches:
        launch.run()
