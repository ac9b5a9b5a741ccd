"""The stages in order: record, profile, score, calibrate, search, verify. One run turns a model into a plan."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from autoq import decode_choice, plugins, provenance, search, studies
from autoq.additive import Additive
from autoq.apply_report import by_kind
from autoq.cache import (
    SHAPE,
    Fingerprint,
    ProfileCache,
    SensitivityCache,
    default_folder,
    housekeeping,
    sharing,
)
from autoq.calibration import Progress, Timer, calibrate
from autoq.costs import Costs
from autoq.errors import InputError, ModelError
from autoq.estimates import estimates
from autoq.evaluation import LossBudget, LossMeter, loss_budget
from autoq.identity import content_hash, function_hash, model_hash
from autoq.judging import Judge
from autoq.losses import TokenNLL, default_metric, is_causal_lm
from autoq.modules import check_weights, compile_arguments, device_of, unwrap
from autoq.other_weights import other_weights
from autoq.phase_forms import PhaseForms
from autoq.plan import Plan
from autoq.profiler import LatencyModel, isolated_times, profile, shapes_of
from autoq.profiler.end_to_end import UNQUANTIZED
from autoq.recorder import record as record_inputs
from autoq.results import Settings, TuneResult
from autoq.scheme import NONE
from autoq.search import Budget, PlanPoint, Problem, SearchResult
from autoq.shadow import PackedStore, Shadow
from autoq.summary import loss_family
from autoq.ties import units
from autoq.tuning_inputs import default_phases, judging_batches
from autoq.verdict import Evidence, choose, finished_plan, front_rows, layers_of
from autoq.workload import Phase

_log = logging.getLogger(__name__)

_NOTED_SHARE = 0.01  # of the model's bytes


class Tuning:
    """One run of ``tune``: its stages share the model, the settings and what earlier stages found."""

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        phases: Mapping[str, Phase] | None,
        settings: Settings,
        progress: Progress | None,
    ) -> None:
        self.settings = settings
        self.model = unwrap(model)
        self.compile_arguments = compile_arguments(model)
        self.notes: list[str] = []
        self._progress = progress
        check_weights(self.model, settings.filter_fn)
        # Before anything runs: a module or a function may count its calls.
        self._model_hash = model_hash(self.model)
        functions = {"loss_fn": settings.loss_fn, "eval_fn": settings.eval_fn}
        self._functions = {name: "" if one is None else function_hash(one) for name, one in functions.items()}
        found = judging_batches(self.model, batches, phases, own_loss=settings.loss_fn is not None, seed=settings.seed)
        self.batches = found.batches
        if found.sampled_tokens:
            count = found.sampled_tokens
            self.note(f"{count} tokens sampled from the model extend the given text to judge accuracy by.")
        self.phases = phases if phases is not None else self._default_phases()
        if settings.kv_cache:
            decode_choice.check(self.model, settings.kv_cache, self.phases)
        for name in self.phases:
            if not (isinstance(name, str) and name.isprintable()):  # it becomes a key of the plan, which is printed
                raise InputError("a phase's name is printable text", got=repr(name))
        folder = settings.cache_dir or default_folder()
        self.device = device_of(self.model)
        for dtype in provenance.autocast(self.device).values():
            self.note(f"Everything was measured inside torch.autocast with {dtype.removeprefix('torch.')}.")
        self.fingerprint = Fingerprint.current(self.device)
        self.profiles = ProfileCache(folder, self.fingerprint)
        if housekeeping.earlier_profiles(folder):
            self.note(f"Times that an earlier version of autoq kept in {folder} are not read; `autoq cache prune`.")
        key = settings.profile_from
        self.predicted_from: dict[str, Any] = {}  # of the plan's provenance
        self.other_profile = None if key is None else sharing.find(folder, key, foreign=True)
        self.folder = folder

    def prepare(self) -> None:
        """Record the workload, and make ready what measures losses and times.

        Raises:
            ModelError: if no layer may be quantized.
        """
        self.say("record", "", 0, 1)
        filter_fn = self.settings.filter_fn
        self.workload = record_inputs(self.model, phases=self.phases, filter_fn=filter_fn, samples_per_layer=0).workload
        if not self.workload.quantizable:
            reasons = "; ".join(f"{one.name}: {one.reason or 'never called'}" for one in self.workload.layers[:5])
            raise ModelError("the model has a linear layer that is called and may be quantized", got=reasons)
        self.layers = [layer.name for layer in self.workload.quantizable]
        self.left_alone = self._left_alone()
        self.units = units(self.workload, self.settings.ties, self.settings.candidates)
        if self.settings.ties:
            self.note(f"{len(self.layers)} layers are decided in {len(self.units)} units.")
        self.store = PackedStore(self.model, self.layers)
        self.costs = Costs(model=self.model, workload=self.workload, store=self.store)
        metric = default_metric(self.model, self.batches, self.settings.loss_fn)
        self.meter = LossMeter(
            Shadow(self.model, self.store),
            metric,
            self.batches,
            eval_fn=self.settings.eval_fn,
            forms=PhaseForms.of(self.workload),
        )
        self.scale = Additive.of(self.metric_name)
        self.timer = Timer(self.model, self.store, self.phases, self.compile_arguments, self.say)
        self.say("record", "", 1, 1)

    def run(self) -> TuneResult:
        """All stages."""
        if self.settings.storage is not None:
            studies.open_storage(self.settings.storage)  # refused now rather than after the measurements
        self.prepare()
        rows = self.profile()
        self.say("baseline", "loss of the unquantized model", 0, 1)
        baseline = float(self._baseline().double().mean())
        budget = self._budget(baseline)
        self.say("baseline", budget.text, 1, 1)
        judge = self.judge()
        scores = judge.scores(partial(self.say, "sensitivity"))
        latency = self.latency(rows)
        limits = self._limits(budget)
        # Which pairs are worth measuring is seen from the problem that the scores alone make.
        problem = self.problem(latency, {(row["layer"], row["scheme"]): row["score"] for row in scores})
        scores = judge.measured_pairs(problem, limits, scores, partial(self.say, "sensitivity"))
        broken = sum(not math.isfinite(row["score"]) for row in scores)
        if broken:
            self.note(f"{broken} (layer, scheme) pairs whose loss is no finite number are left out.")
        for text in judge.notes:
            self.note(text)
        families = {layer: loss_family(layer, self.layers) for layer in self.layers}
        priced = estimates(scores, families)
        problem = self.problem(latency, {pair: one.loss for pair, one in priced.items()})
        found, phase_losses = judge.in_every_phase(self._search(problem, limits, judge), limits)
        finalists, none_label = self._finalists(problem, found)
        times = self.timer.time({label: layers_of(problem, one) for label, one in finalists.items()}, "verify")
        evidence = Evidence(
            search=found,
            finalists=finalists,
            phase_losses=phase_losses,
            times=times,
            limits=limits,
            budget=budget,
            latency=latency,
            workload=self.workload,
            scale=self.scale,
            how=self.timer.how(),
            none_label=none_label,
            unquantized_bytes=self.costs.weight_bytes({}),
        )
        choice = choose(evidence)
        if choice is None:
            self.note(f"No plan within the budget ({budget.text}) beats the unquantized model: nothing is quantized.")
        elif choice == none_label:
            self.note(f"No plan within the budget ({budget.text}) beats unquantized weights in autoq's kernels.")
        plan = finished_plan(
            evidence, choice, self._provenance(budget, limits), {self.fingerprint.key: provenance.kernels_of(rows)}
        )
        if self.settings.kv_cache:
            plan = self._decoded(plan, budget)
        return TuneResult(
            plan=plan,
            workload=self.workload,
            notes=tuple(self.notes),
            front_rows=front_rows(evidence, choice),
            measurement_rows=rows,
            sensitivity_rows=scores,
            cost_rows=self.costs.rows(
                problem,
                refitted=found.refitted,
                candidates=self.settings.candidates,
                latency=latency,
                losses=priced,
                measurements=rows,
            ),
            problem=found.refitted,
            budget=limits,
            scale=self.scale,
            metric=self.metric_name,
            baseline_loss=baseline,
            packed=self.store.taken(plan.layers),
        )

    @property
    def metric_name(self) -> str:
        """What plans are judged by."""
        return "eval_fn" if self.settings.eval_fn is not None else self.meter.metric.name

    @property
    def none_is_stock(self) -> bool:
        """Whether the plan with ``none`` on every layer is the unquantized model itself."""
        return self.store.none_is_stock

    def _provenance(self, budget: LossBudget, limits: Budget) -> dict[str, Any]:
        """Everything about the run that is not a measured figure."""
        unit = "eval_fn's" if self.settings.eval_fn is not None else self.meter.metric.unit
        made_with = plugins.origins(one.key for one in self.settings.candidates)
        return {
            **provenance.of_run(self.fingerprint.to_json(), self.settings.seed, self.settings.request()),
            "budget": {
                "metric": self.metric_name,
                "unit": unit,
                "text": budget.text,
                "baseline": budget.baseline,
                "max_increase": None if limits.max_loss is None else self.scale.back(limits.max_loss),
                "objective": limits.objective,
                "max_latency_us": limits.max_time_us,
                "max_weight_bytes": limits.max_bytes,
            },
            **self.predicted_from,
            **({"plugins": made_with} if made_with else {}),
            "model": provenance.of_model(type(self.model).__name__, self.weights_hash, self.workload, self.left_alone),
            "notes": list(self.notes),
        }

    def say(self, stage: str, text: str, done: int, total: int) -> None:
        """Tell the user's callback, if there is one."""
        if self._progress is not None:
            self._progress(stage, text, done, total)

    def note(self, text: str) -> None:
        """Keep a decision autoq took by itself, for the result and the plan."""
        self.notes.append(text)
        _log.info(text)

    def _left_alone(self) -> dict[str, dict[str, float]]:
        """Kind → how many weights no plan can quantize, their bytes and share of the model's; the large ones noted."""
        decided = set(self.layers)
        reasons = {one.name: one.reason or "never called" for one in self.workload.layers if one.name not in decided}
        found = by_kind(other_weights(self.model, reasons))
        for kind, (_, _, share) in found.items():
            if share >= _NOTED_SHARE:
                self.note(f"{share:.1%} of the model's bytes stay as they are: {kind}.")
        return {kind: {"weights": count, "bytes": size, "share": share} for kind, (count, size, share) in found.items()}

    def _default_phases(self) -> dict[str, Phase]:
        made = default_phases(self.model, self.batches)
        if is_causal_lm(self.model):
            calls = ", ".join(f"{name} × {phase.calls:g}" for name, phase in made.items())
            self.note(f"No phases were given: a request is taken to be {calls} (see autoq.Phase).")
        return made

    def _budget(self, baseline: float) -> LossBudget:
        degradation, increase = self.settings.max_degradation, self.settings.max_increase
        budget = loss_budget(self.metric_name, baseline, max_degradation=degradation, max_increase=increase)
        if self.metric_name == "kl" and increase is None and degradation != Settings().max_degradation:
            self.note(
                f"max_degradation={degradation:g} is relative, and a KL divergence has no baseline to be relative to: "
                f"its limit is {budget.max_increase:g} nats. max_increase sets another."
            )
        return budget

    def _limits(self, budget: LossBudget) -> Budget:
        objective = self.settings.objective
        return Budget(
            objective=objective,
            max_loss=None if objective == "loss" else self.scale.to(budget.max_increase),
            max_time_us=self.settings.max_latency_us,
            max_bytes=self.settings.max_weight_bytes,
        )

    # -- measurements ----------------------------------------------------------------------------------------------

    def profile(self) -> list[dict[str, Any]]:
        """Times of all shapes under all schemes; what the cache has is not measured again."""
        shapes = {shape.key for shape in shapes_of(self.workload)}
        other = self.other_profile
        predicted = None if other is None else sharing.prediction(other, shapes, self.fingerprint)
        rows = profile(
            self.workload,
            self.settings.candidates,
            fingerprint=self.fingerprint,
            device=self.device,
            known=self.profiles.rows(shapes),
            ratios=None if predicted is None else predicted.ratios,
            keep=self.profiles.append,
            progress=lambda text, done, total: self.say("profile", text, done, total),
        )
        if predicted is not None:
            count = len({tuple(row[name] for name in SHAPE) for row in rows if row["origin"]})
            self.note(predicted.sentence(count))
            self.predicted_from = {"profile_from": predicted.to_json(count)}
        return rows

    def identity(self) -> dict[str, str]:
        """What losses depend on besides the metric: the model, its inputs, the user's functions, the version."""
        return {
            "weights": self.weights_hash,
            "model": self._model_hash,
            "batches": self._batches_hash,
            **self._functions,
            **provenance.autocast(self.device),
            "autoq": version("autoq"),
            "seed": str(self.settings.seed),
        }

    @cached_property
    def weights_hash(self) -> str:
        """Hash of every parameter and buffer, made once."""
        return content_hash([*self.model.parameters(), *self.model.buffers()])

    @cached_property
    def _batches_hash(self) -> str:
        return content_hash([(batch.args, batch.kwargs) for batch in self.batches])

    def _baseline(self) -> Tensor:
        """The unquantized model's losses; kept from an earlier run where nothing else depends on its outputs."""
        if self.settings.eval_fn is not None or not isinstance(self.meter.metric, TokenNLL):
            return self.meter.baseline()
        cache = SensitivityCache(self.folder, self._judged_by() | {"device": self.fingerprint.key})
        kept = cache.baseline(samples=sum(len(batch.kwargs["input_ids"]) for batch in self.meter.batches))
        if kept is not None:
            self.meter.remember(torch.tensor(kept, dtype=torch.float32))
        else:
            cache.keep_baseline(self.meter.baseline().tolist())
        return self.meter.baseline()

    def _judged_by(self) -> dict[str, str]:
        """What losses depend on, the metric included."""
        return self.identity() | {"metric": self.metric_name}

    def _plugins(self) -> dict[str, str]:
        """What losses of plugins' schemes depend on: those of autoq are of its version."""
        found = plugins.fingerprints(one.key for one in self.settings.candidates)
        return {"plugins": json.dumps(found)} if found else {}

    def latency(self, rows: Sequence[Mapping[str, Any]]) -> LatencyModel:
        """The model of a plan's time: the measured rows, corrected by uniform plans timed end to end."""
        offered = [one.scheme for one in self.settings.candidates]
        return calibrate(
            self.timer,
            self.workload,
            isolated_times(self.workload, rows, offered),
            offered,
            none_is_stock=self.none_is_stock,
            identity={"weights": self.weights_hash, "device": self.fingerprint.key, **provenance.autocast(self.device)},
            folder=self.folder,
        )

    def _decoded(self, plan: Plan, budget: LossBudget) -> Plan:
        """The plan with the attention and the KV cache that are best under it."""
        objective = self.settings.objective
        return decode_choice.decided(
            plan,
            model=self.model,
            store=self.store,
            meter=self.meter,
            phases=self.phases,
            time=partial(self.timer.time, stage="decoding"),
            precisions=self.settings.kv_cache,
            max_loss=None if objective == "loss" else budget.max_increase,
            memory=objective == "memory",
            say=partial(self.say, "decoding"),
        )

    def judge(self) -> Judge:
        """What predicts and measures losses of plans."""
        return Judge(
            model=self.model,
            meter=self.meter,
            candidates=self.settings.candidates,
            identity=self._judged_by() | self._plugins(),
            folder=self.folder,
            seed=self.settings.seed,
            scale=self.scale,
        )

    def rejoined(self, recipe: Mapping[str, Any]) -> Judge:
        """What judges plans like the tuning that published a study; nothing is recorded or profiled.

        Args:
            recipe: the study's; see ``_recipe``.
        """
        self.store = PackedStore(self.model, recipe["layers"])
        self.meter = LossMeter(
            Shadow(self.model, self.store),
            default_metric(self.model, self.batches, self.settings.loss_fn),
            self.batches,
            eval_fn=self.settings.eval_fn,
            forms=PhaseForms(rows=recipe["rows"]),
        )
        self.scale = Additive(squares=recipe["squares"])
        return self.judge()

    def _recipe(self) -> dict[str, Any]:
        """What ``rejoined`` needs besides the model, the batches and the settings, as JSON values."""
        rows = {phase: dict(rows) for phase, rows in self.meter.forms.rows.items()}
        offered = [str(one.scheme) for one in self.settings.candidates]
        return {
            "layers": list(self.store.modules),
            "candidates": offered,
            "rows": rows,
            "squares": self.scale.squares,
        }

    # -- search ----------------------------------------------------------------------------------------------------

    def problem(self, latency: LatencyModel, losses: Mapping[tuple[str, str], float]) -> Problem:
        """The knapsack of the units' schemes.

        Args:
            latency: times of layers.
            losses: of (layer, scheme) on the additive scale; one that is no finite number leaves the scheme out.
        """
        finite = {pair: loss for pair, loss in losses.items() if math.isfinite(loss)}
        return self.costs.problem(self.units, self.settings.candidates, latency, finite)

    def _finalists(self, problem: Problem, found: SearchResult) -> tuple[dict[str, PlanPoint], str]:
        """Label → plan to time beside the unquantized model, and the label under which ``none`` everywhere is timed."""
        none = problem.uniform(str(NONE))
        finalists = {str(number): one for number, one in enumerate(found.finalists) if one.assignment != none}
        if self.none_is_stock:
            return finalists, UNQUANTIZED
        point = next(one for one in found.points if one.assignment == none)
        return finalists | {str(NONE): point}, str(NONE)

    def _search(self, problem: Problem, budget: Budget, judge: Judge) -> SearchResult:
        offered = [str(one.scheme) for one in self.settings.candidates]
        return search.search(
            problem,
            evaluate=judge.evaluate,
            budget=budget,
            families={unit.name: loss_family(unit.layers[0], self.layers) for unit in problem.units},
            uniform={name: problem.uniform(name) for name in offered},
            storage=self.settings.storage or str(self.folder / "studies" / f"{self.weights_hash}.journal"),
            fingerprint=judge.fingerprint,
            identity=judge.identity,
            recipe=self._recipe(),
            n_trials=self.settings.n_trials,
            fidelities=len(self.meter.levels),
            seed=self.settings.seed,
            progress=lambda done, total, text: self.say("search", text, done, total),
        )
