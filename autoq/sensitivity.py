"""What each scheme on each layer costs in loss, from one pass of gradients.

For a layer output changed by Δy at every token, the loss of a sample rises by about ½·T·Σ_t (g_t·Δy_t)², where g_t is
the gradient of the sample's loss (or of the metric's probe) with respect to the output at token t, and T the number of
predictions that loss averages over: the second-order Taylor term with the Fisher information in the Hessian's place
(NVIDIA ModelOpt's AutoQuantize and Intel AutoRound's AutoScheme use relatives of it). The score over-predicts by a
factor that depends on the scheme, so the search fits that factor from real evaluations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoq.candidates import Candidate
from autoq.errors import InputError
from autoq.linear_layers import bias_of, weight_of
from autoq.losses import Batch, Metric, Probe
from autoq.numerics import relative_rms
from autoq.shadow import PackedStore, float_product

Progress = Callable[[str, int, int], None]
_Sink = Callable[[str, Tensor, Tensor], None]
_CHUNK_ROWS = 512


class _Probed(torch.autograd.Function):
    """A linear layer in float32 whose backward pass hands over (input, output gradient); weights get no gradient."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes them so)
        ctx: Any, x: Tensor, anchor: Tensor, module: nn.Module, name: str, sink: _Sink
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.site = (module, name, sink)
        return float_product(x, weight=weight_of(module), bias=bias_of(module))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        module, name, sink = ctx.site
        gradient = gradients[0].float()
        sink(name, x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))
        back = gradient @ weight_of(module).detach().float()
        return back.to(x.dtype), None, None, None, None


def _probed(x: Tensor, *, anchor: Tensor, module: nn.Module, name: str, sink: _Sink) -> Tensor:
    result: Tensor = _Probed.apply(x, anchor, module, name, sink)  # type: ignore[no-untyped-call]  # torch leaves it so
    return result


@contextmanager
def _probing(modules: Mapping[str, nn.Module], sink: _Sink) -> Iterator[None]:
    """Route the layers' forward passes through ``_Probed``; the original ones come back whatever happens."""
    anchor = torch.zeros((), requires_grad=True)
    try:
        for name, linear in modules.items():
            linear.__dict__["forward"] = partial(_probed, anchor=anchor, module=linear, name=name, sink=sink)
        yield
    finally:
        for linear in modules.values():
            linear.__dict__.pop("forward", None)


class _Scores:
    """Sums over the batches, per (layer, scheme)."""

    def __init__(self, store: PackedStore, candidates: Sequence[Candidate]) -> None:
        self.store = store
        self.candidates = [one for one in candidates if one.key != "none"]
        self.second: dict[tuple[str, str], float] = {}
        self.first: dict[tuple[str, str], float] = {}
        self.output: dict[tuple[str, str], list[float]] = {}
        self.samples = 0
        self.weights: dict[tuple[str, str], float] = {}
        self.factor = 0.5  # of the batch being differentiated, see losses.Probe

    def add(self, layer: str, x_MK: Tensor, gradient_MN: Tensor) -> None:
        """Score every scheme on one layer's activations and output gradients."""
        weight = self.store.weight(layer).float()
        for start in range(0, x_MK.shape[0], _CHUNK_ROWS):
            x = x_MK[start : start + _CHUNK_ROWS].float()
            gradient = gradient_MN[start : start + _CHUNK_ROWS]
            exact = x @ weight.t()
            power = float(exact.square().sum())
            for candidate in self.candidates:
                key = (layer, str(candidate.scheme))
                packed = self.store.get(layer, candidate)
                if key not in self.weights:
                    stored = torch.ops.autoq.dequantize(packed.head, *weight.shape)
                    self.weights[key] = relative_rms(stored, weight)
                change = candidate.linear(x, packed).sub_(exact)
                product = torch.linalg.vecdot(gradient, change).double()
                self.second[key] = self.second.get(key, 0.0) + self.factor * float(product.square().sum())
                self.first[key] = self.first.get(key, 0.0) + float(product.sum())
                sums = self.output.setdefault(key, [0.0, 0.0])
                sums[0] += float(change.square().sum())
                sums[1] += power

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the sensitivity table."""
        count = max(1, self.samples)
        return [
            {
                "layer": layer,
                "scheme": scheme,
                "score": self.second[layer, scheme] / count,
                "first_order": self.first[layer, scheme] / count,
                "weight_error": self.weights[layer, scheme],
                "output_error": (changed / total) ** 0.5 if total > 0 else 0.0,
            }
            for (layer, scheme), (changed, total) in self.output.items()
        ]


def scores(
    model: nn.Module,
    batches: Sequence[Batch],
    metric: Metric,
    store: PackedStore,
    candidates: Sequence[Candidate],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Rows of the sensitivity table for every (layer, scheme) of the store's layers.

    The model runs once forward and once backward per batch, in evaluation mode; its parameters get no gradients.

    Args:
        model: the unquantized model, not compiled.
        batches: what it is differentiated on.
        metric: its probe is what is differentiated.
        store: the layers and their packed weights.
        candidates: the schemes to score (``none`` is skipped); no mixes, as activations come in chunks of any rows.
        seed: of the probe's random draws.
        progress: called with (layer, done, total) after each layer of each batch.

    Raises:
        InputError: if the loss cannot be differentiated, or is NaN.
    """
    found = _Scores(store, candidates)
    steps = itertools.count(1)

    def sink(layer: str, x_MK: Tensor, gradient_MN: Tensor) -> None:
        found.add(layer, x_MK, gradient_MN)
        if progress is not None:
            progress(layer, next(steps), len(batches) * len(store.modules))

    generator = torch.Generator().manual_seed(seed)
    training = [module for module in model.modules() if module.training]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with _probing(store.modules, sink), torch.inference_mode(False), torch.enable_grad():
            for index, batch in enumerate(batches):
                outputs = batch.call(model)
                with torch.no_grad():
                    samples = metric.losses(outputs, index, batch).numel()
                _differentiate(metric.probe(outputs, index, batch, generator), found, samples)
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
    return found.rows()


def _differentiate(probe: Probe, found: _Scores, samples: int) -> None:
    if not torch.isfinite(probe.value):
        raise InputError("the loss must be a number", where="sensitivity", got=float(probe.value.detach()))
    if not probe.value.requires_grad:
        raise InputError(
            "the loss depends differentiably on the linear layers' outputs",
            where="sensitivity",
            fix="Return a loss computed from the outputs with PyTorch operations, or pass eval_fn= instead.",
        )
    found.factor = probe.factor
    found.samples += samples
    probe.value.backward()  # type: ignore[no-untyped-call]  # torch annotates it only in part
