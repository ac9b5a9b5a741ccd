"""Runs in the side environment: builds torchao's and onnxruntime's linear layers and times them on request.

Reads one JSON request a line, writes one JSON answer a line; ends with its input. Imports nothing of autoq.

Legend: N output features, K input features, M rows of the activation.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np
import torch

# A reading of 128 MiB lies between two calls of an engine, so few copies are cold already; a session is not small.
_MAX_COPIES = 16
_COMPILED = 8  # layers in one compiled function
_TOLERANCE = {8: 0.03, 4: 0.25}  # against the float weight: the scheme's own error is in it


class Setting(NamedTuple):
    """A cell: what to multiply, and the cache its weights must not fit into twice."""

    n: int
    k: int
    m: int
    dtype: str
    threads: int
    cache_bytes: int

    def copies(self, weight_bytes: int) -> int:
        """Copies of a weight to rotate through."""
        return min(_MAX_COPIES, 2 * self.cache_bytes // weight_bytes + 1)


class Engine(NamedTuple):
    """A product with each copy of its weight.

    Attributes:
        calls: what is called in turn.
        result: of the first product, float32 [M, N].
        weight_bytes: codes and scales of one weight.
        products: in each call.
    """

    calls: list[Callable[[], object]]
    result: torch.Tensor
    weight_bytes: int
    products: int = 1


class Offer(NamedTuple):
    """What can be built: names as in the benchmark's rows."""

    engine: str
    scheme: str
    bits: int
    int8: bool
    build: Callable[[Setting, torch.Tensor, torch.Tensor], Engine]


def offers() -> Iterator[Offer]:
    """Everything this process can measure."""
    for size in (32, 64, 128):
        for level, scheme in ((0, "int4wo"), (4, "int4dq")):
            yield Offer(
                f"onnxruntime.MatMulNBits(accuracy_level={level})",
                f"{scheme}(group_size={size})",
                4,
                level == 4,
                lambda cell, x, w, size=size, level=level: _matmul_nbits(cell, x, w, size, level),
            )
    yield Offer("torchao.Int8WeightOnly(compiled)", "int8wo", 8, False, _torchao_int8)
    yield Offer("torchao.Int8DynamicActivation(compiled)", "int8dq", 8, True, _torchao_int8_dynamic)
    yield Offer("torchao.Int4Opaque", "int4wo(group_size=64)", 4, False, _torchao_int4)
    yield Offer("torchao.da8w4", "int4dq(group_size=64)", 4, True, _torchao_da8w4)
    yield Offer("torchao.8da4w(compiled)", "int4dq(group_size=64)", 4, True, _torchao_intx)


def _matmul_nbits(cell: Setting, x: torch.Tensor, w: torch.Tensor, size: int, level: int) -> Engine:
    """4 bits around 8, one scale a group; onnxruntime has it for float32 and float16 activations."""
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime import InferenceSession, OrtValue, SessionOptions

    half = cell.dtype == "float16"
    kind, dtype = (TensorProto.FLOAT16, np.float16) if half else (TensorProto.FLOAT, np.float32)
    if cell.k % size:
        raise ValueError(f"K={cell.k} is no multiple of {size}")
    groups = w.float().unflatten(1, (-1, size))
    scale = groups.abs().amax(2) / 7.5
    codes = (groups / scale[..., None]).round().clamp(-8, 7).to(torch.int8).add(8).to(torch.uint8).numpy()
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    scales = scale.numpy().astype(dtype).reshape(-1)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
        K=cell.k, N=cell.n, bits=4, block_size=size, accuracy_level=level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", kind, [cell.m, cell.k])],
        [helper.make_tensor_value_info("y", kind, [cell.m, cell.n])],
        [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(scales, "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = SessionOptions()
    options.intra_op_num_threads = cell.threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle sessions leave the cores alone
    inputs = OrtValue.ortvalue_from_numpy(x.float().numpy().astype(dtype))
    output = OrtValue.ortvalue_from_numpy(np.zeros((cell.m, cell.n), dtype))
    calls = []
    weight_bytes = packed.nbytes + scales.nbytes
    for _ in range(cell.copies(weight_bytes)):
        session = InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", inputs)
        binding.bind_ortvalue_output("y", output)
        calls.append(lambda session=session, binding=binding: session.run_with_iobinding(binding))
    calls[0]()
    return Engine(calls, torch.from_numpy(output.numpy().astype(np.float32)), weight_bytes)


def _quantized(cell: Setting, x: torch.Tensor, w: torch.Tensor, config: object, weight_bytes: int) -> Engine:
    """Layers under torchao's configuration, compiled together as in a model: the guards of one call are shared."""
    from torchao.quantization import quantize_

    weights = []
    for _ in range(min(_COMPILED, cell.copies(weight_bytes))):
        layer = torch.nn.Linear(cell.k, cell.n, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(w.clone(), requires_grad=False)
        quantize_(layer, config)
        weights.append(layer.weight)
    torch._dynamo.reset()
    inputs = [x.clone() for _ in weights]  # one for each, or its quantization would be shared

    def layers(inputs: list[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.nn.functional.linear(x, w) for x, w in zip(inputs, weights, strict=True)]

    compiled = torch.compile(layers, dynamic=False, fullgraph=True)
    calls = [lambda: compiled(inputs, weights)]
    return Engine(calls, calls[0]()[0].float(), weight_bytes, products=len(weights))


def _torchao_int8(cell: Setting, x: torch.Tensor, w: torch.Tensor) -> Engine:
    from torchao.quantization import Int8WeightOnlyConfig

    return _quantized(cell, x, w, Int8WeightOnlyConfig(), cell.n * (cell.k + x.element_size()))


def _torchao_int8_dynamic(cell: Setting, x: torch.Tensor, w: torch.Tensor) -> Engine:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _quantized(cell, x, w, Int8DynamicActivationInt8WeightConfig(), cell.n * (cell.k + x.element_size()))


def _torchao_intx(cell: Setting, x: torch.Tensor, w: torch.Tensor) -> Engine:
    """torchao's portable 8da4w keeps a byte per code."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig
    from torchao.quantization.granularity import PerGroup

    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(64))
    return _quantized(cell, x, w, config, cell.n * (cell.k + cell.k // 64 * (x.element_size() + 1)))


def _opaque(cell: Setting, x: torch.Tensor, make: Callable[[], Any]) -> Engine:
    weight_bytes = cell.n * (cell.k // 2 + cell.k // 64 * 4)
    weights = [make() for _ in range(cell.copies(weight_bytes))]
    calls = [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
    return Engine(calls, calls[0]().float(), weight_bytes)


def _torchao_int4(cell: Setting, x: torch.Tensor, w: torch.Tensor) -> Engine:
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    return _opaque(cell, x, lambda: Int4OpaqueTensor.from_hp(w, [1, 64]))


def _torchao_da8w4(cell: Setting, x: torch.Tensor, w: torch.Tensor) -> Engine:
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    return _opaque(cell, x, lambda: Int4OpaqueTensor.from_hp_da8w4(w, 64))


class Session:
    """The engines of the present cell."""

    def __init__(self) -> None:
        self._engines: list[Engine | None] = []
        self._next = 0

    def answer(self, request: dict[str, Any]) -> Any:
        """The answer to one request."""
        match request.pop("do"):
            case "describe":
                return {name: _version(name) for name in ("onnxruntime", "torchao", "torch")}
            case "prepare":
                return self._prepare(Setting(**request))
            case "time":
                return self._time(request["number"], request["calls"])
        raise ValueError(f"no such request: {request}")

    def _prepare(self, cell: Setting) -> list[dict[str, Any]]:
        self._engines = []
        torch.set_num_threads(cell.threads)
        generator = torch.Generator().manual_seed(cell.n)
        dtype = getattr(torch, cell.dtype)
        rows = next(rows for rows in range(min(cell.n, 512), 0, -1) if cell.n % rows == 0)
        part = torch.randn(rows, cell.k, generator=generator).mul_(0.02).to(dtype)
        w = part.repeat(cell.n // rows, 1)
        x = torch.randn(cell.m, cell.k, generator=generator).to(dtype)
        expected = x[:32].double() @ part.double().T
        return [self._offered(offer, cell, x, w, expected) for offer in offers()]

    def _offered(
        self, offer: Offer, cell: Setting, x: torch.Tensor, w: torch.Tensor, expected: torch.Tensor
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "scheme": offer.scheme,
            "engine": offer.engine,
            "bits": offer.bits,
            "rate": "u8s8" if offer.int8 else "",
            "reason": "float32 activations" if "MatMulNBits" in offer.engine and cell.dtype == "bfloat16" else "",
        }
        self._engines.append(None)
        try:
            engine = offer.build(cell, x, w)
        except ImportError as problem:
            return row | {"status": "absent", "reason": str(problem).partition("\n")[0]}
        except Exception as problem:  # whatever a library does, it is its row that says so
            reason = f"{type(problem).__name__}: {problem}".partition("\n")[0].partition(". ")[0]
            return row | {"status": "unsupported", "reason": reason}
        got = engine.result[:32].view(len(expected), -1, expected.shape[1]).double()
        error = float((got - expected.unsqueeze(1)).norm() / expected.unsqueeze(1).expand_as(got).norm())
        row["weight_bytes"] = engine.weight_bytes
        if not error <= _TOLERANCE[offer.bits]:
            return row | {"status": "wrong", "reason": f"relative RMS {error:.2e} against the float weight"}
        self._engines[-1] = engine
        return row | {"status": "ok", "copies": len(engine.calls)}

    def _time(self, number: int, calls: int) -> float:
        """Microseconds per call, after one that is not timed: this process has been waiting."""
        engine = self._engines[number]
        if engine is None:
            raise ValueError(f"engine {number} has nothing to time")
        count = len(engine.calls)
        batch = [engine.calls[(self._next + one) % count] for one in range(calls + 1)]
        self._next = (self._next + calls + 1) % count
        if calls > 1:
            batch[0]()
        begin = time.perf_counter_ns()
        for call in batch[1:]:
            call()
        return (time.perf_counter_ns() - begin) / 1000 / calls / engine.products


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # what libraries print must not be taken for an answer
    os.dup2(2, 1)
    session = Session()
    with torch.no_grad():
        for line in sys.stdin:
            answers.write(json.dumps(session.answer(json.loads(line))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
