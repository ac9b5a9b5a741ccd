"""A second copy of a model's structure, over the same weights, whose linear layers can change scheme in place.

Everything that tries plans out (losses, end-to-end times) runs on the shadow, so the user's model stays untouched
until a plan is applied. All its linear layers are ``QuantLinear`` modules from the start, and changing the assignment
swaps their packed buffers only: one compiled graph serves every plan.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autoq import candidates
from autoq.candidates import Candidate, Packed
from autoq.linear_layers import bias_of, size_of, weight_of
from autoq.modules import QuantLinear, find_linears, replace_modules, unwrap
from autoq.scheme import NONE, Scheme

if TYPE_CHECKING:
    from collections.abc import Iterator


class PackedStore:
    """Packed weights by (layer, scheme), made when first asked for; the least recently used go first.

    Args:
        model: the unquantized model.
        layers: the layers that may be asked for.
        limit_bytes: kept at most; packing again is only time.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str], limit_bytes: int = 4 << 30) -> None:
        sites = {site.name: site.module for site in find_linears(model)}
        self.modules: dict[str, nn.Module] = {name: sites[name] for name in layers}
        self._limit = limit_bytes
        self._kept: OrderedDict[tuple[str, Scheme], Packed] = OrderedDict()
        self._size = 0

    def weight(self, layer: str) -> Tensor:
        """The layer's float weight [N, K]."""
        return weight_of(self.modules[layer]).detach()

    def get(self, layer: str, candidate: Candidate) -> Packed:
        """The layer's weight in that scheme.

        Raises:
            CandidateError: if the weight cannot be packed; the layer is named.
        """
        key = (layer, candidate.scheme)
        found = self._kept.get(key)
        if found is None:
            found = candidate.pack(self.weight(layer), layer=layer)
            self._kept[key] = found
            self._size += found.data.nbytes
            while self._size > self._limit and len(self._kept) > 1:
                self._size -= self._kept.popitem(last=False)[1].data.nbytes
        else:
            self._kept.move_to_end(key)
        return found

    @property
    def none_is_stock(self) -> bool:
        """Whether ``none`` on every layer is the unquantized model itself."""
        none = candidates.parse(NONE)
        weights = map(self.weight, self.modules)
        return all(none.leaves_alone(one.dtype, one.device.type) for one in weights)

    def taken(self, assignment: Mapping[str, Scheme]) -> dict[str, Packed]:
        """The packed weights of an assignment that are already there."""
        wanted = {layer: (layer, scheme) for layer, scheme in assignment.items()}
        return {layer: self._kept[key] for layer, key in wanted.items() if key in self._kept}


class Shadow:
    """The structure copy.

    Args:
        model: the user's model, compiled or not; never changed.
        store: where packed weights come from; its layers are the ones that can change.
    """

    def __init__(self, model: nn.Module, store: PackedStore) -> None:
        self.store = store
        self.model = share_weights(unwrap(model))
        self.model.eval()
        self._assigned: dict[str, Scheme] = {}
        self._sites: dict[str, QuantLinear] = {}
        none = candidates.parse(NONE)
        changes: dict[nn.Module, nn.Module] = {}
        for site in find_linears(self.model):
            if site.name not in store.modules:
                continue
            n, k = size_of(site.module)
            self._sites[site.name] = changes[site.module] = QuantLinear(
                none,
                store.get(site.name, none),
                bias_of(site.module),
                k,
                n,
                dtype=weight_of(site.module).dtype,
            )
            self._assigned[site.name] = NONE
        replace_modules(self.model, changes)

    @contextmanager
    def exact_products(self) -> Iterator[None]:
        """Multiply unquantized layers in float32 while losses are measured, where the device has no arithmetic of
        their dtype.

        Same numerics up to the order of summation (such products are accumulated in float32 anyway), but up to eight
        times faster. Never used for timing.
        """
        plain = {site: self.store.weight(layer) for layer, site in self._sites.items() if self._assigned[layer] == NONE}
        with multiplied_in_float({site: weight for site, weight in plain.items() if not has_arithmetic(weight)}):
            yield

    def assign(self, assignment: Mapping[str, Scheme]) -> None:
        """Give every layer its scheme; a layer that is not named has ``none``."""
        for layer, site in self._sites.items():
            scheme = assignment.get(layer, NONE)
            if scheme != self._assigned[layer]:
                candidate = candidates.parse(scheme)
                site.set_packed(self.store.get(layer, candidate), candidate)
                self._assigned[layer] = scheme


def share_weights(model: nn.Module) -> nn.Module:
    """A deep copy of a model's structure whose parameters and buffers are the original's own tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, object] = {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(model, memo)


def has_arithmetic(weight: Tensor) -> bool:
    """Whether the tensor's device multiplies its dtype in hardware."""
    if weight.device.type != "cpu" or weight.dtype == torch.float32:
        return True
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


@contextmanager
def multiplied_in_float(weights: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Let linear layers multiply in float32 inside, rounded once to the activation's dtype.

    Args:
        weights: layer → the weight [N, K] it multiplies by.
    """
    for layer, weight in weights.items():
        bias: Any = layer.bias
        layer.__dict__["forward"] = partial(float_product, weight=weight, bias=bias)
    try:
        yield
    finally:
        for layer in weights:
            del layer.__dict__["forward"]


def float_product(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` in float32, rounded once to x's dtype."""
    bias = None if bias is None else bias.detach().float()
    return torch.nn.functional.linear(x.float(), weight.detach().float(), bias).to(x.dtype)
