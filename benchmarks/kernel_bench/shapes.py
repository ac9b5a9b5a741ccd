"""What is measured, in which order, and what a budget of time leaves out.

Legend: N output features, K input features, M rows of the activation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from autoq import candidates
from autoq.candidates import Candidate

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
LARGE = ((4096, 4096), (11008, 4096))  # those the figures are about
SMALL = ((576, 576), (1536, 576))
MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "large": {"square": (4096, 4096), "tall": (11008, 4096), "wide": (4096, 11008)},
    "small": {"square": (576, 576), "tall": (1536, 576), "wide": (576, 1536)},
    "SmolLM2-135M": {
        "q, o": (576, 576),
        "k, v": (192, 576),
        "gate, up": (1536, 576),
        "down": (576, 1536),
        "head": (49152, 576),
    },
    "Llama-3-8B": {
        "q, o": (4096, 4096),
        "k, v": (1024, 4096),
        "gate, up": (14336, 4096),
        "down": (4096, 14336),
        "head": (128256, 4096),
    },
    "Qwen3-1.7B": {
        "q, o": (2048, 2048),
        "k, v": (1024, 2048),
        "gate, up": (6144, 2048),
        "down": (2048, 6144),
        "head": (151936, 2048),
    },
    "ViT-L": {"qkv": (3072, 1024), "o": (1024, 1024), "fc1": (4096, 1024), "fc2": (1024, 4096), "head": (1000, 1024)},
    "MiniLM": {"q, k, v, o": (384, 384), "fc1": (1536, 384), "fc2": (384, 1536)},
}
_QUICK = {(4096, 4096): (1, 8, 64, 512), (576, 576): (1,), (1536, 576): (1,), (576, 1536): (1,)}
_HUGE = 32768  # a weight of more rows is a language model's head: last in the order


class Cell(NamedTuple):
    """One product in one setting; all engines of a cell are timed in one window."""

    n: int
    k: int
    m: int
    dtype: str
    threads: int

    def __str__(self) -> str:
        return f"{self.n}x{self.k} M={self.m} {self.dtype} threads={self.threads}"


def names(n: int, k: int) -> list[str]:
    """Where the weight [n, k] occurs, such as ``Llama-3-8B q, o``."""
    return [
        f"{model} {layer}" for model, layers in MODELS.items() for layer, shape in layers.items() if shape == (n, k)
    ]


def shapes(models: Iterable[str] = MODELS) -> list[tuple[int, int]]:
    """The distinct (N, K) of some models, in their order."""
    return list(dict.fromkeys(shape for model in models for shape in MODELS[model].values()))


def quick_cells(dtypes: Sequence[str], threads: Sequence[int]) -> list[Cell]:
    """The subset of ``--quick``: M = 1, 8, 64 and 512 of the large square, M = 1 of the small shapes."""
    return [Cell(*shape, m, dtype, t) for dtype in dtypes for t in threads for shape, ms in _QUICK.items() for m in ms]


def ordered_cells(
    wanted: Sequence[tuple[int, int]], rows: Sequence[int], dtypes: Sequence[str], threads: Sequence[int]
) -> list[Cell]:
    """All combinations, the most important first; within a rank those of a weight lie together."""
    cells = [Cell(*shape, m, dtype, t) for dtype in dtypes for shape in wanted for t in threads for m in rows]
    return sorted(cells, key=_rank)  # stable: the order of the arguments within a rank


def _rank(cell: Cell) -> int:
    shape = (cell.n, cell.k)
    if cell.m in _QUICK.get(shape, ()):
        return 0
    if shape in LARGE:
        return 1
    if cell.n > _HUGE:
        return 5
    if shape in shapes(("large", "small", "SmolLM2-135M")):
        return 2
    return 3 if cell.m in (1, 8, 64, 512) else 4


def base_candidates() -> list[Candidate]:
    """Those a search considers, one of every other scheme (groups of 64), and int4dq in all its group sizes."""
    chosen = list(candidates.DEFAULT)
    variants: dict[str, list[Candidate]] = {}
    for one in candidates.ALL:
        variants.setdefault(one.key, []).append(one)
    for key, all_of_key in variants.items():
        if key == "int4dq":
            chosen += [one for one in all_of_key if one.method == "hqq"]
        elif not any(one.key == key for one in chosen):
            chosen.append(next((one for one in all_of_key if getattr(one, "group_size", 0) == 64), all_of_key[0]))
    return list(dict.fromkeys(chosen))


def candidates_of(cell: Cell, wanted: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """(measured, left out): of a head's weight, in over 32768 rows, only the base schemes fit in memory together."""
    if cell.n <= _HUGE:
        return list(wanted), []
    base = base_candidates()
    return [one for one in wanted if one in base], [one for one in wanted if one not in base]


class Visit:
    """Yields cells until the time is spent.

    Args:
        cells: in the order of importance.
        seconds: no further cell is begun after these; None visits all.
        clock: seconds, increasing.

    Attributes:
        left_out: the cells not visited, known once the iteration is over.
    """

    def __init__(
        self, cells: Sequence[Cell], seconds: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.left_out: list[Cell] = []
        self._cells, self._seconds, self._clock = cells, seconds, clock

    def __iter__(self) -> Iterator[Cell]:
        started = self._clock()
        for number, cell in enumerate(self._cells):
            if self._seconds is not None and self._clock() - started >= self._seconds:
                self.left_out = list(self._cells[number:])
                return
            yield cell
