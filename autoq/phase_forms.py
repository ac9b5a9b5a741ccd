"""Which arithmetic a plan has in each phase: a mix has one below some rows of the activation and another from there on.

A plan's *form* in a phase has the scheme in every mix's place that the mix equals on that phase's rows. A form's loss
can be measured on any text, whatever rows the text has: it is that of text passing through the phase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoq import candidates
from autoq.scheme import Scheme
from autoq.workload import Workload

Assignment = Mapping[str, Scheme]
FEW, MANY = "few rows", "many rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseForms:
    """The rows of every layer's activation in every phase.

    Attributes:
        rows: phase → layer → rows M; of several, the most. A layer that a phase does not call has those of another.
    """

    rows: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(cls, workload: Workload) -> PhaseForms:
        """Those of a recorded workload."""
        found: dict[str, dict[str, int]] = {phase.name: {} for phase in workload.phases}
        most: dict[str, int] = {}
        for call in workload.calls:
            most[call.layer] = max(call.m, most.get(call.layer, 0))
            rows = found[call.phase]
            rows[call.layer] = max(call.m, rows.get(call.layer, 0))
        return cls(rows={phase: most | rows for phase, rows in found.items()})

    @classmethod
    def extremes(cls, layers: Sequence[str]) -> PhaseForms:
        """Where no workload is known: one row, and so many that every mix has switched."""
        rows = {FEW: 1, MANY: max(one.m_switch for one in candidates.ALL) << 20}
        return cls(rows={phase: dict.fromkeys(layers, m) for phase, m in rows.items()})

    @property
    def largest(self) -> str:
        """The phase with the most rows in a call: there most mixes round activations, and lose most."""
        return max(self.rows, key=lambda phase: max(self.rows[phase].values(), default=0))

    def scheme(self, layer: str, scheme: Scheme, phase: str) -> Scheme:
        """What a scheme is on a layer in a phase."""
        return candidates.parse(scheme).at_rows(self.rows[phase].get(layer, 0)).scheme

    def form(self, plan: Assignment, phase: str) -> dict[str, Scheme]:
        """The plan without mixes that computes what ``plan`` computes in a phase."""
        return {layer: self.scheme(layer, scheme, phase) for layer, scheme in plan.items()}

    def differ(self, plan: Assignment) -> bool:
        """Whether the plan computes different things in different phases."""
        return len(self.distinct(plan)) > 1

    def distinct(self, plan: Assignment) -> list[tuple[tuple[str, ...], dict[str, Scheme]]]:
        """The plan's different forms, each with the phases that have it; that of the largest phase comes first.

        A plan without mixes has one form.
        """
        found: list[tuple[tuple[str, ...], dict[str, Scheme]]] = []
        for phase in sorted(self.rows, key=lambda phase: phase != self.largest):
            form = self.form(plan, phase)
            same = next((index for index, (_, known) in enumerate(found) if known == form), None)
            if same is None:
                found.append(((phase,), form))
            else:
                found[same] = ((*found[same][0], phase), form)
        return found
