"""Large pages for packed weights: a matrix read once per token is bound by page walks before it is by memory."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from torch import Tensor

_PAGE = 2 << 20  # bytes of a large page on x86-64
_MADV_HUGEPAGE = 14  # from here on, where the system leaves the choice to programs
_MADV_COLLAPSE = 25  # what is there already, now (Linux 6.1)


def use_large_pages(data: Tensor) -> None:
    """Ask the system to hold a tensor's memory in 2 MiB pages; a hint, which changes no value and may be refused.

    Args:
        data: contiguous, on the CPU. Below 2 MiB nothing happens.
    """
    first = -(-data.data_ptr() // _PAGE) * _PAGE
    last = (data.data_ptr() + data.nbytes) // _PAGE * _PAGE
    advise = _madvise()
    if last > first and advise is not None and data.device.type == "cpu":
        advise(first, last - first, _MADV_HUGEPAGE)
        advise(first, last - first, _MADV_COLLAPSE)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's function; None outside Linux."""
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function  # type: ignore[no-any-return]
