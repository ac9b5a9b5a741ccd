"""Siblings in one packed weight: the first one called with an activation computes the product of all.

Shapes: N outputs of all siblings together, K inputs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoq.candidates import Packed
from autoq.dequantized import guarded
from autoq.errors import ModelError
from autoq.quant_linear import PackedModule, QuantLinear
from autoq.sections import HEADER, SCHEME
from autoq.stacking import row_sections, rows, stacked
from autoq_kernels import layout

_KEPT = "_autoq_product"  # the attribute of an activation that holds what its siblings are still to take
_UNFUSE = "Call autoq.unfuse(model) first."


class FusedWeight(PackedModule):
    """The packed weight [N, K] of several layers.

    Args:
        layers: of one form, see ``autoq.stacking.why_not_stacked``.

    Attributes:
        out_features: N.
        starts: the first row of each layer.
        changes: how often rows were replaced.
    """

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        super().__init__()
        self.candidate = layers[0].candidate
        self.dtype = layers[0].dtype
        *starts, self.out_features = accumulate((layer.out_features for layer in layers), initial=0)
        self.starts = frozenset(starts)
        self.changes = 0
        # In a tuple: layers own the weight, not the other way round. Only where there are biases to put together.
        self._biased: tuple[FusedPart, ...] = ()
        self._set_buffer(stacked([layer.packed for layer in layers]))

    def product(self, x: Tensor) -> Tensor:
        """The outputs of all layers [..., N] for an activation [..., K]."""
        bias = torch.cat([part.bias for part in self._biased if part.bias is not None]) if self._biased else None
        result: Tensor = torch.ops.autoq.linear(x, self.head, bias, self.out_features)
        return result

    def state(self, x: Tensor) -> tuple[Any, ...]:
        """All but the values of x that a product depends on or that says who may use it; not for graphs."""
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        biases = tuple(part.bias._version for part in self._biased if part.bias is not None)
        return threading.get_ident(), torch.is_inference_mode_enabled(), stream, self.changes, biases


class _Kept(NamedTuple):
    """A product that siblings are still to take their part of.

    Attributes:
        fused: the weight.
        y: the product, with all siblings' outputs.
        left: first rows of the siblings that have not had theirs.
        modes: of autograd and autocast when it was computed.
        seen: the activation's version or, where it has none, values, and ``FusedWeight.state``; None in a graph.
    """

    fused: FusedWeight
    y: Tensor
    left: frozenset[int]
    modes: tuple[Any, ...]
    seen: tuple[Any, ...] | None


class FusedPart(QuantLinear):
    """One of several layers that share a ``FusedWeight``.

    Called with an activation (the very same tensor object, unchanged), the first of them computes the product of all
    and the others take their part of it, a view; each takes it once, and after the last one nothing is kept. The
    product waits at the activation itself, so that it goes with it and threads cannot meet.

    Args:
        layer: the layer as it was.
        fused: the weight, this layer's included.
        start: the layer's first row in it.
        owner: whether this is the one of the siblings that holds the weight as a submodule.
    """

    def __init__(self, layer: QuantLinear, fused: FusedWeight, start: int, *, owner: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.candidate, self.dtype = layer.candidate, layer.dtype
        self.plan_json, self.under_adapter = layer.plan_json, layer.under_adapter
        self._original = (layer.original,)
        self.start = start
        self._shared = (fused,)
        if owner:
            self.fused = fused
        self.register_parameter("bias", layer.bias)
        if layer.bias is not None:
            fused._biased += (self,)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [..., N] for an activation [..., K], in the activation's dtype; a view."""
        fused = self._shared[0]
        modes, kept = _modes(x), getattr(x, _KEPT, None)
        if kept is not None and kept.fused is fused and self.start in kept.left and _is_valid(kept, x, modes):
            y, left, seen = kept.y, kept.left - {self.start}, kept.seen
        else:
            y, left = fused.product(x), fused.starts - {self.start}
            seen = None if torch.compiler.is_compiling() else _seen(fused, x)
        if left and _may_keep(x):
            x._autoq_product = _Kept(fused, y, left, modes, seen)  # type: ignore[attr-defined]
        elif kept is not None:
            x._autoq_product = None  # type: ignore[attr-defined]
        part: Tensor = y.narrow(-1, self.start, self.out_features)
        return part

    @property
    def packed(self) -> Tensor:  # type: ignore[override]
        """A copy of the layer's own packed weight, made at each access."""
        return rows(self._shared[0].packed, self.start, self.start + self.out_features)

    @property
    def head(self) -> Tensor:  # type: ignore[override]
        """The first bytes of such a copy."""
        return self.packed[: layout.HEADER_BYTES]

    @property
    def weight(self) -> Tensor:
        """As ``QuantLinear.weight``."""
        fused = self._shared[0]
        whole: Tensor = torch.ops.autoq.dequantize(fused.head, fused.out_features, self.in_features)
        weight = whole.narrow(0, self.start, self.out_features).to(self.dtype)
        return guarded(weight) if self.under_adapter else weight

    def unfused(self) -> QuantLinear:
        """The layer by itself, bit-equal to what it was before it was fused."""
        layer = QuantLinear(
            self.candidate,
            Packed(self.packed),
            self.bias,
            self.in_features,
            self.out_features,
            dtype=self.dtype,
            original=self.original,
        )
        layer.plan_json, layer.under_adapter = self.plan_json, self.under_adapter
        return layer

    def set_packed(self, packed: Packed, candidate: Any) -> None:
        """Replace the layer's rows of the shared weight by those of another weight of the same form.

        Raises:
            ModelError: if the weight has another scheme or form.
        """
        fused = self._shared[0]
        end = self.start + self.out_features
        mine = row_sections(fused.packed, self.start, end)
        same = candidate.scheme == self.candidate.scheme and torch.equal(
            mine.pop(HEADER).cpu(), packed.data[: layout.HEADER_BYTES].cpu()
        )
        if not same or "weight_column_scale" in mine:
            raise ModelError(
                f"a fused layer keeps its scheme and shape: {self.scheme}, [{self.out_features}, {self.in_features}]",
                got=f"{candidate.scheme}, {list(packed.shape)}",
                fix=_UNFUSE,
            )
        with torch.no_grad():
            for name, one in layout.sections(packed.data).items():
                mine[f"weight_{name}"].copy_(one)
        fused.changes += 1

    def sections(self) -> dict[str, Tensor]:
        """As ``QuantLinear.sections``, of this layer's rows."""
        found = row_sections(self._shared[0].packed, self.start, self.start + self.out_features)
        return {HEADER: found.pop(HEADER), SCHEME: self._scheme_bytes()} | found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedPart:
        device = self._shared[0].packed.device
        nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return self

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = nn.Module.__getstate__(self)  # type: ignore[no-untyped-call]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)  # type: ignore[no-untyped-call]


def fused_layers(layers: dict[str, QuantLinear]) -> dict[str, FusedPart]:
    """Those of some layers that share their weight with others."""
    return {name: layer for name, layer in layers.items() if isinstance(layer, FusedPart)}


def _modes(x: Tensor) -> tuple[Any, ...]:
    """What besides x decides how a product is computed; constants where a graph is traced."""
    device = x.device.type
    autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    return torch.is_grad_enabled(), autocast and torch.get_autocast_dtype(device)


def _seen(fused: FusedWeight, x: Tensor) -> tuple[Any, ...]:
    """What must still be so for a product of x to be valid; a tensor made in inference mode has no version."""
    if not x.is_inference():
        return x._version, fused.state(x)
    return (x.clone() if x.device.type == "cpu" else None), fused.state(x)


def _is_valid(kept: _Kept, x: Tensor, modes: tuple[Any, ...]) -> bool:
    if kept.modes != modes:
        return False
    if torch.compiler.is_compiling() or kept.seen is None:
        return torch.compiler.is_compiling() and kept.seen is None
    before, state = kept.seen
    if state != kept.fused.state(x):
        return False
    return torch.equal(before, x) if isinstance(before, Tensor) else before is not None and before == x._version


def _may_keep(x: Tensor) -> bool:
    """Not at a leaf of autograd: the product leads back to it, which would keep both for ever."""
    return torch.compiler.is_compiling() or not (x.is_leaf and x.requires_grad)
