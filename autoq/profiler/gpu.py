"""Profiling on a GPU: tuned kernels, timed on the device with a cold L2. Nothing here needs a GPU to be imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from autoq.candidates.base import load_cuda_kernels
from autoq.profiler.timing import Timing

TimeFunction = Callable[..., Mapping[str, Sequence[float]]]

_TUNING_SECONDS = 1.0  # of timing per (shape, scheme), once per device and version of the kernels
_BANDWIDTH_BYTES = 256 << 20  # a launch is nothing against it; the L2 is cold before each call
_BANDWIDTH_SECONDS = 0.05


class Gpu:
    """What the profiler needs of a GPU.

    Args:
        device: a CUDA device.
        kernels: what does the work of the module ``autoq_kernels.triton.register``, which is used where there is
            Triton; elsewhere layers run, and are timed, in plain PyTorch.
        time: called as ``autoq_kernels.triton.timing.time_interleaved`` is.
    """

    def __init__(self, device: torch.device, *, kernels: Any = None, time: TimeFunction | None = None) -> None:
        self.device = device
        self._kernels = _register() if kernels is None else kernels
        self._time = time or _time_interleaved()

    def prepare(self, head: Tensor, m: int, dtype: torch.dtype) -> None:
        """Tune the product of m rows of x with a packed weight, unless that was done before on this device."""
        if self._kernels is None:
            return
        weight = self._kernels.weights().of(head)
        self._kernels.tuner(head.device).tune(weight, m, dtype, budget_s=_TUNING_SECONDS)

    def kernel_name(self, head: Tensor, m: int, dtype: torch.dtype) -> str:
        """What runs that product."""
        return "default" if self._kernels is None else str(self._kernels.kernel_name(head, m, dtype))

    def runs(self, kernel: str) -> bool:
        """Whether this process has what was measured under a name; nothing, where a product was refused."""
        return not kernel or (kernel == "default") == (self._kernels is None)

    def repeatable(self, weight: Tensor, function: Callable[[Tensor], object]) -> Callable[[], object]:
        """The function on the one weight: the L2 is flushed before each call, so copies are not needed."""
        return lambda: function(weight)

    def time(self, runs: Mapping[str, Callable[[], object]], budget_s: float) -> dict[str, Timing]:
        """Times on the device, the launches not counted where they can be recorded into a CUDA graph."""
        found = self._time(runs, budget_s=budget_s, device=self.device)
        return {name: Timing.of(list(times)) for name, times in found.items()}

    def bandwidth_gb_s(self) -> float:
        """What the device's memory gives, see `bandwidth_gb_s`."""
        return bandwidth_gb_s(self.device, time=self._time)


def bandwidth_gb_s(device: torch.device | str, *, time: TimeFunction | None = None) -> float:
    """Bytes per second, in 10⁹, that torch's own kernels get from a GPU's memory: the better of a sum and a copy.

    Args:
        device: a CUDA device.
        time: called as ``autoq_kernels.triton.timing.time_interleaved`` is.
    """
    data = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32, device=device)
    total, copy = torch.empty((), dtype=torch.float32, device=device), torch.empty_like(data)
    runs: dict[str, Callable[[], object]] = {
        "sum": lambda: torch.sum(data, dim=0, out=total),
        "copy": lambda: copy.copy_(data),
    }
    moved = {"sum": data.nbytes, "copy": 2 * data.nbytes}
    found = (time or _time_interleaved())(runs, budget_s=_BANDWIDTH_SECONDS, device=torch.device(device))
    return max(moved[name] / median(times) for name, times in found.items()) / 1e3  # bytes per µs are MB/s


def _register() -> Any:
    if not load_cuda_kernels():
        return None
    from autoq_kernels.triton import register

    return register


def _time_interleaved() -> TimeFunction:
    from autoq_kernels.triton.timing import time_interleaved

    function: TimeFunction = time_interleaved
    return function
