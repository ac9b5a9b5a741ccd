"""What plans lose: scores that predict it for all of them, and measurements of those that are tried."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autoq import candidates as schemes
from autoq import pairs, sensitivity
from autoq.additive import Additive
from autoq.cache import SensitivityCache
from autoq.candidates import Candidate
from autoq.errors import ModelError
from autoq.estimates import Pair
from autoq.evaluation import Difference, LossMeter, largest
from autoq.losses import Batch
from autoq.scheme import Scheme
from autoq.search import Assignment, Budget, Evaluation, PlanPoint, Problem, SearchResult
from autoq.search_values import pareto

_SCORED_TOKENS = 2048  # tokens whose gradients are taken
_SCORED_BATCHES = 8  # the same for models without tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Scores and measures the losses of one tuning's plans.

    A plan with mixes computes something else in each phase. While searching, the phase with the most rows speaks for
    it; ``in_every_phase`` measures the others.

    Attributes:
        model: the unquantized model, not compiled.
        meter: measures losses; its shadow's store has the layers and their packed weights.
        candidates: the schemes that plans consist of.
        identity: what losses depend on besides the plan: weights, inputs, metric, version.
        folder: of the cache.
        seed: of the scores' random draws.
        scale: on which losses of layers add up.
        tokens: how many were run through the model so far, whole or from a block on; only ``pairs`` are counted.
        notes: what could not be done, in sentences.
    """

    model: nn.Module
    meter: LossMeter
    candidates: Sequence[Candidate]
    identity: Mapping[str, str]
    folder: Path
    seed: int
    scale: Additive
    tokens: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def scores(self, progress: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
        """Sensitivity rows of all layers and candidates; only schemes without cached rows are scored.

        A mix has the row of what it is in the phase with the most rows.
        """
        forms, store = self.meter.forms, self.meter.shadow.store
        cache = SensitivityCache(self.folder, self.identity)
        have = {(row["layer"], row["scheme"]): row for row in cache.rows()}
        wanted = {
            (layer, one.scheme): forms.scheme(layer, one.scheme, forms.largest)
            for layer in store.modules
            for one in self.candidates
            if one.key != "none"
        }
        scored = dict.fromkeys(wanted.values())
        missing = [one for one in scored if any((layer, str(one)) not in have for layer in store.modules)]
        if missing:
            new = sensitivity.scores(
                self.model,
                self._scored(),
                self.meter.metric,
                store,
                [schemes.parse(one) for one in missing],
                seed=self.seed,
                progress=progress,
            )
            scored_rows = {(row["layer"], row["scheme"]): row for row in new}
            for pair in ((layer, str(one)) for layer in store.modules for one in missing):
                # A layer that these batches do not call is remembered as one without a score.
                row = scored_rows.get(pair, {"layer": pair[0], "scheme": pair[1], "score": None})
                have[pair] = have.get(pair, {}) | row
            cache.append(have[layer, str(one)] for layer in store.modules for one in missing)
        unscored = sorted({layer for (layer, _), form in wanted.items() if have[layer, str(form)]["score"] is None})
        if unscored:
            self.notes.append(
                f"{len(unscored)} layers that no batch for accuracy calls stay unquantized: {', '.join(unscored[:5])}."
            )
        return [
            have[layer, str(form)] | {"scheme": str(scheme)}
            for (layer, scheme), form in wanted.items()
            if layer not in unscored
        ]

    def measured_pairs(
        self,
        problem: Problem,
        budget: Budget,
        scores: Sequence[Mapping[str, Any]],
        progress: Callable[[str, int, int], None],
        *,
        count: int = pairs.COUNT,
    ) -> list[dict[str, Any]]:
        """The sensitivity rows, with the losses measured one at a time where the decision is close.

        What was measured before, for whatever budget, is there too, and counts: another budget's search begins with
        the same rows. Pass them to ``estimates.estimates``.

        Args:
            problem: with the scores as losses.
            budget: objective and limits.
            scores: what ``scores`` returned.
            progress: called with (layer and scheme, done, total).
            count: pairs wanted; a mix counts as what it is in the phase with the most rows.
        """
        cache = SensitivityCache(self.folder, self.identity)
        have = {(row["layer"], row["scheme"]): row for row in cache.rows()}
        form = {(row["layer"], row["scheme"]): self._form(row["layer"], row["scheme"]) for row in scores}
        close = dict.fromkeys(
            (layer, form[layer, scheme]) for layer, scheme in pairs.close(problem, budget, scores, count)
        )
        wanted = {(layer, scheme) for (layer, _), scheme in form.items()}
        room = max(0, count - sum(have[pair]["measured"] is not None for pair in wanted))
        missing = [pair for pair in close if have[pair]["measured"] is None][:room]
        if missing:
            batches, tokens = pairs.sample(self.meter.batches, self.meter.metric)
            try:
                found = self._measure(missing, batches, progress)
            except ModelError as problem_found:
                self.notes.append(f"The scores are not calibrated by measurements: {problem_found}")
                found = {}
            self.tokens["pairs"] += tokens * (len(found) + 1)
            for pair, loss in found.items():
                have[pair] |= {"measured": loss.mean, "measured_low": loss.low, "measured_high": loss.high}
            cache.append(have[pair] for pair in found)
        return [have[row["layer"], form[row["layer"], row["scheme"]]] | {"scheme": row["scheme"]} for row in scores]

    def _form(self, layer: str, scheme: str) -> str:
        """What a scheme is on a layer in the phase with the most rows."""
        forms = self.meter.forms
        return str(forms.scheme(layer, Scheme.parse(scheme), forms.largest))

    def _measure(
        self, missing: Sequence[Pair], batches: Sequence[Batch], progress: Callable[[str, int, int], None]
    ) -> dict[Pair, Difference]:
        return pairs.measure(
            self.model,
            self.meter.shadow.store,
            self.meter.metric,
            batches,
            [(layer, Scheme.parse(scheme)) for layer, scheme in missing],
            seed=self.seed,
            progress=progress,
        )

    def _scored(self) -> list[Batch]:
        """The batches that gradients are taken on: the first ones, up to a number of tokens or batches."""
        chosen: list[Batch] = []
        tokens = 0
        for batch in self.meter.batches:
            ids = batch.kwargs.get("input_ids")
            tokens += ids.numel() if isinstance(ids, Tensor) else 0
            chosen.append(batch)
            if tokens >= _SCORED_TOKENS or (tokens == 0 and len(chosen) >= _SCORED_BATCHES):
                break
        return chosen

    @property
    def fingerprint(self) -> str:
        """Hash of what a measured loss depends on besides the plan."""
        forms = self.meter.forms
        mixes = [one.scheme for one in self.candidates if one.m_switch]
        meant = [
            (layer, str(one), str(forms.scheme(layer, one, forms.largest)))
            for one in mixes
            for layer in self.meter.shadow.store.modules
        ]
        known = {**self.identity, "mixes": json.dumps(meant)} if mixes else dict(self.identity)
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    def evaluate(self, assignment: Mapping[str, str], fidelity: int) -> Evaluation:
        """A plan's measured loss on the additive scale, of its form in the phase with the most rows."""
        plan = {layer: Scheme.parse(text) for layer, text in assignment.items()}
        return self._evaluation(self.meter.difference(plan, fidelity))

    def _evaluation(self, found: Difference) -> Evaluation:
        mean, low, high = (self.scale.to(one) for one in (found.mean, found.low, found.high))
        slope = self.scale.slope(found.mean)
        rows = tuple(mean + slope * (row - found.mean) for row in found.rows)
        return Evaluation(loss_delta=mean, low=low, high=high, samples=found.samples, rows=rows)

    def in_every_phase(
        self, found: SearchResult, budget: Budget
    ) -> tuple[SearchResult, dict[Assignment, dict[str, Evaluation]]]:
        """Measure the finalists in the phases whose arithmetic the search left out.

        Args:
            found: what the search found.
            budget: what it was held to.

        Returns:
            The same with every finalist's loss that of its worst phase; and the losses by phase of the finalists whose
            phases differ, by assignment.
        """
        losses: dict[Assignment, dict[str, Evaluation]] = {}
        for point in found.finalists:
            plan = {layer: Scheme.parse(text) for layer, text in found.refitted.schemes(point.assignment).items()}
            (phases, _), *others = self.meter.forms.distinct(plan)
            if others:
                by_phase = dict.fromkeys(phases, point.evaluation)
                for phases, form in others:
                    by_phase |= dict.fromkeys(phases, self._evaluation(self.meter.difference(form)))
                losses[point.assignment] = {phase: by_phase[phase] for phase in self.meter.forms.rows}
        if not losses:
            return found, losses

        def counted(point: PlanPoint) -> PlanPoint:
            known = losses.get(point.assignment)
            return point if known is None else replace(point, evaluation=largest(known))

        points = tuple(map(counted, found.points))
        return (
            replace(
                found,
                points=points,
                pareto=pareto([point for point in points if point.comparable], budget.axis),
                finalists=tuple(map(counted, found.finalists)),
            ),
            losses,
        )
