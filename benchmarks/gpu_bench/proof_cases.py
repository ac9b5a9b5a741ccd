"""What is to be compiled: weights of every scheme in Llama-3-8B's shapes, and the launches of their products.

Legend: M rows of x, K inputs, N outputs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autoq_kernels import layout
from autoq_kernels.layout import Header, Kind
from autoq_kernels.triton import configs, dequantize, gemm, gemv
from autoq_kernels.triton.configs import Config
from autoq_kernels.triton.weight import stand_in
from gpu_bench.proof_compile import Job, job
from gpu_bench.proof_targets import Architecture

SHAPES_NK = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # Llama-3-8B's linear layers, siblings fused
ODD_NK = (1001, 4099)  # multiples of nothing
ROWS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)  # where the space changes
FEW_ROWS = (1, 64)  # one for each family's default
ODD_ROWS = (1, 3, 17)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One packed format, as the kernels see it.

    Attributes:
        scheme: the candidate that has it.
        kind: see `layout.Kind`.
        bits: of a code.
        group: inputs that share a scale, or 0.
        column: whether inputs have scales too.
        dynamic: whether x is rounded to int8.
        main: whether every configuration of the space is compiled for it.
    """

    scheme: str
    kind: Kind
    bits: int
    group: int = 0
    column: bool = False
    dynamic: bool = False
    main: bool = False

    @property
    def label(self) -> str:
        """As the tables show it."""
        return self.scheme + (f" b{self.bits} g{self.group}" if self.group else "")

    def form(self, n: int, k: int) -> Header:
        """The header of such a weight; the bytes behind it are not kept."""
        head = layout.allocate(
            kind=self.kind,
            bits=self.bits,
            n=n,
            k=k,
            group_size=self.group,
            activation_bits=8 if self.dynamic else 0,
            has_column_scale=self.column,
        )
        return layout.header(head)


def variants() -> tuple[Variant, ...]:
    """Every format; in the whole space, 4 bits in groups of 64 stand for all that have groups."""
    affine = (
        Variant(
            scheme="sinq" if column else "int4wo-hqq" if bits == 4 else "affine",
            kind=Kind.AFFINE,
            bits=bits,
            group=group,
            column=column,
            main=group == 64 and bits == 4,
        )
        for bits in (4, 3, 5, 6, 8)
        for column in (False, True)
        for group in GROUPS
    )
    four_dynamic = (
        Variant(scheme="int4dq", kind=Kind.AFFINE, bits=4, group=group, dynamic=True, main=group == 64)
        for group in GROUPS
    )
    return (
        Variant(scheme="int8wo", kind=Kind.INT8, bits=8, main=True),
        *affine,
        Variant(scheme="fp6-e3m2", kind=Kind.FP6_E3M2, bits=6, main=True),
        Variant(scheme="fp6-e2m3", kind=Kind.FP6_E2M3, bits=6),
        Variant(scheme="int8dq", kind=Kind.INT8, bits=8, dynamic=True, main=True),
        *four_dynamic,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One launch of one product, to be compiled.

    Attributes:
        variant: of the weight.
        dtype: of x, as in `DTYPES`.
        n: N.
        k: K.
        m: M.
        family: gemv, gemm or dequantize.
        config: how the product is cut up; None for dequantize.
        default: whether this configuration runs where nothing was tuned.
        kernel: the function.
        main: whether that is the product itself, not what comes before or behind it.
        launch: the launch.
    """

    variant: Variant
    dtype: str
    n: int
    k: int
    m: int
    family: str
    config: Config | None
    default: bool
    kernel: str
    main: bool
    launch: Any


def of_config(
    variant: Variant, dtype: str, nk: tuple[int, int], m: int, config: Config, *, default: bool, bias: bool = False
) -> Iterator[Case]:
    """The launches of one product under one configuration."""
    (n, k), kind = nk, DTYPES[dtype]
    weight = stand_in(_form(variant, n, k))
    x_MK = torch.empty(m, k, dtype=kind, device="meta")
    y_MN = torch.empty(m, n, dtype=kind, device="meta")
    bias_N = torch.empty(n, dtype=kind, device="meta") if bias else None
    family = {"gemv": gemv, "gemm": gemm}[config.family]
    for launch in family.launches(x_MK, weight, bias_N, y_MN, config):
        yield _case(variant, dtype, nk, m, config.family, config, default, launch)


def of_dequantize(variant: Variant, dtype: str, nk: tuple[int, int]) -> Iterator[Case]:
    """The launches that write a weight out in full."""
    weight = stand_in(_form(variant, *nk))
    for launch in dequantize.launches(weight, torch.empty(*nk, dtype=DTYPES[dtype], device="meta")):
        yield _case(variant, dtype, nk, 0, "dequantize", None, True, launch)


def _case(variant, dtype, nk, m, family, config, default, launch) -> Case:
    return Case(
        variant=variant,
        dtype=dtype,
        n=nk[0],
        k=nk[1],
        m=m,
        family=family,
        config=config,
        default=default,
        kernel=launch.kernel.fn.__name__,
        main=launch.kernel.fn.__module__.rpartition(".")[2] == family,
        launch=launch,
    )


_FORMS: dict[tuple[Variant, int, int], Header] = {}


def _form(variant: Variant, n: int, k: int) -> Header:
    key = variant, n, k
    if key not in _FORMS:
        _FORMS[key] = variant.form(n, k)
    return _FORMS[key]


def defaults() -> Iterator[Case]:
    """What runs where nothing was tuned.

    In bf16 the main formats in every shape at every M, with and without bias, and in an odd shape, the others in one
    shape at two M; in fp16 the main formats in one shape at two M.
    """
    for variant in variants():
        for dtype in DTYPES if variant.main else ("bf16",):
            whole = variant.main and dtype == "bf16"
            rows = dict.fromkeys((*FEW_ROWS, *ROWS)) if whole else FEW_ROWS
            points = [(nk, m) for nk in (SHAPES_NK if whole else SHAPES_NK[:1]) for m in rows]
            if whole:
                points += [(ODD_NK, m) for m in ODD_ROWS]
            for config, (nk, m) in _first_of_each((nk, m, (_default(variant, nk, m),)) for nk, m in points):
                yield from of_config(variant, dtype, nk, m, config, default=True)
            for m in FEW_ROWS if variant.main and dtype == "bf16" else ():
                config = _default(variant, SHAPES_NK[0], m)
                yield from of_config(variant, dtype, SHAPES_NK[0], m, config, default=True, bias=True)
            for nk in (SHAPES_NK[0], ODD_NK) if variant.main else SHAPES_NK[:1]:
                if variant.main or dtype == "bf16":
                    yield from of_dequantize(variant, dtype, nk)


def whole_space() -> Iterator[Case]:
    """Every configuration of the space, for the main formats, in bf16, at the first shape and M that has it."""
    for variant in variants():
        if variant.main:
            points = ((nk, m, configs.space(_form(variant, *nk), m)) for nk in SHAPES_NK for m in ROWS)
            for config, (nk, m) in _first_of_each(points):
                yield from of_config(variant, "bf16", nk, m, config, default=False)


def _default(variant: Variant, nk: tuple[int, int], m: int) -> Config:
    return configs.default(_form(variant, *nk), m)


def _first_of_each(
    points: Iterable[tuple[tuple[int, int], int, Iterable[Config]]],
) -> list[tuple[Config, tuple[tuple[int, int], int]]]:
    """Each configuration with the first (shape, M) that has it, odd shapes apart."""
    found: dict[tuple[Config, bool], tuple[tuple[int, int], int]] = {}
    for nk, m, space in points:
        for config in space:
            found.setdefault((config, nk == ODD_NK), (nk, m))
    return [(config, place) for (config, _), place in found.items()]


def compilations(cases: Iterable[Case], architectures: Sequence[Architecture]) -> dict[str, tuple[Job, list[Case]]]:
    """What is to be compiled, each once, by hash, with the cases that it serves.

    Args:
        cases: with repetitions.
        architectures: to compile for.
    """
    found: dict[str, tuple[Job, list[Case]]] = {}
    for case in cases:
        for architecture in architectures:
            one = job(case.launch, architecture)
            found.setdefault(one.key(), (one, []))[1].append(case)
    return found


def chosen(schemes: Sequence[str] | None = None, *, main: bool = False) -> Iterator[Case]:
    """All cases, or those of formats whose names begin so, or of the main formats."""
    for case in itertools.chain(defaults(), whole_space()):
        named = schemes is None or case.variant.label.startswith(tuple(schemes))
        if named and (case.variant.main or not main):
            yield case


def sampled(found: Mapping[str, tuple[Job, list[Case]]], count: int, seed: int) -> list[str]:
    """The hashes of the main formats' defaults in bf16 at one shape and two M, and of some of the others.

    Args:
        found: as from `compilations`.
        count: how many others.
        seed: the same seed draws the same ones.
    """
    kept = [key for key, (_, cases) in found.items() if any(map(_is_typical, cases))]
    others = sorted(set(found) - set(kept), key=lambda key: _name(*found[key]))
    return kept + random.Random(seed).sample(others, min(count, len(others)))


def _is_typical(case: Case) -> bool:
    typical = case.default and case.variant.main and case.dtype == "bf16" and (case.n, case.k) == SHAPES_NK[0]
    return typical and case.m in (0, *FEW_ROWS) and case.launch.arguments.get("bias") is None


def _name(job: Job, cases: Sequence[Case]) -> str:
    """What is compiled, in words that do not change with the kernel's source."""
    case = cases[0]
    words = (case.variant.label, case.variant.column, case.dtype, case.n, case.k, case.m, case.kernel, case.config)
    return repr((job.architecture.name, *map(str, words), case.launch.arguments.get("bias") is not None))
