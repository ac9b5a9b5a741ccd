"""Every kernel that multiplies, in the interpreter, against its scheme's float64 reference.

How the cases were chosen: what a product depends on is listed as factors, below, once for each family of kernels. A
case has one level of each factor, and the cases are a covering design: every two levels of every two factors occur
together in some case. A program of the interpreter costs as much for many values as for few, so blocks are made large
by hand, and the K that take several steps are a few; the configurations of the tuning space, which have many programs,
run on a few outputs, the default and one other for each scheme.
"""

import itertools
import math
import random
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from autoq import candidates
from autoq.candidates import Packed
from autoq.numerics import relative_rms
from autoq_kernels import layout
from autoq_kernels.layout import Kind
from autoq_kernels.tolerance import TOLERANCE
from autoq_kernels.triton import configs, gemm, gemv, launching
from autoq_kernels.triton.configs import Config
from autoq_kernels.triton.weight import Weights

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
QUANTIZED = [str(one) for one in candidates.ALL if one.key != "none"]
# With the group sizes below these are all the schemes of candidates.ALL but "none" (a test says so).
SCHEMES = (
    "int8wo",
    "int8dq",
    "int8mix",
    "fp6(format=e3m2)",
    "fp6(format=e2m3)",
    "int4wo-hqq(group_size={g})",
    *(f"sinq(bits={bits},group_size={{g}})" for bits in (3, 4, 5, 6, 8)),
    *(f"{key}(group_size={{g}},method={method})" for key in ("int4dq", "int4mix") for method in ("hqq", "sinq")),
)
COMMON = {
    "scheme": SCHEMES,
    "g": (32, 64, 128),
    "k": (40, 64, 96, 100, 160, 224, 257, 416, 1120),
    "n": (1, 33, 96, 129, 200),
    "bias": ("", "like x", "float32"),
    "x": ("centred", "positive"),
    "split": (1, 2, 3),
}
GEMV = COMMON | {"m": (1, 2), "dtype": ("bf16", "fp16", "fp32"), "programs": (1, 2, 4), "pair": (1, 2)}
GEMM = COMMON | {
    "m": (1, 2, 3, 16, 17, 64),
    "dtype": ("bf16", "fp16"),
    "block_m": (16, 32, 64),
    "block_k": (32, 64, 128),
    "programs": (1, 2, 4),
}


def covering(factors, seed=0):
    """Cases in which every two levels of every two factors meet: greedily, each from the first pair still missing."""
    generator = random.Random(seed)
    pairs = (
        itertools.product(((a, i) for i in factors[a]), ((b, j) for j in factors[b])) for a, b in pairs_of(factors)
    )
    missing = dict.fromkeys(map(frozenset, itertools.chain(*pairs)))
    cases = []
    while missing:
        case = dict(next(iter(missing)))
        for name in generator.sample(sorted(factors), len(factors)):
            levels = generator.sample(factors[name], len(factors[name]))
            case.setdefault(
                name, max(levels, key=lambda i: sum(frozenset({(name, i), one}) in missing for one in case.items()))
            )
        for pair in itertools.combinations(case.items(), 2):
            missing.pop(frozenset(pair), None)
        cases.append(case)
    return cases


def pairs_of(factors):
    return itertools.combinations(sorted(factors), 2)


def scheme_of(case):
    return str(candidates.parse(case["scheme"].format(g=case["g"])))


def label(case):
    rest = [f"{name}={value}" for name, value in case.items() if name not in ("scheme", "g")]
    return " ".join([scheme_of(case), *sorted(rest)])


class Product(NamedTuple):
    """A weight, an activation and a bias, and what their product should be."""

    weight: object
    x: torch.Tensor
    bias: torch.Tensor | None
    want: torch.Tensor


def product(scheme, m, n, k, dtype, bias="", x="centred", scale=0.05):
    candidate, generator = candidates.parse(scheme), torch.Generator().manual_seed(1000 * n + k + m)
    w_NK = torch.randn(n, k, generator=generator) * scale
    x_MK = torch.randn(m, k, generator=generator) + (3.0 if x == "positive" else 0.0)
    if n == 1:  # a single output must not happen to be a small difference of large sums
        w_NK, x_MK = w_NK.abs(), x_MK.abs()
    p = candidate.pack(w_NK)
    x_MK = x_MK.to(FLOATS[dtype])
    bias_N = (
        torch.randn(n, generator=generator).to(torch.float32 if bias == "float32" else x_MK.dtype) if bias else None
    )
    return Product(Weights().of(p.head), x_MK, bias_N, candidate.reference(x_MK, p, bias_N))


def multiplied(family, one, config):
    y_MN = torch.empty(len(one.x), one.weight.form.n, dtype=one.x.dtype)
    launching.run(family.launches(one.x, one.weight, one.bias, y_MN, config))
    return y_MN


def check(family, one, config):
    y_MN = multiplied(family, one, config)
    assert relative_rms(y_MN, one.want) <= TOLERANCE[y_MN.dtype]


def power_of_two_above(value):
    return 1 << math.ceil(math.log2(max(1, value)))


def test_the_design_has_every_scheme_and_every_pair():
    for factors in (GEMV, GEMM):
        cases = covering(factors)
        assert {scheme_of(case) for case in cases} == set(QUANTIZED)
        for a, b in pairs_of(factors):
            assert {(case[a], case[b]) for case in cases} == set(itertools.product(factors[a], factors[b]))


@pytest.mark.parametrize("case", covering(GEMV), ids=label)
def test_gemv(case):
    one = product(scheme_of(case), *(case[name] for name in ("m", "n", "k", "dtype", "bias", "x")))
    form = one.weight.form
    blocks = case["pair"] if form.kind is Kind.AFFINE and form.group_size >= 64 else 1
    config = Config(
        family="gemv",
        block_m=case["m"] if case["programs"] > 1 else 2,
        block_n=power_of_two_above(case["n"] / case["programs"]),
        block_k=32 * configs.unit(form) * blocks,
        split_k=case["split"],
        warps=1,
    )
    check(gemv, one, config)


@pytest.mark.parametrize("case", covering(GEMM), ids=label)
def test_gemm(case):
    one = product(scheme_of(case), *(case[name] for name in ("m", "n", "k", "dtype", "bias", "x")))
    form = one.weight.form
    if form.kind is Kind.AFFINE:
        whole = configs.dynamic(form, case["m"])
        block_k = form.group_size if whole else min(case["block_k"], form.group_size)
    else:
        block_k = case["block_k"]
    config = Config(
        family="gemm",
        block_m=case["block_m"],
        block_n=max(16, power_of_two_above(case["n"] / case["programs"])),
        block_k=block_k,
        split_k=case["split"],
    )
    check(gemm, one, config)


# What follows is about values, on small products of every family. Dynamic schemes are among them.
SAMPLE = ("int8wo", "int8dq", "int4wo-hqq(group_size=32)", "sinq(bits=5,group_size=64)", "fp6(format=e3m2)")
SAMPLE += ("int4dq(group_size=64,method=sinq)",)
SMALL = {
    gemv: Config(family="gemv", block_m=2, block_n=16, block_k=1024, warps=1),
    gemm: Config(family="gemm", block_m=16, block_n=32, block_k=32),
}
every_family = pytest.mark.parametrize("family", SMALL, ids=lambda family: family.__name__.rpartition(".")[2])
every_sample = pytest.mark.parametrize("scheme", SAMPLE)


def small(family, form, m=3, **changes):
    """A configuration with one or two programs for a small product."""
    config = replace(SMALL[family], **changes)
    if family is gemv:
        return replace(config, block_k=32 * configs.unit(form))
    whole = form.kind is Kind.AFFINE and configs.dynamic(form, m)
    return replace(config, block_k=form.group_size) if whole else config


@every_family
@every_sample
def test_rows_of_x_that_are_zero_or_not_finite_stay_among_themselves(family, scheme):
    one = product(scheme, 4, 20, 100, "bf16", bias="like x")
    config = small(family, one.weight.form, block_m=4 if family is gemv else 16)
    clean = multiplied(family, one, config)
    one.x[0], one.x[1, 7], one.x[3, 99] = 0.0, torch.nan, torch.inf
    y_MN = multiplied(family, one, config)
    assert torch.equal(y_MN[0], one.bias)
    assert y_MN[1].isnan().all()
    assert torch.equal(y_MN[2], clean[2])
    assert not y_MN[3].isfinite().any()


@every_family
@every_sample
@pytest.mark.parametrize("split", [1, 3])
def test_the_same_product_gives_the_same_bits(family, scheme, split):
    one = product(scheme, 2, 20, 224, "fp16", bias="like x")
    config = small(family, one.weight.form, split_k=split)
    assert torch.equal(multiplied(family, one, config), multiplied(family, one, config))


@every_family
@every_sample
@pytest.mark.parametrize(("dtype", "power"), [("bf16", 40), ("bf16", -30), ("fp16", 14), ("fp16", -10)])
def test_the_error_does_not_depend_on_the_magnitude_of_x(family, scheme, dtype, power):
    one = product(scheme, 2, 20, 100, dtype)
    weight, x = one.weight, (one.x.clamp(-2, 2) * 2.0**power).to(one.x.dtype)
    candidate, p = candidates.parse(scheme), Packed(layout.buffer(weight.head))
    scaled = one._replace(x=x, want=candidate.reference(x, p))
    check(family, scaled, small(family, weight.form))


@every_family
@every_sample
@pytest.mark.parametrize(("dtype", "power"), [("bf16", 30), ("fp16", 9), ("fp16", -12)])
def test_the_error_does_not_depend_on_the_magnitude_of_the_weight(family, scheme, dtype, power):
    one = product(scheme, 2, 20, 100, dtype, scale=2.0**power)
    check(family, one, small(family, one.weight.form))


@every_family
@pytest.mark.parametrize(
    "scheme", ["sinq(bits=4,group_size=32)", "sinq(bits=8,group_size=64)", "int4dq(group_size=32,method=sinq)"]
)
def test_column_scales_do_not_overflow_float16(family, scheme):
    """x near float16's largest number times column scales up to 30, where the product itself is small."""
    candidate, generator = candidates.parse(scheme), torch.Generator().manual_seed(0)
    p = candidate.pack(torch.randn(20, 100, generator=generator) * 1e-3)
    p.column_scale.mul_(torch.rand(100, generator=generator) * 30)
    x = (torch.rand(2, 100, generator=generator) - 0.5).sign() * 6e4
    one = Product(Weights().of(p.head), x.half(), None, candidate.reference(x.half(), p))
    assert one.want.abs().max() < 6e4
    check(family, one, small(family, one.weight.form))


@pytest.mark.parametrize("place", range(len(QUANTIZED)), ids=QUANTIZED)
def test_configurations_of_the_tuning_space(place):
    """For few rows and for more: of each family the default and, by turn, one other."""
    for m, n in ((1, 5), (40, 40)):
        one = product(QUANTIZED[place], m, n, 288, ("bf16", "fp16")[place % 2], bias="like x")
        for family, name in ((gemv, "gemv"), (gemm, "gemm")):
            found = [config for config in configs.space(one.weight.form, m) if config.family == name]
            for config in dict.fromkeys(found[:1] + found[place % len(found) :][:1] if found else ()):
                check(family, one, config)


@every_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_large_column_scale_leaves_the_others_their_precision(family, dtype):
    candidate, generator = candidates.parse("sinq(bits=4,group_size=64)"), torch.Generator().manual_seed(0)
    w_NK = torch.randn(64, 128, generator=generator)
    w_NK[:, 5] *= 100
    p = candidate.pack(w_NK)
    assert p.column_scale.max() > 16 * p.column_scale.median()
    x = (torch.randn(2, 128, generator=generator) * 1e-3).to(dtype)
    one = Product(Weights().of(p.head), x, None, candidate.reference(x, p))
    check(family, one, small(family, one.weight.form))
