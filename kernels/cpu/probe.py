"""Tries a build out: every kind of weight, one and several rows, against the plain-PyTorch definition."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from autoq_kernels import kv_rows, layout, ops
from autoq_kernels.layout import Kind

N, K = 6, 75  # neither a multiple of a tile, a vector or a block
ROWS = (1, 3, 40, 70)
GROUP_SIZE = 32
M_SWITCH = 8  # of the mixes: between two of ROWS
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-4, torch.bfloat16: 3e-3}  # relative RMS
_SECONDS = 300
_OWN_FAULT = (signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT, signal.SIGTRAP)


def sample_weights(n: int = N, k: int = K, group_size: int = GROUP_SIZE) -> dict[str, Tensor]:
    """A packed weight of every kind, bit width and treatment of activations, by name, from a fixed seed.

    Args:
        n: output features.
        k: input features.
        group_size: inputs that share a scale, for the affine kinds.
    """
    g = torch.Generator().manual_seed(0)
    groups = -(-k // group_size)

    def affine(bits: int, *, columns: bool = True, activation_bits: int = 0, m_switch: int = 0) -> Tensor:
        return layout.build(
            kind=Kind.AFFINE,
            bits=bits,
            n=n,
            k=k,
            group_size=group_size,
            codes=torch.randint(0, 1 << bits, (n, groups * group_size), generator=g, dtype=torch.uint8),
            scale=(torch.rand(n, groups, generator=g) + 0.5).half(),
            minimum=(torch.randn(n, groups, generator=g) * 0.1 - 0.5 * (1 << bits)).half(),
            row_scale=torch.exp2(torch.randint(-8, 0, (n,), generator=g).float()),
            column_scale=torch.rand(k, generator=g) + 0.5 if columns else None,
            activation_bits=activation_bits,
            m_switch=m_switch,
        )

    weights = {f"int{bits}": affine(bits, columns=bits != 8) for bits in layout.PLANES}
    weights["int4dq"] = affine(4, activation_bits=8)
    weights["int4mix"] = affine(4, columns=False, activation_bits=8, m_switch=M_SWITCH)
    scale = torch.rand(n, generator=g) + 0.5
    codes = torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8)
    for name, form in (
        ("int8wo", {}),
        ("int8dq", {"activation_bits": 8}),
        ("int8mix", {"activation_bits": 8, "m_switch": M_SWITCH}),
    ):
        weights[name] = layout.build(kind=Kind.INT8, bits=8, n=n, k=k, codes=codes, scale=scale, **form)
    fp6 = torch.randint(0, 64, (n, -(-k // layout.BLOCK) * layout.BLOCK), generator=g, dtype=torch.uint8)
    for kind in (Kind.FP6_E3M2, Kind.FP6_E2M3):
        weights[kind.name.lower()] = layout.build(kind=kind, bits=6, n=n, k=k, codes=fp6, scale=scale)
    return weights


def relative_rms(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|``, root mean square, in float64."""
    difference = (got.double() - expected.double()).square().sum()
    return float((difference / expected.double().square().sum().clamp_min(1e-300)).sqrt())


def wrong_results(namespace: str) -> list[str]:
    """What the operators of a build get wrong.

    Args:
        namespace: such as ``"autoq_avx2"``.

    Returns:
        One line per wrong result; empty for a good build.
    """
    operators = getattr(torch.ops, namespace)
    wrong: list[str] = []
    for name, data in sample_weights().items():
        head = data[: layout.HEADER_BYTES]
        error = relative_rms(operators.dequantize(head, N, K), ops.dequantize(head, N, K))
        if not error <= 1e-6:
            wrong.append(f"dequantize of {name}: relative error {error:.2e}")
        rows = torch.tensor([[N - 1, 0], [2, 2]])
        found = operators.embedding(rows, head, N, K, torch.float32)
        if not torch.equal(found, operators.dequantize(head, N, K)[rows]):
            wrong.append(f"embedding of {name}: other rows than dequantize")
        for m, (dtype, tolerance) in itertools.product(ROWS, TOLERANCE.items()):
            g = torch.Generator().manual_seed(m)
            x, bias = torch.randn(m, K, generator=g).to(dtype), torch.randn(N, generator=g).to(dtype)
            error = relative_rms(operators.linear(x, head, bias, N), ops.linear(x.float(), head, bias, N))
            if not error <= tolerance:
                wrong.append(f"linear of {name}, {m} rows of {dtype}: relative error {error:.2e}")
    return wrong + _wrong_attention(operators)


def _wrong_attention(operators: Any) -> list[str]:
    """The same of attention over numbers and over the rows of a quantized cache, for one query and for many."""
    wrong: list[str] = []
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 70, 64, generator=g) for _ in range(2))
    caches: dict[str, tuple[Tensor, Tensor]] = {"float32": (k, v), "bfloat16": (k.bfloat16(), v.bfloat16())}
    for precision in get_args(kv_rows.Precision):
        rows = [torch.zeros(1, 2, 70, kv_rows.row_bytes(precision, 64), dtype=torch.uint8) for _ in range(4)]
        operators.store_kv(rows[0], rows[1], k, v, torch.tensor(0))
        ops.store_kv(rows[2], rows[3], k, v, torch.tensor(0))
        if not (torch.equal(rows[0], rows[2]) and torch.equal(rows[1], rows[3])):
            wrong.append(f"store_kv of {precision}: other bytes than the definition's")
        caches[precision] = (rows[0], rows[1])
    for (name, (keys, values)), queries in itertools.product(caches.items(), (1, 20)):
        q = torch.randn(1, 4, queries, 64, generator=g).to(keys.dtype if keys.is_floating_point() else torch.float32)
        found = operators.attention(q, keys, values, None, 0.125, True)
        error = relative_rms(found, ops.attention(q, keys, values, None, 0.125, True))
        if not error <= TOLERANCE[q.dtype]:
            wrong.append(f"attention of {queries} queries over {name}: relative error {error:.2e}")
    return wrong


class Failure(NamedTuple):
    """What is wrong with a build.

    Attributes:
        reason: in words.
        lasting: whether it will be so again: not for a child that could not start or ran out of time or memory.
    """

    reason: str
    lasting: bool


def failure(library: Path, namespace: str) -> Failure | None:
    """Try a build in a child process, which a wrong instruction may kill.

    Args:
        library: the shared library.
        namespace: of its operators.

    Returns:
        Why the build must not be used, or None.
    """
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        f"import torch; torch.ops.load_library({str(library)!r})\n"
        "from autoq_kernels.cpu import probe\n"
        f"sys.exit('\\n'.join(probe.wrong_results({namespace!r})) or 0)"
    )
    try:
        child = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Failure(f"the probe did not run: {error}", lasting=False)
    if child.returncode == 0:
        return None
    if child.returncode < 0:
        killer = signal.Signals(-child.returncode)
        return Failure(f"the probe was killed by {killer.name}", lasting=killer in _OWN_FAULT)
    return Failure(f"the probe failed: {child.stderr[-2000:].strip()}", lasting=True)
