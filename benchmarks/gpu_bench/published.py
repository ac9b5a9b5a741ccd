"""What others measured for Llama-3-8B at batch 1, what that says about a token, and what autoq may expect.

GB are 10⁹ bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoq.candidates import Candidate
from gpu_bench.roofline import (
    A100,
    BANDWIDTH_SHARE,
    H100,
    LLAMA_3_8B,
    RTX_4090,
    SCHEMES,
    SLOW_SHARE,
    Device,
    model_ms,
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """Tokens per second that others measured, batch 1, Llama-3(.1)-8B.

    Attributes:
        device: where.
        name: what they call it.
        tokens_per_s: the number.
        linear_gb: what its linear layers read for a token.
        scheme: autoq's counterpart, as in `SCHEMES`; "" where there is none.
        source: where it was published.
        basis: whether the rest of a token is estimated from it.
    """

    device: Device
    name: str
    tokens_per_s: float
    linear_gb: float
    scheme: str
    source: str
    basis: bool = False

    @property
    def ms(self) -> float:
        """Per token."""
        return 1e3 / self.tokens_per_s

    def rest_ms(self, share: float) -> float:
        """What is left of a token after its linear layers, had they read with this share of the bandwidth."""
        return self.ms - self.linear_gb / (self.device.bandwidth_gb_s * share) * 1e3


def linear_gb(bits: float, head_bits: float | None = None) -> float:
    """GB of all linear layers with so many bits a weight; lm_head may have others."""
    return sum(
        layer.count * layer.n * layer.k * (head_bits if layer.name == "lm_head" and head_bits else bits) / 8e9
        for layer in LLAMA_3_8B
    )


_AO = "torchao, torchao/quantization/README.md"
_GEMLITE = "gemlite issue 22"
PUBLISHED = (
    Published(
        device=A100, name="bf16", tokens_per_s=95.64, linear_gb=linear_gb(16), scheme="none", source=_AO, basis=True
    ),
    Published(device=A100, name="int8wo", tokens_per_s=153.03, linear_gb=linear_gb(8), scheme="int8wo", source=_AO),
    Published(device=A100, name="int8dq", tokens_per_s=8.61, linear_gb=linear_gb(8), scheme="int8dq", source=_AO),
    Published(device=A100, name="fp6", tokens_per_s=161.58, linear_gb=linear_gb(6), scheme=SCHEMES[3], source=_AO),
    Published(
        device=A100, name="int4wo-64", tokens_per_s=180.80, linear_gb=linear_gb(4.5), scheme=SCHEMES[4], source=_AO
    ),
    Published(device=A100, name="autoquant-int4hqq", tokens_per_s=188.41, linear_gb=4.25, scheme="", source=_AO),
    Published(
        device=H100, name="bf16", tokens_per_s=126.90, linear_gb=linear_gb(16), scheme="none", source=_AO, basis=True
    ),
    Published(device=H100, name="int8wo", tokens_per_s=198.85, linear_gb=linear_gb(8), scheme="int8wo", source=_AO),
    Published(
        device=H100, name="int4wo-64", tokens_per_s=241.39, linear_gb=linear_gb(4.5), scheme=SCHEMES[4], source=_AO
    ),
    Published(
        device=RTX_4090,
        name="fp16, no CUDA graph",
        tokens_per_s=53,
        linear_gb=linear_gb(16),
        scheme="none",
        source=_GEMLITE,
    ),
    Published(
        device=RTX_4090,
        name="HQQ 4-bit g64 + gemlite, no CUDA graph",
        tokens_per_s=116,
        linear_gb=linear_gb(4.5, head_bits=16),
        scheme="",
        source=_GEMLITE,
    ),
    Published(
        device=RTX_4090,
        name="HQQ 4-bit g64 + gemlite, CUDA graph",
        tokens_per_s=155,
        linear_gb=linear_gb(4.5, head_bits=16),
        scheme=SCHEMES[4],
        source=_GEMLITE,
        basis=True,
    ),
    Published(
        device=RTX_4090,
        name="HQQ 4-bit g64, as its README says",
        tokens_per_s=158,
        linear_gb=linear_gb(4.5, head_bits=16),
        scheme="",
        source="HQQ, Readme.md",
        basis=True,
    ),
)


def rest_range_ms(device: Device) -> tuple[float, float]:
    """(least, most) of what a token takes outside its linear layers, from what others measured on this device.

    Most: no published row can have read its weights faster than the datasheet allows. Least: the basis rows read with
    `BANDWIDTH_SHARE`; or, where bf16 and int8wo were both measured, both read with one rate, whichever is less.
    """
    rows = [row for row in PUBLISHED if row.device is device]
    most = min(row.rest_ms(1.0) for row in rows)
    least = [row.rest_ms(BANDWIDTH_SHARE) for row in rows if row.basis]
    named = {row.name: row for row in rows}
    if {"bf16", "int8wo"} <= set(named):
        least.append(rest_of_two_ms(named["bf16"], named["int8wo"]))
    return min(least), most


def rest_of_two_ms(large: Published, small: Published) -> float:
    """The rest of a token if both rows have the same, and read with one rate."""
    ms_per_gb = (large.ms - small.ms) / (large.linear_gb - small.linear_gb)
    return large.ms - large.linear_gb * ms_per_gb


def tokens_per_s(device: Device, candidate: Candidate) -> tuple[float, float]:
    """(slow, fast) of Llama-3-8B at batch 1 with every linear layer, lm_head too, under one scheme.

    Slow: `SLOW_SHARE` of bandwidth and issue slots, and the most that the rest may take; fast: `BANDWIDTH_SHARE`,
    every issue slot, and the least.
    """
    least, most = rest_range_ms(device)
    slow = model_ms(device, candidate, 1, share=SLOW_SHARE, issue=SLOW_SHARE) + most
    return 1e3 / slow, 1e3 / (model_ms(device, candidate, 1) + least)
