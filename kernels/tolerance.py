"""How far a kernel's output may be from its scheme's reference: the one table, for every device."""

from __future__ import annotations

import torch

TOLERANCE: dict[torch.dtype, float] = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 2e-5}
"""Largest relative RMS by the dtype of x and y: about twice what rounding y alone costs, or float32 sums."""
