"""Where the time of a prefill or of a decode step goes: kernels by kind, sampling, and what is left for Python.

The profiler names every kernel, those that inductor wrote in C++ too. Their times add up to less than the pass took by
the clock; the rest is Python, guards and dispatch. Layers are told from each other by the order of the calls of one
shape, which an uncompiled pass shows together with the packed weights.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoq.model_bench.engine import DECODE
from autoq.model_bench.torch_engines import TorchEngine
from autoq_kernels import layout

Shape = tuple[int, int]  # (inputs, outputs) of a product
LINEAR, HEAD, ATTENTION, OTHERS, SAMPLING, REST = (
    "linear",
    "lm_head",
    "attention",
    "norms, rotary and other kernels",
    "sampling",
    "Python and dispatch",
)
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::linear", "aten::_weight_int8pack_mm", "mkldnn::_linear_pointwise")
_ATTENTION = ("autoq::attention", "aten::_scaled_dot_product", "aten::scaled_dot_product", "aten::bmm", "aten::baddbmm")
_MARK = "autoq: logits"
_UNTIMED = 3  # passes before the first that counts: compilation, caches


def kernel_names() -> None:
    """Let inductor's C++ kernels tell the profiler their names, in all graphs compiled from now on."""
    import torch._inductor.config as inductor

    inductor.cpp.enable_kernel_profile = True


class Call(NamedTuple):
    """One kernel's run.

    Attributes:
        name: the operator's, or that of a kernel by inductor.
        begin_ns: when.
        duration_ns: how long.
        shape: of a product, where it is known.
    """

    name: str
    begin_ns: int
    duration_ns: int
    shape: Shape | None = None


class Breakdown:
    """The parts of one engine's passes of one phase.

    Args:
        engine: whose graphs were or will be compiled with ``kernel_names``.
        tokens: the prompt [B, T].
        phase: ``prefill`` or ``decode``.
        passes: timed, and profiled again.
    """

    def __init__(self, engine: TorchEngine, tokens: Tensor, *, phase: str, passes: int) -> None:
        self.engine = engine
        self.tokens = tokens
        self.phase = phase
        self.passes = passes
        self._next = tokens[:, :1]

    def measured(self) -> dict[str, Any]:
        """The parts in milliseconds, which add up to the wall time of a pass.

        Returns:
            ``wall_ms``, the median of passes without the profiler; ``profiled_ms``, the same with it; ``parts``. Where
            the machine was slower in the profiled passes, so that the parts were more than the whole, all are scaled.
        """
        self._begin()
        for _ in range(_UNTIMED):
            self._pass()
        wall = 1000 * median(self._pass() for _ in range(self.passes))
        order = calls_in_order(self.engine, self.tokens[:, :1])
        head = head_shape(self.engine.model)
        self._begin()
        watched, runs = self._profiled()
        parts = medians([parts_ms(one, order=order, head=head) for one in runs])
        return {"wall_ms": wall, "profiled_ms": 1000 * median(watched), "parts": whole(parts, wall)}

    def _begin(self) -> None:
        if self.phase == DECODE:
            self._next = self.engine.ready(self.tokens)

    def _pass(self) -> float:
        """Seconds of one pass."""
        begin = time.perf_counter()
        with torch.profiler.record_function(_MARK):
            if self.phase == DECODE:
                self._next = self.engine.advance(self._next)
            else:
                self.engine.prefill(self.tokens)
        return time.perf_counter() - begin

    def _profiled(self) -> tuple[list[float], list[list[Call]]]:
        """Seconds, and the kernels, of each pass."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
            seconds = [self._pass() for _ in range(self.passes)]
        results: Any = profiler.profiler
        events = results.kineto_results.events()
        marks = [(one.start_ns(), one.start_ns() + one.duration_ns()) for one in events if one.name() == _MARK]
        calls = [Call(one.name(), one.start_ns(), one.duration_ns(), _shape(one)) for one in events]
        return seconds, [[one for one in calls if begin <= one.begin_ns < end] for begin, end in marks]


def medians(passes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each part, over the passes; a part that a pass lacks took no time there."""
    names = dict.fromkeys(name for one in passes for name in one)
    return {name: median(one.get(name, 0.0) for one in passes) for name in names}


def whole(parts: Mapping[str, float], wall_ms: float) -> dict[str, float]:
    """The parts and what is left for Python, which add up to the wall time.

    Args:
        parts: of the kernels, in milliseconds.
        wall_ms: of a pass.
    """
    scale = min(1.0, wall_ms / max(sum(parts.values()), 1e-9))
    found = {name: scale * value for name, value in parts.items()}
    return {**found, REST: wall_ms - sum(found.values())}


def _shape(event: Any) -> Shape | None:
    """(K, N) of a product, from the shapes and numbers it was called with."""
    shapes = [one for one in event.shapes() if one]
    name = event.name()
    if name == "autoq::linear":
        numbers = [one for one in event.concrete_inputs() if isinstance(one, int)]
        return (shapes[0][-1], numbers[-1]) if shapes and numbers else None
    first = 1 if name == "aten::addmm" else 0  # behind the bias; the result may follow
    if name in ("aten::mm", "aten::addmm") and len(shapes) > first + 1:
        return shapes[first][-1], shapes[first + 1][-1]
    if name in _PRODUCTS and len(shapes) >= 2:
        return shapes[0][-1], max(shapes[1])
    return None


def kind_of(name: str) -> str | None:
    """What a kernel counts as; None for what only contains others."""
    if "argmax" in name:
        return SAMPLING
    if name == "autoq::linear" or name.startswith((*_PRODUCTS, "aten::_weight_int4pack_mm")):
        return LINEAR
    if name.startswith(_ATTENTION) or any(part in name for part in ("softmax", "_bmm_")):
        return ATTENTION
    if "cpp_fused" in name or "cpp_Cpp" in name:
        return LINEAR if any(part in name.lower() for part in ("gemm", "_mm_", "_addmm_")) else OTHERS
    return OTHERS if name.startswith(("aten::", "autoq::", "mkldnn::")) and name != "aten::empty" else None


def parts_ms(calls: Iterable[Call], *, order: Mapping[Shape, list[str]], head: Shape | None) -> dict[str, float]:
    """Milliseconds of one pass by kind, products by scheme; a kernel that another one called is part of that one.

    Args:
        calls: of the pass.
        order: of a product's shape → the schemes of its calls in one pass, in their order.
        head: the shape of the product with the vocabulary.
    """
    found: dict[str, float] = defaultdict(float)
    seen: dict[Shape, int] = defaultdict(int)
    end = 0
    for one in sorted(calls, key=lambda call: (call.begin_ns, -call.duration_ns)):
        kind = kind_of(one.name)
        if kind is None or one.begin_ns < end:
            continue
        end = one.begin_ns + one.duration_ns
        if kind == LINEAR:
            scheme = _scheme(one.shape, order, seen)
            kind = f"{HEAD} {scheme}" if one.shape is not None and one.shape == head else f"{LINEAR} {scheme}"
        found[kind.strip()] += one.duration_ns / 1e6
    return dict(found)


def _scheme(shape: Shape | None, order: Mapping[Shape, list[str]], seen: dict[Shape, int]) -> str:
    schemes = order.get(shape, []) if shape is not None else []
    if shape is None or not schemes:
        return ""
    seen[shape] += 1
    return schemes[(seen[shape] - 1) % len(schemes)]


class _Order(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Notes the packed weights of ``autoq::linear`` in the order of the calls."""

    def __init__(self, schemes: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.found: dict[Shape, list[str]] = defaultdict(list)
        self._schemes = schemes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.autoq.linear.default:
            x, head = args[0], args[1]
            header = layout.header(head)
            text = self._schemes.get(head.data_ptr()) or _described(header)
            self.found[x.shape[-1], header.n].append(text)
        return func(*args, **(kwargs or {}))


def _described(header: layout.Header) -> str:
    kind = header.kind.name.lower().replace("_", "-")
    return (
        f"{kind}(bits={header.bits})"
        if header.group_size == 0
        else f"{kind}(bits={header.bits}, group_size={header.group_size})"
    )


def calls_in_order(engine: TorchEngine, token: Tensor) -> dict[Shape, list[str]]:
    """Of each product's shape the schemes in the order of the calls, from one uncompiled pass over a token [B, 1]."""
    import autoq_kernels.ops  # noqa: F401  (defines the operator)

    packed = [one for one in engine.model.modules() if "packed" in one._buffers]
    schemes = {one.head.data_ptr(): str(one.candidate.scheme) for one in packed}
    with _Order(schemes) as order:
        engine.model(input_ids=token[:1], use_cache=False)
    return dict(order.found)


def head_shape(model: nn.Module) -> Shape | None:
    """(inputs, vocabulary) of the head."""
    get: Any = getattr(model, "get_output_embeddings", None)
    config: Any = getattr(model, "config", None)
    return None if get is None or get() is None else (int(config.hidden_size), int(config.vocab_size))
