"""What plans cost in time and bytes, and the knapsack that they make together with predicted losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from autoq import candidates as schemes
from autoq.candidates import Candidate
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
