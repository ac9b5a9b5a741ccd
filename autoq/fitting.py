"""How a plan fits a model on its device, before anything is packed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from autoq import candidates
from autoq.apply_report import SkippedLayer
from autoq.candidates import Candidate, LinearOp
from autoq.device_check import without_kernels
from autoq.errors import PlanError
from autoq.linear_layers import bias_of, size_of, weight_of
from autoq.modules import QuantLinear, find_linears, quantized_layers
from autoq.plan import Plan
from autoq.scheme import NONE, Scheme

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer of the model as a plan sees it, a float linear layer or replaced already."""

    name: str
    module: nn.Module
    reason: str | None
    names: tuple[str, ...]

    @property
    def original(self) -> nn.Module | None:
        """The float layer, if it is there."""
        return self.module.original if isinstance(self.module, QuantLinear) else self.module

    @property
    def size(self) -> tuple[int, int]:
        """Outputs N and inputs K."""
        module = self.module
        return (module.out_features, module.in_features) if isinstance(module, QuantLinear) else size_of(module)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.module.dtype if isinstance(self.module, QuantLinear) else weight_of(self.module).dtype

    @property
    def device(self) -> str:
        """The device type."""
        module = self.module
        return module.head.device.type if isinstance(module, QuantLinear) else weight_of(module).device.type


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What of a plan a model can have.

    Attributes:
        wanted: layer → the plan's scheme, under the model's names.
        chosen: the layers that get a scheme, with its candidate.
        skipped: layers the plan quantizes that cannot have their scheme, with the reason.
        unmatched: layers the plan names and the model lacks.
        missing: linear layers of the model the plan does not name.
        slow: schemes that have no kernel on the layers' device, in sentences.
    """

    wanted: Mapping[str, Scheme]
    chosen: tuple[tuple[Layer, Candidate], ...]
    skipped: tuple[SkippedLayer, ...]
    unmatched: tuple[str, ...]
    missing: tuple[str, ...]
    slow: tuple[str, ...]


def fit(model: nn.Module, plan: Plan, *, strict: bool = False) -> Fit:
    """Match a plan with a model. Nothing is packed; what is slow on this device is logged.

    Args:
        model: plain, compiled or wrapped; quantized or not.
        plan: names with wrappers' prefixes are understood.
        strict: refuses skipped, unmatched, missing and slow layers.

    Raises:
        PlanError: if no layer of the plan is in the model, or what ``strict`` refuses.
        CandidateError: if a scheme is unknown.
    """
    layers = _layers(model)
    by_name = {name: layer for layer in layers for name in reversed((layer.name, *layer.names))}
    wanted: dict[str, Scheme] = {}
    for name, scheme in plan.layers.items():
        if name in by_name:
            wanted.setdefault(by_name[name].name, scheme)
    unmatched = tuple(name for name in plan.layers if name not in by_name)
    if plan.layers and not wanted:
        raise PlanError(
            "the plan names layers of this model",
            got=f"none of its {len(unmatched)} layers, such as {unmatched[0]}",
            fix="The plan is for another model.",
        )
    missing = tuple(layer.name for layer in layers if wanted and layer.reason is None and layer.name not in wanted)
    chosen, skipped = _choose([layer for layer in layers if layer.name in wanted], wanted)
    if strict and (skipped or unmatched or missing):
        raise PlanError("plan and model name the same layers", got=_differences(skipped, unmatched, missing))
    return Fit(
        wanted=wanted,
        chosen=tuple(chosen),
        skipped=tuple(skipped),
        unmatched=unmatched,
        missing=missing,
        slow=_slow(chosen, strict),
    )


def _layers(model: nn.Module) -> list[Layer]:
    layers = [
        Layer(name=site.name, module=site.module, reason=site.reason, names=site.aliases)
        for site in find_linears(model)
    ]
    layers += [
        Layer(name=name, module=module, reason=None, names=()) for name, module in quantized_layers(model).items()
    ]
    return layers


def _choose(
    layers: list[Layer], wanted: Mapping[str, Scheme]
) -> tuple[list[tuple[Layer, Candidate]], list[SkippedLayer]]:
    """The layers that get a scheme, and those that cannot, with the reason."""
    chosen: list[tuple[Layer, Candidate]] = []
    skipped: list[SkippedLayer] = []
    for layer in layers:
        candidate = candidates.parse(wanted[layer.name])
        reason = None
        if candidate.scheme != NONE:
            reason = layer.reason or _why_not(layer, candidate)
        if reason is None:
            chosen.append((layer, candidate))
        else:
            skipped.append(SkippedLayer(name=layer.name, scheme=candidate.scheme, reason=reason))
    return chosen, skipped


def _why_not(layer: Layer, candidate: Candidate) -> str | None:
    n, k = layer.size
    op = LinearOp(
        m=1,
        k=k,
        n=n,
        dtype=layer.dtype,
        device=layer.device,
        bias=bias_of(layer.module) is not None,
    )
    return candidate.why_not(op)


def _slow(chosen: list[tuple[Layer, Candidate]], strict: bool) -> tuple[str, ...]:
    """What will run without a compiled kernel: logged, or refused."""
    slow = without_kernels((candidate.scheme, layer.device) for layer, candidate in chosen)
    if slow and strict:
        raise PlanError(
            "every scheme of the plan has a kernel on this device",
            got="; ".join(slow),
            fix="`autoq doctor` says what to repair. Without strict the plan is applied as it is.",
        )
    for text in slow:
        _log.warning("slow: %s", text)
    return slow


def _differences(skipped: list[SkippedLayer], unmatched: tuple[str, ...], missing: tuple[str, ...]) -> str:
    parts = [f"{one.name}: {one.reason}" for one in skipped]
    parts += [f"{name} is not in the model" for name in unmatched]
    parts += [f"{name} is not in the plan" for name in missing]
    return "; ".join(parts)
