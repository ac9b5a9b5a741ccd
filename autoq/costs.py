"""What plans cost in time and bytes, and the knapsack that they make together with predicted losses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from autoq import candidates as schemes
from autoq.candidates import Candidate
from autoq.estimates import Estimate, Pair
from autoq.profiler import LatencyModel
from autoq.scheme import NONE, Scheme
from autoq.search import Option, Problem, Unit
from autoq.shadow import PackedStore
from autoq.workload import LayerInfo, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Counts bytes of weights as they are held once a plan is applied.

    Attributes:
        model: the unquantized model.
        workload: its layers.
        store: their weights.
    """

    model: nn.Module
    workload: Workload
    store: PackedStore

    def weight_bytes(self, plan: Mapping[str, Scheme]) -> int:
        """Bytes of all the model's weights under a plan; layers it does not name stay as they are."""
        found = self.other_bytes()
        for layer in self.workload.quantizable:
            scheme = plan.get(layer.name)
            found += self._stock_bytes(layer) if scheme is None else self.layer_bytes(layer, schemes.parse(scheme))
        return found

    def layer_bytes(self, layer: LayerInfo, candidate: Candidate) -> int:
        """Bytes the layer adds to the model; packed, it adds its own also where it was tied."""
        weight = self.store.weight(layer.name)
        if candidate.leaves_alone(weight.dtype, weight.device.type):
            return self._stock_bytes(layer)
        return candidate.weight_bytes_for(layer.n, layer.k)

    def _stock_bytes(self, layer: LayerInfo) -> int:
        """Bytes of the layer as it is; a tied layer adds none, its weight is the embedding's."""
        return 0 if layer.tied_to else self.store.weight(layer.name).nbytes

    def other_bytes(self) -> int:
        """Bytes of all parameters that no decision changes."""
        infos = {layer.name: layer for layer in self.workload.quantizable}
        decided = {self.store.weight(name).data_ptr() for name, info in infos.items() if not info.tied_to}
        found = {p.data_ptr(): p.nbytes for p in self.model.parameters() if p.data_ptr() not in decided}
        return sum(found.values())

    def problem(
        self,
        units: Mapping[str, Sequence[str]],
        candidates: Sequence[Candidate],
        latency: LatencyModel,
        losses: Mapping[tuple[str, str], float],
    ) -> Problem:
        """The knapsack of the units' schemes, with times of a whole request.

        Args:
            units: name → layers that get one scheme together.
            candidates: the schemes; a unit has those with a time and a loss for each of its layers.
            latency: times of layers.
            losses: (layer, scheme) → loss; that of ``none`` is 0 and need not be there.
        """
        infos = {layer.name: layer for layer in self.workload.quantizable}
        phases = [phase.name for phase in self.workload.phases]

        def option(layers: Sequence[str], candidate: Candidate) -> Option:
            scheme = candidate.scheme
            return Option(
                scheme=str(scheme),
                time_us=sum(latency.calls[p] * latency.layer_us(one, scheme, p) for one in layers for p in phases),
                loss=0.0 if scheme == NONE else sum(losses[one, str(scheme)] for one in layers),
                bytes=sum(self.layer_bytes(infos[one], candidate) for one in layers),
            )

        def is_measured(layer: str, candidate: Candidate) -> bool:
            timed = (layer, candidate.scheme, phases[0]) in latency.isolated_us
            return timed and (candidate.scheme == NONE or (layer, str(candidate.scheme)) in losses)

        made = []
        for name, layers in units.items():
            offered = [one for one in candidates if all(is_measured(layer, one) for layer in layers)]
            made.append(Unit(name=name, layers=tuple(layers), options=tuple(option(layers, one) for one in offered)))
        return Problem(
            units=tuple(made),
            fixed_time_us=sum(latency.calls[phase] * latency.fixed_us[phase] for phase in phases),
            fixed_bytes=self.other_bytes(),
        )

    def rows(
        self,
        problem: Problem,
        *,
        refitted: Problem,
        candidates: Sequence[Candidate],
        latency: LatencyModel,
        losses: Mapping[Pair, Estimate],
        measurements: Sequence[Mapping[str, Any]],
    ) -> list[dict[str, Any]]:
        """Rows of the costs' table: every quantizable layer under every scheme.

        Args:
            problem: as ``problem`` made it.
            refitted: the same after the search, whose corrections of a unit's loss its layers share.
            candidates: the schemes.
            latency: times of layers.
            losses: of (layer, scheme) on the additive scale; those of ``none`` need not be there.
            measurements: rows of the measurements' table.
        """
        infos = {layer.name: layer for layer in self.workload.quantizable}
        made = []
        for unit, fitted in zip(problem.units, refitted.units, strict=True):
            before = {option.scheme: option.loss for option in unit.options}
            after = {option.scheme: option.loss for option in fitted.options}
            for name in unit.layers:
                for candidate in candidates:
                    text = str(candidate.scheme)
                    row: dict[str, Any] = {"layer": name, "unit": unit.name, "scheme": text, "reason": ""}
                    if text in before:
                        row |= self._costs(infos[name], candidate, latency)
                        factor = after[text] / before[text] if before[text] else 1.0
                        found = losses.get((name, text), Estimate(0.0, 0.0, 0.0, measured=False))
                        row |= {"loss": factor * found.loss, "measured": found.measured}
                        row |= {"loss_low": factor * found.low, "loss_high": factor * found.high}
                    else:
                        row["reason"] = self._refusal(unit, infos, text, losses, measurements)
                    made.append(row)
        return made

    def _costs(self, layer: LayerInfo, candidate: Candidate, latency: LatencyModel) -> dict[str, Any]:
        """A layer's times and bytes under a scheme."""
        phases = {phase: latency.layer_us(layer.name, candidate.scheme, phase) for phase in latency.calls}
        return {
            "time_us": sum(calls * phases[phase] for phase, calls in latency.calls.items()),
            "phases_us": json.dumps(phases),
            "weight_bytes": self.layer_bytes(layer, candidate),
        }

    def _refusal(
        self,
        unit: Unit,
        infos: Mapping[str, LayerInfo],
        scheme: str,
        losses: Mapping[Pair, Estimate],
        measurements: Sequence[Mapping[str, Any]],
    ) -> str:
        """Why none of a unit's layers may have a scheme: the first reason of the first layer that has one."""
        for name in unit.layers:
            of_sibling = "" if len(unit.layers) == 1 else f"{name}: "
            layer = infos[name]
            shapes = {(call.m, layer.k, layer.n, call.dtype, layer.bias) for call in self.workload.calls_of(name)}
            for row in measurements:
                shape = (row["m"], row["k"], row["n"], row["dtype"], row["bias"])
                if row["scheme"] == scheme and row["status"] != "ok" and shape in shapes:
                    return f"{of_sibling}{row['status']}: {row['reason']}"
            if (name, scheme) not in losses:
                return f"{of_sibling}no batch for accuracy calls the layer"
            if not math.isfinite(losses[name, scheme].loss):
                return f"{of_sibling}its loss is no finite number"
        return "not measured"
