"""How much of the trade-off a set of measured plans covers, and whether more of them still tell something.

Array suffixes: P plans, R rows of samples, B bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_RESAMPLES = 200


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area between a reference point and the points that beat it in both coordinates; lower is better in both.

    Args:
        points: (latency or bytes, loss) of each plan.
        reference: what is just not worth having. Dividing both by it gives the share of the box up to the origin.
    """
    area, low = 0.0, reference[1]
    for x, y in sorted(points):
        if x < reference[0] and y < low:
            area += (reference[0] - x) * (low - y)
            low = y
    return area


def improvements(
    candidates: Sequence[tuple[float, float]], points: Sequence[tuple[float, float]], reference: tuple[float, float]
) -> list[float]:
    """By how much each candidate alone would raise the points' hypervolume."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if x < reference[0] and y < (front[-1][1] if front else reference[1]):
            front.append((x, y))
    # Between two neighbours the points leave everything below the left one's loss uncovered.
    left = np.array([-np.inf, *(x for x, _ in front)])
    right = np.array([*(x for x, _ in front), reference[0]])
    height = np.array([reference[1], *(y for _, y in front)])
    return [
        float((np.maximum(right - np.maximum(left, x), 0.0) * np.maximum(height - y, 0.0)).sum()) for x, y in candidates
    ]


def gain_and_noise(
    values_P: Sequence[float],
    rows_PR: Sequence[Sequence[float]],
    *,
    recent: int,
    reference: tuple[float, float],
    seed: int = 0,
) -> tuple[float, float]:
    """What the last plans added to the hypervolume, and how far that may be chance.

    Args:
        values_P: latency or bytes of the plans, in the order they were measured.
        rows_PR: their losses on the same rows of samples; the rows are resampled, all plans' together.
        recent: how many of the last plans are in question.
        reference: see ``hypervolume``.
        seed: of the resampling.

    Returns:
        The gain, and the standard deviation of the gain over the resamples.
    """
    losses_PR = np.asarray(rows_PR, dtype=np.float64)
    rng = np.random.default_rng(seed)
    picks_BR = rng.integers(losses_PR.shape[1], size=(_RESAMPLES, losses_PR.shape[1]))

    def gain(losses_P: Floats) -> float:
        points = list(zip(values_P, losses_P.tolist(), strict=True))
        older = points[: len(points) - recent]
        return hypervolume(points, reference) - hypervolume(older, reference)

    resampled = [gain(losses_PR[:, picks_R].mean(axis=1)) for picks_R in picks_BR]
    return gain(losses_PR.mean(axis=1)), float(np.std(resampled))
