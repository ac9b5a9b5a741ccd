"""Compiling a kernel launch for an architecture that is not there, exactly as Triton would if it were.

Triton's JIT decides by the arguments what a kernel is compiled for: the types, which pointers and numbers are
multiples of 16, which numbers are 1. That decision is made here by the JIT's own code, which needs no driver.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_bench.proof_targets import Architecture

OPTIONS = {"enable_fp_fusion": True}  # what Triton 3.9 does unless told otherwise; 3.10 would not


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One compilation, without anything that belongs to a process.

    Attributes:
        module: where the kernel is.
        name: of the kernel.
        signature: type of each argument in Triton's notation, "constexpr" for constants.
        constants: values of the constants by position.
        attributes: what is known of the arguments, by position.
        options: of the compiler.
        architecture: to compile for.
        source_hash: of the kernel and all it calls.
    """

    module: str
    name: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    architecture: Architecture
    source_hash: str

    def key(self, *also: str) -> str:
        """A hash of all that decides the result, and of `also`."""
        import triton

        facts = [
            self.module,
            self.name,
            self.source_hash,
            self.signature,
            sorted((list(at), repr(value)) for at, value in self.constants.items()),
            sorted((list(at), repr(value)) for at, value in self.attributes.items()),
            sorted(self.options.items()),
            self.architecture.name,
            triton.__version__,
            *also,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What the compiler made.

    Attributes:
        texts: of each stage that is text, by its name: ttir, ttgir, ptx or amdgcn.
        binary: the cubin or hsaco.
        shared_bytes: of shared memory that a block is launched with.
        tensor_memory: columns of sm_100's tensor memory.
    """

    texts: dict[str, str]
    binary: bytes
    shared_bytes: int
    tensor_memory: int


def job(launch: Any, architecture: Architecture, **options: Any) -> Job:
    """The compilation that a launch would cause on a device.

    Args:
        launch: as `autoq_kernels.triton.launching.Launch`; its tensors may be on "meta".
        architecture: of the device.
        options: of the compiler, beside the launch's own.
    """
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    backend = make_backend(architecture.target())
    given = launch.options(architecture.warp_size) | options
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**launch.arguments, **launch.constants, **given)
    _, signature, constants, attributes = kernel._pack_args(backend, dict(given), bound, specialization, given)
    return Job(
        module=kernel.fn.__module__,
        name=kernel.fn.__name__,
        signature=signature,
        constants=constants,
        attributes=attributes,
        options=given,
        architecture=architecture,
        source_hash=kernel.cache_key,
    )


def compiled(one: Job) -> Compiled:
    """Compile, in a cache of its own that is gone afterwards.

    Raises:
        RuntimeError: the kernel's source is not the job's any more.
        Exception: whatever the compiler raises.
    """
    import triton
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(one.module), one.name)
    if kernel.cache_key != one.source_hash:
        raise RuntimeError("the kernel's source changed during the run")
    source = ASTSource(kernel, one.signature, one.constants, one.attributes)
    with triton.knobs.cache.scope(), tempfile.TemporaryDirectory(prefix="gpu-proof-") as folder:
        triton.knobs.cache.dir = folder
        result = triton.compile(source, target=one.architecture.target(), options=one.options)
    texts = {name: result.asm[name] for name in ("ttir", "ttgir", "ptx", "amdgcn") if name in result.asm}
    return Compiled(
        texts=texts,
        binary=result.kernel,
        shared_bytes=result.metadata.shared,
        tensor_memory=getattr(result.metadata, "tmem_size", None) or 0,
    )


def tool(name: str) -> Path:
    """One of NVIDIA's programs that come with Triton: cuobjdump, nvdisasm or ptxas."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
