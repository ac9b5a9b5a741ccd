"""Losses of tokens from logits, for the workers of other engines; numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LOSS_TOKENS = 128  # tokens whose logits are held at once


def nll(logits: NDArray[np.float32], following: NDArray[np.int64]) -> NDArray[np.float64]:
    """Negative log likelihood in nats, float64 [tokens].

    Args:
        logits: [tokens, vocabulary].
        following: the tokens that came, [tokens].
    """
    top = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - top).sum(axis=1, dtype=np.float64)
    chosen: NDArray[Any] = np.take_along_axis(logits - top, following[:, None], axis=1)[:, 0]
    return np.asarray(np.log(total) - chosen)
