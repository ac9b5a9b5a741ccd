"""A kernel launch as data: it can be run on a device, or compiled for one that is not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: the function under ``triton.jit``.
        grid: programs in three dimensions.
        arguments: what changes from call to call, by name: tensors (or None) and numbers.
        constants: what the kernel is compiled for, by name.
        warps: of a program.
        stages: of software pipelining.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 1

    def run(self) -> None:
        """Queue it on the current stream of the tensors' device."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        self.kernel[self.grid](**self.arguments, **self.constants, **options)


def run(launches: Sequence[Launch]) -> None:
    """Queue launches one after the other."""
    for launch in launches:
        launch.run()
