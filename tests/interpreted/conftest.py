"""The Triton kernels in Triton's interpreter, on CPU tensors.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted

That is a process of its own: whether a kernel is interpreted is decided when its module is imported. In any other
process this folder is skipped.

The interpreter differs from a GPU (docs/gpu.md has the list). Here it is made to behave like one, or stricter:

- bfloat16 is rounded to nearest even, converted from integers by value, and multiplied by value in ``tl.dot``;
  arithmetic on it is refused.
- An integer argument of 1 is a constant, as Triton compiles it for a GPU.
- A load or store must be aligned to its element and stay inside one tensor that the kernel was given; a launch stores
  no element twice.
- The larger of a number and NaN is the number, in every version of Triton.
- A float converted to an integer must be a number inside the integer's range.
- New tensors are full of NaN, so that a result made of an unwritten workspace is found.
"""

import functools
import os
from pathlib import Path

import pytest

REASON = "needs a process of its own: TRITON_INTERPRET=1 python -m pytest tests/interpreted"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class _Skipped(pytest.Module):
    def collect(self):
        pytest.skip(
            "needs a process of its own: TRITON_INTERPRET=1 python -m pytest tests/interpreted", allow_module_level=True
        )


def pytest_pycollect_makemodule(module_path, parent):
    if not INTERPRETED and Path(module_path).parent == Path(__file__).parent:
        return _Skipped.from_parent(parent, path=module_path)
    return None


if INTERPRETED:
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle

    from autoq_kernels import layout


def widened(bits):
    """The float32 values of bfloat16s in uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values):
    """Bfloat16s in uint16 of float32 values, rounded to nearest even."""
    whole = np.ascontiguousarray(values, dtype=np.float32)
    return torch.from_numpy(whole).bfloat16().view(torch.int16).numpy().view(np.uint16)


def cast(original):
    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source.is_floating() and target.is_int():
            values = widened(src.data) if source == tl.bfloat16 else src.data
            limits = np.iinfo(interpreter._get_np_dtype(target))
            if not np.all((values >= limits.min - 0.5) & (values <= limits.max + 0.5)):
                raise OverflowError(f"{values[~(np.abs(values) <= limits.max)][:4]} cannot become {target}")
        if tl.bfloat16 not in (source, target):
            return original(self, src, dst_type)
        values = widened(src.data) if source == tl.bfloat16 else src.data.astype(np.float32)
        data = narrowed(values) if target == tl.bfloat16 else values.astype(interpreter._get_np_dtype(target))
        return TensorHandle(data, target)

    return cast_impl


def dot(original):
    def create_dot(self, a, b, d, *rest):
        a, b = (TensorHandle(widened(h.data), tl.float32) if h.dtype.scalar == tl.bfloat16 else h for h in (a, b))
        return original(self, a, b, d, *rest)

    return create_dot


def arithmetic(original):
    def binary_op(self, lhs, rhs, op):
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise TypeError("arithmetic on bfloat16, which the interpreter would do on its bits")
        return original(self, lhs, rhs, op)

    return binary_op


class Memory:
    """What the running kernel may touch, what it has stored, and which integers it is not specialised for."""

    def __init__(self):
        self.ranges = []
        self.stored = []
        self.unspecialized = ()

    def enter(self, tensors):
        """Only these tensors from now on; of a packed weight's head, the whole weight."""
        self.ranges, self.stored = [], []
        for one in tensors:
            if one.dtype == torch.uint8 and one.dim() == 1:
                size = layout.header(one).total_bytes
            else:
                size = (1 + sum((n - 1) * s for n, s in zip(one.shape, one.stride(), strict=True))) * one.itemsize
            if one.numel():
                self.ranges.append((one.data_ptr(), one.data_ptr() + size))

    def touch(self, pointers, mask):
        """The addresses of the lanes that are on, checked."""
        on = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if on.size:
            first, end = int(on.min()), int(on.max()) + size
            if np.any(on % np.uint64(size)):
                raise MemoryError(f"an address is not a multiple of {size}")
            if not any(low <= first and end <= high for low, high in self.ranges):
                raise MemoryError(
                    f"{first:#x} to {end:#x} is not in one of {[(hex(a), hex(b)) for a, b in self.ranges]}"
                )
        return on

    def leave(self):
        """Raises where two lanes stored to one place."""
        addresses = np.concatenate(self.stored) if self.stored else np.empty(0)
        if len(np.unique(addresses)) != len(addresses):
            raise MemoryError("an element was stored twice")


def loads(original, memory):
    def create_masked_load(self, pointers, mask, *rest):
        memory.touch(pointers, mask)
        return original(self, pointers, mask, *rest)

    return create_masked_load


def stores(original, memory):
    def create_masked_store(self, pointers, value, mask, *rest):
        memory.stored.append(memory.touch(pointers, mask))
        return original(self, pointers, value, mask, *rest)

    return create_masked_store


def launches(original, memory, patched):
    def call(self, *args, **kwargs):
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        memory.enter([one for one in given.values() if isinstance(one, torch.Tensor)])
        ones = [name for name, value in given.items() if type(value) is int and value == 1]
        self.constexprs = self.constexprs + [name for name in ones if name not in memory.unspecialized]
        try:
            with np.errstate(all="ignore"):
                original(self, *args, **kwargs)
        finally:
            patched.clear()
        memory.leave()

    return call


def runs(original, memory):
    def run(self, *args, **kwargs):
        memory.unspecialized = self.kwargs.get("do_not_specialize") or ()
        return original(self, *args, **kwargs)

    return run


class _NothingToRestore:
    def restore(self):
        pass


def patch_once(original, patched):
    """The language is patched at every call of a device function, most of the time spent; once a module is enough."""

    def patch_lang(fn):
        module = id(fn.__globals__)
        if module in patched:
            return _NothingToRestore()
        patched.add(module)
        return original(fn)

    return patch_lang


def make_strict(patch):
    """The changes to the interpreter, undone with `patch`."""
    memory, patched = Memory(), set()

    def replace(owner, name, wrapper, *args):
        patch.setattr(owner, name, wrapper(getattr(owner, name), *args))

    replace(InterpreterBuilder, "cast_impl", cast)
    replace(InterpreterBuilder, "create_dot", dot)
    replace(InterpreterBuilder, "binary_op", arithmetic)
    for name, other in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        patch.setattr(InterpreterBuilder, name, functools.partialmethod(InterpreterBuilder.binary_op, op=other))
    replace(InterpreterBuilder, "create_masked_load", loads, memory)
    replace(InterpreterBuilder, "create_masked_store", stores, memory)
    replace(InterpretedFunction, "run", runs, memory)
    replace(GridExecutor, "__call__", launches, memory, patched)
    replace(interpreter, "_patch_lang", patch_once, patched)


@pytest.fixture(scope="session", autouse=True)
def _strict_interpreter():
    with pytest.MonkeyPatch.context() as patch:
        make_strict(patch)
        yield


@pytest.fixture(autouse=True)
def _new_tensors_hold_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
