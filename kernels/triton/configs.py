"""The tuning space of each family of kernels: few configurations, each with a reason, pruned by shape.

Legend: M rows of the activation, K inputs, N outputs.

A **gemv** program multiplies ``block_n`` rows of the weight by one or two rows of x. Each thread decodes whole
blocks of 32 inputs (16 of 8-bit codes), so ``block_k`` is 1024 (512) times the warps, or twice that: then a thread
takes two neighbouring blocks with one load of their group's scale. More rows mean more loads in flight and fewer
reads of x; more warps finish a row sooner; ``split_k`` fills the device where N is small.

A **gemm** program multiplies a tile of ``block_n`` outputs by ``block_m`` rows of x, ``block_k`` inputs at a time. The
weight is the left operand, so few rows of x fill the short side of the matrix instruction. ``block_k`` never crosses
a group of scales. Partial sums of ``split_k`` parts are added in a fixed order: results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autoq_kernels.layout import Header, Kind

FAMILIES = ("gemv", "gemm")
# With more rows of x a gemv is bound by its multiplications; matrix instructions cost less, mostly empty as they are.
GEMV_ROWS = 2
_ENOUGH = 264  # programs: two on each of an H100's multiprocessors; with fewer, some idle
_MOST_PARTS = 16
_MANY_ROWS = 128
BUCKETS = tuple(1 << power for power in range(13))


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one product is cut up.

    Attributes:
        family: ``gemv`` or ``gemm``.
        block_m: rows of x of a program; of a gemv 1 or 2.
        block_n: outputs of a program.
        block_k: inputs of one step.
        split_k: programs that share the inputs of an output.
        warps: of a program, 32 threads each.
        stages: of software pipelining.
    """

    family: str
    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    warps: int = 4
    stages: int = 1

    def __str__(self) -> str:
        return (
            f"{self.family} m{self.block_m} n{self.block_n} k{self.block_k} s{self.split_k} "
            f"w{self.warps} p{self.stages}"
        )

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Config:
        """From `to_json`'s fields.

        Raises:
            ValueError: a field is missing, unknown, or no positive whole number.
        """
        try:
            config = cls(**fields)
        except TypeError as problem:
            raise ValueError(f"not a configuration: {problem}") from problem
        numbers = [value for name, value in asdict(config).items() if name != "family"]
        if config.family not in FAMILIES or any(type(one) is not int or one < 1 for one in numbers):
            raise ValueError(f"not a configuration: {dict(fields)}")
        return config


def m_bucket(m: int) -> int:
    """The rows under which a product is tuned: the next power of two, at most 4096."""
    return min(BUCKETS[-1], 1 << max(0, m - 1).bit_length())


def unit(form: Header) -> int:
    """Inputs that one thread of a gemv decodes at a time."""
    return 16 if form.bits == 8 else 32


def dynamic(form: Header, m: int) -> bool:
    """Whether x is rounded to int8 in a product of `m` rows."""
    return form.activation_bits == 8 and m >= form.m_switch


def space(form: Header, m: int) -> tuple[Config, ...]:
    """The configurations worth timing for a product, the default of each family that has one first.

    Args:
        form: of the weight.
        m: rows of x; all of one `m_bucket` have the same space.
    """
    return (*_gemv(form, m), *_gemm(form, m))


def default(form: Header, m: int) -> Config:
    """What runs where nothing was tuned: the gemv up to its few rows, the gemm above."""
    return space(form, m)[0]


def _gemv(form: Header, m: int) -> tuple[Config, ...]:
    if m > GEMV_ROWS:
        return ()
    # Two planes or whole numbers take registers that a second block would need.
    simple = form.kind is Kind.AFFINE and form.bits in (4, 8) and not dynamic(form, m)
    paired = m == 1 and simple and form.group_size >= 2 * unit(form)
    found = []
    for block_n, warps in ((8, 2), (4, 2), (2, 2), (4, 4), (8, 4), (2, 8)):
        threads_k = 32 * warps * unit(form)
        if threads_k >= 2 * form.k and warps > 1 and found:
            continue  # most threads would have nothing to do
        block_k = 2 * threads_k if paired and form.k > threads_k else threads_k
        programs = -(-form.n // block_n)
        for split_k in _splits(form, m, programs, -(-form.k // block_k)):
            found.append(
                Config(family="gemv", block_m=m, block_n=block_n, block_k=block_k, split_k=split_k, warps=warps)
            )
    enough = [one for one in found if -(-form.n // one.block_n) * one.split_k >= _ENOUGH]
    enough.sort(key=lambda one: one.split_k)
    first = enough[0] if enough else max(found, key=lambda one: -(-form.n // one.block_n) * one.split_k)
    return tuple(dict.fromkeys((first, *found)))


# (block_m, block_n, largest block_k, warps, stages) of a gemm.
_TILES = (
    (16, 128, 64, 4, 4),
    (16, 64, 128, 4, 4),
    (32, 128, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (128, 128, 64, 8, 3),
)
# Some would spill: codes of two planes take many registers to decode, sums scaled group by group many to keep.
_PLANES_TILES = tuple(tile for tile in _TILES if tile[:2] not in ((32, 128), (64, 128)))
_WHOLE_TILES = tuple(tile for tile in _TILES if tile[:2] not in ((64, 128), (128, 128)))
_INT8_TILES = tuple((32, 64, 64, 4, 4) if tile[0] == 32 else tile for tile in _TILES)  # 32 x 128 spills on sm_120
# Rows of int8 that start at any byte are loaded byte by byte.
_SCATTERED_TILES = ((16, 64, 64, 4, 4), (64, 64, 64, 4, 4))


def _gemm(form: Header, m: int) -> tuple[Config, ...]:
    grouped = form.kind is Kind.AFFINE
    whole = grouped and dynamic(form, m)
    m = m_bucket(m)
    planes = form.bits in (3, 5, 6) and form.group_size != 32  # with steps of 32 inputs the wide tiles are small enough
    tiles = _WHOLE_TILES if whole else _PLANES_TILES if planes else _TILES
    if form.kind is Kind.INT8:
        tiles = _SCATTERED_TILES if form.k % 16 else _INT8_TILES
    if m > _MANY_ROWS:
        tiles = tiles[::-1]  # the widest first: each decodes its weights once
    found = []
    for block_m, block_n, widest, warps, stages in tiles:
        if block_m > max(16, m) or (block_m < 64 and m > 2 * block_m and tiles is not _SCATTERED_TILES):
            continue
        block_k = min(widest, form.group_size) if grouped else widest
        if whole:
            block_k = form.group_size  # sums of whole numbers are scaled once a group
        programs = -(-form.n // block_n) * -(-m // block_m)
        for split_k in _splits(form, m, programs, -(-form.k // block_k)):
            found.append(
                Config(
                    family="gemm",
                    block_m=block_m,
                    block_n=block_n,
                    block_k=block_k,
                    split_k=split_k,
                    warps=warps,
                    stages=stages,
                )
            )
    return tuple(dict.fromkeys(found))


def _splits(form: Header, m: int, programs: int, steps: int) -> tuple[int, ...]:
    """Numbers of parts worth trying, the likely one first: as many as fill the device.

    Each part has two steps at least, and writing and reading all parts' sums in float32 is at most half of the weight.
    """
    parts, most = 1, min(_MOST_PARTS, form.total_bytes // (16 * m * form.n))
    while parts * programs < _ENOUGH and 2 * parts <= most and 4 * parts <= steps:
        parts *= 2
    return (parts, 1) if parts > 1 else (1,)
