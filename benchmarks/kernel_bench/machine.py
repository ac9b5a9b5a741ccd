"""What the machine can do at best: bytes read and multiply-adds per second, measured beside everything else."""

from __future__ import annotations

import datetime
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

from autoq import candidates
from autoq.cache.fingerprint import Fingerprint
from autoq_kernels.cpu import build
from autoq_kernels.cpu.memory import use_large_pages
from kernel_bench.engines import onednn_u8s8
from kernel_bench.roofline import SHORT, U8S8

_READ_BYTES = 128 << 20
_RATE_ROWS = (256, 512, 1024, 2048)


def describe() -> dict[str, Any]:
    """The machine and the software, in clear; ``key`` changes with anything that times depend on."""
    fingerprint = Fingerprint.current("cpu")
    status = build.status()
    return {
        **fingerprint.to_json(),
        "key": fingerprint.key,
        "flags": _flags(),
        "kernel_isa": status.isa,
        "kernel_reason": status.reason,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "int32_exact": int32_exact(),
    }


def _flags() -> list[str]:
    source = Path("/proc/cpuinfo")
    lines = source.read_text().splitlines() if source.exists() else []
    return next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])


def int32_exact() -> bool:
    """Whether int8dq's sums at K = 16384 with all values ±127 come out right: each is a whole number below 2²⁸."""
    w = torch.full((48, 16384), 127.0)
    w[1::2] = -127.0
    x = torch.full((65, 16384), 127.0)
    x[::2] = -127.0
    candidate = candidates.parse("int8dq")
    packed = candidate.pack(w)
    for rows in (1, 3, 65):
        expected = candidate.reference(x[:rows], packed)
        worst = (candidate.linear(x[:rows], packed).double() - expected).abs().max() / expected.abs().max()
        if not float(worst) < 2e-7:
            return False
    return True


def _read_kernels() -> dict[str, Callable[[], object]]:
    """Ways to read a large array once; which is fastest differs between machines and thread counts."""
    words = torch.ones(_READ_BYTES // 4, dtype=torch.int32)
    use_large_pages(words)
    longs, octets, floats = words.view(torch.int64), words.view(torch.uint8), words.view(torch.float32)
    matrix, vector = floats.view(-1, 8192), torch.ones(8192)
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)
    parts = [part.numpy() for part in words.chunk(threads)]
    return {
        "torch int64 sum": longs.sum,
        "torch float32 sum": floats.sum,
        "torch uint8 amax": octets.amax,
        "torch int32 amax": words.amax,
        "torch float32 matrix times vector": lambda: matrix @ vector,
        "numpy int32 max, one thread each part": lambda: list(pool.map(lambda part: part.max(), parts)),
    }


class Read:
    """The fastest read-only kernel at the present number of threads; one call reads 128 MiB.

    Attributes:
        name: of that kernel.
        found_gb_s: kernel → its median bandwidth when they were compared.
    """

    max_burst = 1
    first_us = 0.0

    def __init__(self, rounds: int = 9) -> None:
        kernels = _read_kernels()
        times: dict[str, list[float]] = {name: [] for name in kernels}
        for number in range(rounds + 1):
            for name, kernel in kernels.items():
                begin = time.perf_counter()
                kernel()
                if number > 0:
                    times[name].append(time.perf_counter() - begin)
        self.found_gb_s = {name: _READ_BYTES / median(values) / 1e9 for name, values in times.items()}
        self.name = max(self.found_gb_s, key=lambda name: self.found_gb_s[name])
        self._kernel = kernels[self.name]

    def time(self, calls: int) -> float:
        """Microseconds per reading."""
        begin = time.perf_counter_ns()
        for _ in range(calls):
            self._kernel()
        return (time.perf_counter_ns() - begin) / 1000 / calls

    @staticmethod
    def gb_s(time_us: float) -> float:
        """10⁹ bytes a second of one reading."""
        return _READ_BYTES / time_us / 1e3


class Rates:
    """Multiply-adds per second of oneDNN's products, sampled between the cells of a run.

    Args:
        size: of the square weight.
        names: those of ``bf16``, ``fp16``, ``fp32``, ``u8s8`` to measure.
        samples: of an earlier run that is resumed: "threads/name/M" → 10⁹ multiply-adds a second.

    Attributes:
        samples: all of them.
        spent_s: seconds spent.
    """

    def __init__(self, size: int, names: list[str], samples: dict[str, list[float]] | None = None) -> None:
        self.samples: defaultdict[str, list[float]] = defaultdict(list, samples or {})
        self.spent_s = 0.0
        self._size = size
        self._calls = {(name, m): _product(name, m, size) for m in _RATE_ROWS for name in names}

    def sample(self, threads: int) -> None:
        """One round over all products."""
        started = time.perf_counter()
        torch.set_num_threads(threads)
        for (name, m), call in self._calls.items():
            if m == _RATE_ROWS[0]:
                call()
            begin = time.perf_counter()
            call()
            elapsed = time.perf_counter() - begin
            self.samples[f"{threads}/{name}/{m}"].append(m * self._size**2 / elapsed / 1e9)
        self.spent_s += time.perf_counter() - started

    def rounds(self, threads: int) -> int:
        """Rounds sampled with that many threads."""
        return min((len(v) for key, v in self.samples.items() if key.startswith(f"{threads}/")), default=0)

    def best(self) -> dict[str, dict[str, float]]:
        """Threads → name → the highest median over M, 10⁹ multiply-adds a second."""
        found: dict[str, dict[str, float]] = {}
        for key, values in self.samples.items():
            threads, name, _ = key.split("/")
            rates = found.setdefault(threads, {})
            rates[name] = max(rates.get(name, 0.0), median(values))
        return found


def _product(name: str, m: int, size: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    if name == U8S8:
        codes = torch.randint(-127, 128, (size, size), generator=generator, dtype=torch.int8)
        x = torch.randn(m, size, generator=generator)
        engine = onednn_u8s8(x, codes, torch.ones(size))
        weight = engine.pack()
        return lambda: engine.call(weight)
    dtype = next(getattr(torch, long) for long, short in SHORT.items() if short == name)
    x = torch.randn(m, size, generator=generator).to(dtype)
    w = torch.randn(size, size, generator=generator).to(dtype)
    return lambda: torch.nn.functional.linear(x, w)
