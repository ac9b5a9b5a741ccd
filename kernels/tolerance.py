"""How far a kernel's output may be from its scheme's reference: the one table, for every device."""

from __future__ import annotations

import torch

TOLERANCE: dict[torch.dtype, float] = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 2e-5}
"""Largest relative RMS by the dtype of x and y: about twice what rounding y alone costs, or float32 sums."""

TF32 = 2e-3


def limit(dtype: torch.dtype, device: torch.device) -> float:
    """The table's entry, or on a GPU whose float32 products torch was told to round to TF32, `TF32` for float32."""
    if dtype is torch.float32 and device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        return TF32
    return TOLERANCE[dtype]
