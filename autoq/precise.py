"""A copy of a model that computes in float32 whatever its dtype, with one of its layers quantized.

Rounding every activation to bfloat16 changes a model's predictions as much as quantizing a few layers does: two runs
that differ anywhere differ by that everywhere after. What one layer costs is seen beside it only where nothing else
is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoq import candidates
from autoq.candidates import Candidate, Packed
from autoq.errors import ModelError
from autoq.linear_layers import bias_of, weight_of
from autoq.modules import find_linears, unwrap
from autoq.scheme import Scheme
from autoq.shadow import PackedStore, float_product, share_weights

_LOW = (torch.bfloat16, torch.float16)
_MOST_CONVERTED = 0.1  # of the model's bytes


class Precise:
    """The copy: linear layers' and embeddings' weights are the model's own; other low-precision ones are converted.

    Args:
        model: the user's model, compiled or not; never changed.
        store: packed weights; its layers are the ones that can be quantized.

    Raises:
        ModelError: if more than a tenth of the model would have to be converted, and held twice.

    Attributes:
        model: the copy, in evaluation mode, with all layers unquantized.
    """

    def __init__(self, model: nn.Module, store: PackedStore) -> None:
        self.store = store
        self.model = share_weights(unwrap(model)).eval()
        linears = {site.name: site.module for site in find_linears(self.model) if site.reason is None}
        self._sites = {name: linear for name, linear in linears.items() if name in store.modules}
        kept = [*linears.values(), *(one for one in self.model.modules() if isinstance(one, nn.Embedding))]
        weights = {id(one.weight) for one in kept}
        _check_size(self.model, weights)
        changed: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype in _LOW and id(parameter) not in weights:
                    made = changed.setdefault(id(parameter), nn.Parameter(parameter.detach().float(), False))
                    module._parameters[name] = made
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.dtype in _LOW:
                    module._buffers[name] = buffer.float()
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(_to_float)
        self.model.register_forward_pre_hook(_inputs_to_float, with_kwargs=True)
        for linear in linears.values():
            linear.__dict__["forward"] = partial(float_product, weight=weight_of(linear), bias=bias_of(linear))

    @contextmanager
    def quantized(self, layer: str, scheme: Scheme) -> Iterator[None]:
        """Give one layer a scheme for a while."""
        site, candidate = self._sites[layer], candidates.parse(scheme)
        packed = self.store.get(layer, candidate)
        before = site.__dict__["forward"]
        site.__dict__["forward"] = partial(_quantized, candidate=candidate, packed=packed, bias=bias_of(site))
        try:
            yield
        finally:
            site.__dict__["forward"] = before


def _check_size(model: nn.Module, kept: set[int]) -> None:
    sizes = {id(one): one.nbytes for one in model.parameters()}
    converted = sum(one.nbytes for one in model.parameters() if id(one) not in kept and one.dtype in _LOW)
    if converted > _MOST_CONVERTED * sum(sizes.values()):
        raise ModelError(
            "nearly all of a model's low-precision weights are in linear layers and embeddings",
            got=f"{converted / 1e6:.0f} MB elsewhere, which a copy in float32 would hold twice over",
        )


def _quantized(x: Tensor, *, candidate: Candidate, packed: Packed, bias: Tensor | None) -> Tensor:
    return candidate.linear(x, packed, bias)


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _LOW else value


def _to_float(_module: nn.Module, _args: Any, output: Any) -> Any:
    return _float(output)


def _inputs_to_float(_module: nn.Module, args: Any, kwargs: Any) -> Any:
    return tuple(map(_float, args)), {name: _float(value) for name, value in kwargs.items()}
