"""What a measured time depends on besides the shape: the device and the software, in clear."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from autoq._files import shown
from autoq.errors import CacheError

_FIX = "Ask for the file again, or delete it."
_LONGEST = 1000  # characters of one part

# The flags that decide which kernels run; the full list of a CPU has over a hundred.
_ISA = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8")


# What a time depends on besides the device, as columns of the measurements. 0 and "" stand for "does not depend on it".
CONDITIONS = ("threads", "torch", "triton", "runtime", "kernels", "compile")
STOCK = "stock"  # in the column `kernel`: PyTorch's own layer
_EAGER = "eager"  # how single products are timed
_DEVICE = {
    "cpu": ("device", "name", "isa", "caches", "cores", "system"),
    "cuda": ("device", "name", "caches", "system"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """A device and the software on it. Two equal fingerprints may share measured times.

    Attributes:
        device: ``cpu`` or ``cuda``.
        name: vendor, family, model and stepping of a CPU (marketing names are not enough), or the GPU's name and SM.
        isa: the CPU's instruction sets that matter here; empty for a GPU, whose name has its architecture.
        caches: cache sizes, such as ``L2 512K, L3 32768K``.
        cores: online logical processors.
        system: kernel name and machine type.
        threads: torch's intra-op threads.
        torch: its version.
        triton: its version; empty for a CPU.
        runtime: of a GPU the version of CUDA or HIP, and the driver's; empty for a CPU.
        kernels: hash of the sources of the kernels for this kind of device.
    """

    device: str
    name: str
    isa: str
    caches: str
    cores: int
    system: str
    threads: int
    torch: str
    triton: str
    runtime: str
    kernels: str

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that stand for device and software together."""
        return _short_hash(asdict(self))

    @property
    def device_key(self) -> str:
        """Sixteen hexadecimal digits that stand for the device alone."""
        return device_key(self.hardware())

    def to_json(self) -> dict[str, str | int]:
        """The parts in clear."""
        return asdict(self)

    def hardware(self) -> dict[str, str | int]:
        """The parts that are the device: the processor and the operating system, or the GPU."""
        parts = asdict(self)
        return {name: parts[name] for name in _DEVICE[self.device]}

    def conditions(self, kernel: str = "") -> dict[str, str | int]:
        """The parts that are not the device, as the columns ``CONDITIONS`` of a measurement.

        Args:
            kernel: what ran. PyTorch's own layer depends neither on autoq's kernels nor on Triton.
        """
        on_gpu = self.device == "cuda"
        own = kernel != STOCK
        return {
            "threads": 0 if on_gpu else self.threads,
            "torch": self.torch,
            "triton": self.triton if own else "",
            "runtime": self.runtime,
            "kernels": self.kernels if own else "",
            "compile": _EAGER,
        }

    def covers(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of the measurements holds on this device with this software."""
        wanted = self.conditions()
        return row.get("device") == self.device_key and all(row.get(key) in (wanted[key], "", 0) for key in CONDITIONS)

    @classmethod
    def current(cls, device: str = "cpu") -> Fingerprint:
        """The fingerprint of this process's device.

        Args:
            device: ``"cpu"`` or ``"cuda"``, with or without an index.
        """
        shared = {
            "system": f"{platform.system()} {platform.machine()}",
            "torch": str(torch.__version__),
            "cores": os.cpu_count() or 1,
            "threads": torch.get_num_threads(),
        }
        if torch.device(device).type == "cuda":
            return cls(device="cuda", **_gpu(torch.device(device)), **shared)  # type: ignore[arg-type]  # as below
        name, isa = _cpu()
        found = {"name": name, "isa": isa, "caches": _caches(), "triton": "", "runtime": "", "kernels": _hash_of("cpu")}
        return cls(device="cpu", **found, **shared)  # type: ignore[arg-type]  # by construction


def device_key(hardware: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that stand for a device, given by its parts in clear."""
    return _short_hash(dict(hardware))


def checked_hardware(value: object, where: str) -> dict[str, str | int]:
    """A device's parts, read from a file.

    Args:
        value: of the file's JSON.
        where: the file, for messages.

    Raises:
        CacheError: if it is not what ``Fingerprint.hardware`` gives: some device's parts, as printable text.
    """
    kind = value.get("device") if isinstance(value, dict) else None
    wanted = _DEVICE.get(kind, ()) if isinstance(kind, str) else ()
    if not isinstance(value, dict) or not wanted or set(value) != set(wanted):
        raise CacheError("a profile names the parts of its device", where=where, got=shown(value), fix=_FIX)
    for name, one in value.items():
        whole = isinstance(one, int) and not isinstance(one, bool) and one >= 0
        text = isinstance(one, str) and one.isprintable() and len(one) <= _LONGEST
        if not (whole if name == "cores" else text):
            raise CacheError("a device's part is printable text", where=f"{where} $.{name}", got=shown(one), fix=_FIX)
    return dict(value)


def _short_hash(value: Mapping[str, Any]) -> str:
    """Of the canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _gpu(device: torch.device) -> dict[str, str]:
    """Name, versions and L2 size of a GPU."""
    from autoq_kernels.triton.device import Device

    found = Device.current(device)
    return {
        "name": f"{found.name} {found.architecture}",
        "isa": "",
        "caches": f"L2 {found.l2_bytes // 1024}K",
        "triton": found.triton,
        "runtime": f"{found.runtime}, driver {found.driver}",
        "kernels": _hash_of("triton"),
    }


def _cpu() -> tuple[str, str]:
    """The CPU's identity and ISA flags from /proc/cpuinfo; elsewhere what the platform module tells."""
    source = Path("/proc/cpuinfo")
    if not source.exists():
        return platform.processor() or platform.machine(), ""
    facts: dict[str, str] = {}
    for line in source.read_text().split("\n\n", 1)[0].splitlines():
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    name = " ".join(
        f"{label}{facts.get(key, '?')}"
        for label, key in (
            ("", "vendor_id"),
            ("family ", "cpu family"),
            ("model ", "model"),
            ("stepping ", "stepping"),
            ("", "model name"),
        )
    )
    flags = set(facts.get("flags", "").split())
    return name, " ".join(flag for flag in _ISA if flag in flags)


def _caches() -> str:
    sizes = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level = (index / "level").read_text().strip()
            kind = (index / "type").read_text().strip()
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        if kind != "Instruction":
            sizes.append(f"L{level} {size}")
    return ", ".join(sizes)


def last_level_cache_bytes() -> int:
    """The size of the largest CPU cache; 32 MiB where the system does not tell."""
    sizes = [part.split()[1] for part in _caches().split(", ") if part]
    known = [int(size[:-1]) * 1024 for size in sizes if size.endswith("K") and size[:-1].isdigit()]
    return max(known, default=32 << 20)


def _hash_of(folder: str) -> str:
    """Hash of the kernel sources in one folder, and of those that all share."""
    import autoq_kernels

    digest = hashlib.sha256()
    for root in map(Path, sorted(autoq_kernels.__path__)):
        for source in sorted([*root.glob("*"), *(root / folder).rglob("*")]):
            if source.suffix in (".py", ".cpp", ".h"):
                digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]
