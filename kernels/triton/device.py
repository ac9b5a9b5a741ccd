"""A GPU and the software on it, in clear: what times and tuned choices depend on. Importing this needs no GPU."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_DRIVER_VERSIONS = ("/sys/module/nvidia/version", "/sys/module/amdgpu/version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a tuned choice depends on besides the product.

    Attributes:
        name: as the driver gives it.
        architecture: ``sm_90``, or ``gfx942`` on AMD.
        l2_bytes: of the last-level cache.
        pytorch: its version.
        runtime: ``cuda 13.0`` or ``hip 6.4``.
        driver: the kernel module's version; ``unknown`` where the system does not tell.
        triton: its version.
        kernels: hash of the kernels' sources.
    """

    name: str
    architecture: str
    l2_bytes: int
    pytorch: str
    runtime: str
    driver: str
    triton: str
    kernels: str

    @property
    def key(self) -> str:
        """The folder's name: readable, and different where any part is."""
        readable = re.sub(r"[^A-Za-z0-9]+", "-", self.name).strip("-")
        return f"{readable}-{self.architecture}-{short_hash(asdict(self))}"

    def to_json(self) -> dict[str, Any]:
        """The parts in clear."""
        return asdict(self)

    @classmethod
    def current(cls, device: torch.device | str | int = "cuda") -> Device:
        """A GPU of this machine; torch must be able to use it."""
        found = torch.cuda.get_device_properties(device)
        return cls(
            name=found.name,
            architecture=architecture(device),
            l2_bytes=int(found.L2_cache_size),
            pytorch=str(torch.__version__),
            runtime=runtime(),
            driver=driver_version(),
            triton=_triton_version(),
            kernels=source_hash(),
        )


def architecture(device: torch.device | str | int = "cuda") -> str:
    """``sm_90`` for compute capability 9.0; on AMD the name up to its first colon, ``gfx942``."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def runtime() -> str:
    """What torch was built for: ``cuda 13.0``, ``hip 6.4``, or ``none``."""
    if torch.version.hip is not None:
        return f"hip {torch.version.hip}"
    return "none" if torch.version.cuda is None else f"cuda {torch.version.cuda}"


def driver_version() -> str:
    """The version of the GPU's kernel module; ``unknown`` where the system does not tell."""
    for place in map(Path, _DRIVER_VERSIONS):
        try:
            return place.read_text().strip()
        except OSError:
            continue
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return "unknown"
    return "unknown" if found is None else found[1]


def source_hash() -> str:
    """Hash of the Triton kernels' sources and of the layout they read."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for source in [*sorted(here.glob("*.py")), here.parent / "layout.py"]:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def short_hash(value: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of the canonical JSON's hash."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _triton_version() -> str:
    """Of the module itself: its package has other names on AMD and Windows."""
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)
