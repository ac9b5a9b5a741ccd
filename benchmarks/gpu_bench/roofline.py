"""The least time of a product on a GPU that need not be there: bytes over bandwidth, operations over a rate.

Legend: N output features, K input features, M rows of the activation; ms and µs; GB are 10⁹ bytes.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from autoq import candidates
from autoq.candidates import Candidate

BANDWIDTH_SHARE = 0.85  # of the datasheet's bandwidth that a good kernel reads with
TENSOR_SHARE = 0.6  # of the datasheet's matrix rate that a good kernel reaches with float32 or int32 sums
SLOW_SHARE = 0.6  # of bandwidth and of issue slots, for the slow end of a prediction
LANES = 128  # instructions of single threads that a multiprocessor can issue in a clock: four warps
INTEGER_LANES = 64  # of these, those that are integer, logic or comparisons
COUNTS = Path(__file__).with_name("instructions.json")  # by `roofline_counts.write`

SCHEMES = (
    "none",
    "int8wo",
    "int8dq",
    "fp6(format=e3m2)",
    "int4wo-hqq(group_size=64)",
    "int4wo-hqq(group_size=128)",
    "sinq(bits=4,group_size=64)",
    "int4dq(group_size=64,method=hqq)",
)


class Instructions(NamedTuple):
    """What a GEMV executes for a weight at one row of x.

    Attributes:
        issued: all.
        integer: those that only `INTEGER_LANES` lanes execute in a clock.
    """

    issued: float
    integer: float

    @property
    def clocks(self) -> float:
        """Of a multiprocessor, per weight."""
        return max(self.issued / LANES, self.integer / INTEGER_LANES)


class Layer(NamedTuple):
    """A weight [n, k] that occurs ``count`` times in a model."""

    name: str
    n: int
    k: int
    count: int


LLAMA_3_8B = (
    Layer("qkv", 6144, 4096, 32),
    Layer("o", 4096, 4096, 32),
    Layer("gate_up", 28672, 4096, 32),
    Layer("down", 4096, 14336, 32),
    Layer("lm_head", 128256, 4096, 1),
)


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU as its vendor describes it; matrix rates are dense, that is, without sparsity.

    Attributes:
        name: for tables.
        driver_name: what the driver calls it, without the maker's and the series' name.
        bandwidth_gb_s: of its memory.
        float_tflops: bfloat16 or float16 in, float32 sums.
        int8_tops: int8 in, int32 sums.
        multiprocessors: how many.
        clock_ghz: boost, without matrix instructions.
        architecture: as in `proof_targets`.
        source: where the numbers are from.
    """

    name: str
    driver_name: str
    bandwidth_gb_s: float
    float_tflops: float
    int8_tops: float
    multiprocessors: int
    clock_ghz: float
    architecture: str
    source: str


A100 = Device(
    name="A100 80GB SXM",
    driver_name="A100-SXM4-80GB",
    bandwidth_gb_s=2039,
    float_tflops=312,
    int8_tops=624,
    multiprocessors=108,
    clock_ghz=1.41,
    architecture="sm_80",
    source="NVIDIA A100 datasheet (80GB SXM); Ampere architecture whitepaper",
)
H100 = Device(
    name="H100 80GB SXM",
    driver_name="H100 80GB HBM3",
    bandwidth_gb_s=3352,
    float_tflops=989,
    int8_tops=1979,
    multiprocessors=132,
    clock_ghz=1.98,
    architecture="sm_90",
    source="NVIDIA H100 datasheet (SXM; half of its numbers with sparsity); Hopper architecture whitepaper",
)
RTX_4090 = Device(
    name="RTX 4090",
    driver_name="RTX 4090",
    bandwidth_gb_s=1008,
    float_tflops=165,
    int8_tops=660,
    multiprocessors=128,
    clock_ghz=2.52,
    architecture="sm_89",
    source="NVIDIA Ada architecture whitepaper, appendix A (float16 with float32 accumulation)",
)
DEVICES = (A100, H100, RTX_4090)


def device_named(name: str) -> Device | None:
    """The device a driver calls by this name; None if it is none of `DEVICES`."""
    short = name.removeprefix("NVIDIA ").removeprefix("GeForce ")
    return next((one for one in DEVICES if one.driver_name == short), None)


class Work(NamedTuple):
    """What a product must do at least.

    Attributes:
        weight_bytes: codes, scales and factors.
        activation_bytes: x read and y written once; where x is rounded to int8, its codes written and read as well.
        operations: multiplications and additions.
        int8: whether they are of whole numbers.
        weights: N·K.
    """

    weight_bytes: int
    activation_bytes: int
    operations: int
    int8: bool
    weights: int


def work(candidate: Candidate, n: int, k: int, m: int) -> Work:
    """The work of ``[m, k] @ [n, k].T`` with activations of 16 bits."""
    int8 = candidate.at_rows(m).activation_bits == 8
    return Work(
        weight_bytes=candidate.weight_bytes_for(n, k),
        activation_bytes=2 * m * (k + n) + (2 * m * k if int8 else 0),
        operations=2 * m * n * k,
        int8=int8,
        weights=n * k,
    )


class Times(NamedTuple):
    """Microseconds that a product's parts take at least, were there no other.

    Attributes:
        read: its bytes through the memory.
        multiply: its operations in the matrix units.
        issue: the instructions of a GEMV; 0 above one row, and for what is not ours.
    """

    read: float
    multiply: float
    issue: float

    @property
    def total(self) -> float:
        """The longest; at one row no matrix unit is used."""
        return max(self.read, self.issue or self.multiply)


@functools.cache
def _counted() -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = json.loads(COUNTS.read_text())["issued and integer, per weight"]
    return found


def instructions_of(device: Device, candidate: Candidate) -> Instructions:
    """What was counted for a quantized scheme at one row, or else for another with its key."""
    known, wanted = _counted()[device.architecture], candidate.at_rows(1)
    alike = (found for name, found in known.items() if name.startswith(f"{wanted.key}("))
    return Instructions(*(known.get(str(wanted)) or next(alike)))


def times(
    device: Device,
    candidate: Candidate,
    layer: tuple[int, int],
    m: int,
    *,
    share: float = BANDWIDTH_SHARE,
    issue_share: float = 1.0,
    instructions: Instructions | None = None,
) -> Times:
    """The bounds of one product.

    Args:
        device: where.
        candidate: the scheme.
        layer: (N, K).
        m: rows of x.
        share: of the bandwidth.
        issue_share: of the issue slots.
        instructions: at M = 1; None: `instructions_of` the scheme.
    """
    todo = work(candidate, *layer, m)
    rate = 1e6 * (device.int8_tops if todo.int8 else device.float_tflops) * TENSOR_SHARE  # operations a µs
    issue = 0.0
    if m == 1 and candidate.key != "none":
        clocks = (instructions or instructions_of(device, candidate)).clocks * todo.weights / device.multiprocessors
        issue = clocks / (device.clock_ghz * 1e3 * issue_share)
    return Times(
        read=(todo.weight_bytes + todo.activation_bytes) / (device.bandwidth_gb_s * 1e3 * share),
        multiply=todo.operations / rate,
        issue=issue,
    )


def model_ms(
    device: Device, candidate: Candidate, m: int, *, share: float = BANDWIDTH_SHARE, issue: float = 1.0
) -> float:
    """Milliseconds of all linear layers of Llama-3-8B, one after the other; arguments as of `times`."""
    return sum(
        layer.count * times(device, candidate, (layer.n, layer.k), m, share=share, issue_share=issue).total / 1e3
        for layer in LLAMA_3_8B
    )


def predicted_us(name: str, scheme: str, shape: tuple[int, int], m: int, dtype: torch.dtype) -> float | None:
    """Microseconds predicted for one product on the device a driver calls ``name``; None if that is not known."""
    device = device_named(name)
    if device is None or dtype.itemsize != 2:
        return None
    return times(device, candidates.parse(scheme), shape, m).total
