"""What a measured time depends on besides the shape: the device and the software, in clear."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# The flags that decide which kernels run; the full list of a CPU has over a hundred.
_ISA = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """A device and the software on it. Two equal fingerprints may share measured times.

    Attributes:
        device: ``cpu`` or ``cuda``.
        name: vendor, family, model and stepping of a CPU (marketing names are not enough), or the GPU's name and SM.
        isa: the CPU's instruction sets that matter here; of a GPU the versions of CUDA or HIP, Triton and driver.
        caches: cache sizes, such as ``L2 512K, L3 32768K``.
        cores: online logical processors.
        threads: torch's intra-op threads.
        system: kernel name and machine type.
        torch: its version.
        kernels: hash of the kernels' sources.
    """

    device: str
    name: str
    isa: str
    caches: str
    cores: int
    threads: int
    system: str
    torch: str
    kernels: str

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits of the canonical JSON's hash."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, str | int]:
        """The parts in clear."""
        return asdict(self)

    @classmethod
    def current(cls, device: str = "cpu") -> Fingerprint:
        """The fingerprint of this process's device.

        Args:
            device: ``"cpu"`` or ``"cuda"``, with or without an index.
        """
        shared = {
            "system": f"{platform.system()} {platform.machine()}",
            "torch": str(torch.__version__),
            "kernels": _kernel_hash(),
            "cores": os.cpu_count() or 1,
            "threads": torch.get_num_threads(),
        }
        if torch.device(device).type == "cuda":
            return cls(device="cuda", **_gpu(torch.device(device)), **shared)  # type: ignore[arg-type]  # as below
        name, isa = _cpu()
        return cls(device="cpu", name=name, isa=isa, caches=_caches(), **shared)  # type: ignore[arg-type]  # by construction


def _gpu(device: torch.device) -> dict[str, str]:
    """Name, versions and L2 size of a GPU."""
    from autoq_kernels.triton.device import Device

    found = Device.current(device)
    return {
        "name": f"{found.name} {found.architecture}",
        "isa": f"{found.runtime}, triton {found.triton}, driver {found.driver}",
        "caches": f"L2 {found.l2_bytes // 1024}K",
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


def _kernel_hash() -> str:
    """Hash of every kernel source, so that a changed kernel invalidates its times."""
    import autoq_kernels

    digest = hashlib.sha256()
    for root in sorted(autoq_kernels.__path__):
        for source in sorted(Path(root).rglob("*")):
            if source.suffix in (".py", ".cpp", ".h"):
                digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]
