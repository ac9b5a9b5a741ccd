"""The search on a synthetic truth: additive losses biased by family and scheme, with interactions and noise."""

from __future__ import annotations

import itertools
import math
import os
import zlib
from dataclasses import replace

import numpy as np
import optuna
import pytest

from autoq import studies
from autoq.errors import SearchError
from autoq.loss_model import LossModel, neighbours
from autoq.search import (
    Budget,
    Evaluation,
    Option,
    Problem,
    Unit,
    retarget,
    search,
)
from autoq.search_values import PlanPoint, hopeless, surely_worse

SCHEMES = ("none", "int8wo", "int4wo-hqq")
TIME = (1.0, 0.6, 0.4)
LOSS = (0.0, 0.01, 0.12)
BIAS = {"attention": 0.5, "mlp": 1.6, "lm_head": 0.4}


class Truth:
    """Six units whose predicted losses are off by 2 / (family bias · scheme bias), and what really happens."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.scheme_bias = np.exp(0.5 * rng.normal(size=3))
        self.loss_US = np.zeros((6, 3))
        self.families = {}
        units = []
        for u in range(6):
            family = tuple(BIAS)[u % 3]
            size, sensitivity = rng.uniform(5, 20), np.exp(0.8 * rng.normal()) / 6
            options = []
            for s, scheme in enumerate(SCHEMES):
                self.loss_US[u, s] = sensitivity * LOSS[s] * np.exp(0.1 * rng.normal())
                predicted = 2 * self.loss_US[u, s] / (BIAS[family] * self.scheme_bias[s])
                options.append(
                    Option(
                        scheme=scheme,
                        time_us=size * TIME[s] * math.exp(0.05 * rng.normal()),
                        loss=predicted * math.exp(0.1 * rng.normal()),
                        bytes=int(1000 * size * TIME[s]),
                    )
                )
            units.append(Unit(name=f"u{u}", layers=(f"l{u}.a", f"l{u}.b"), options=tuple(options)))
            self.families[f"u{u}"] = family
        self.problem = Problem(units=tuple(units), fixed_time_us=2.0)
        self.uniform = {scheme: self.problem.uniform(scheme) for scheme in SCHEMES}
        self.calls = []

    def loss(self, assignment) -> float:
        losses = self.loss_US[np.arange(6), assignment]
        neighbours = np.sqrt(losses[:-1] * losses[1:]).sum()
        return float(losses.sum() + 0.3 * neighbours + 2 * losses.sum() ** 2)

    def measured(self, assignment, fidelity=1) -> Evaluation:
        loss = self.loss(assignment)
        noise = np.random.default_rng(zlib.crc32(repr((assignment, fidelity)).encode())).normal()
        spread = (0.03 * loss + 3e-4) * (0.3 if fidelity else 1.0)
        delta = loss + noise * spread / 2
        return Evaluation(loss_delta=delta, low=delta - spread, high=delta + spread, samples=32 if fidelity else 4)

    def evaluate(self, schemes, fidelity) -> Evaluation:
        assignment = self.problem.assignment(schemes)
        self.calls.append((assignment, fidelity))
        return self.measured(assignment, fidelity)

    def budget(self) -> Budget:
        return Budget(max_loss=0.5 * self.loss(self.uniform["int4wo-hqq"]))

    def search(self, path, **changes):
        arguments = {
            "evaluate": self.evaluate,
            "budget": self.budget(),
            "families": self.families,
            "uniform": self.uniform,
            "storage": path,
            "fingerprint": "weights+tokens",
            "n_trials": 25,
        }
        return search(self.problem, **(arguments | changes))


@pytest.fixture(autouse=True)
def _no_power_failure(monkeypatch):
    """Flushing each of a journal's lines to the disk is most of a small study's time, and none of its facts."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def same(a, b) -> bool:
    """Everything but the number of evaluations this run made."""
    return all(
        getattr(a, name) == getattr(b, name)
        for name in ("points", "pareto", "finalists", "refitted", "log_multipliers", "certificate")
    )


def every_plan(truth):
    return itertools.product(range(3), repeat=6)


@pytest.mark.parametrize("seed", range(6))
def test_regret_against_all_729_plans(seed, tmp_path):
    truth = Truth(seed)
    budget = truth.budget()
    result = truth.search(tmp_path / "study.journal")
    in_budget = [a for a in every_plan(truth) if truth.measured(a).high <= budget.max_loss]
    best = min(truth.problem.time_us(a) for a in in_budget)
    uniform = min(truth.problem.time_us(a) for a in truth.uniform.values() if a in in_budget)
    chosen = result.finalists[0]
    assert chosen.assignment in in_budget
    assert chosen.time_us <= 1.02 * best
    assert chosen.time_us < 0.9 * uniform
    assert len(result.points) <= 25
    assert len(set(truth.calls)) == len(truth.calls) == result.evaluations


def test_points_and_front_are_consistent(tmp_path):
    truth = Truth(1)
    result = truth.search(tmp_path / "study.journal")
    budget = truth.budget()
    assert [p.label for p in result.points[:3]] == list(SCHEMES)
    assert {p.source for p in result.points} >= {"uniform", "frontier", "optuna"}
    for point in result.points:
        assert point.evaluation == truth.measured(point.assignment, point.fidelity)
        assert point.full or point.fidelity == 0
        if not point.full:
            surely_over = point.evaluation.low > budget.max_loss
            beaten = any(p.time_us <= point.time_us and p.evaluation.high < point.evaluation.low for p in result.points)
            faster = [p for p in result.points if p.full and p.excess(budget) == 0 and p.time_us <= point.time_us]
            assert surely_over or beaten or (len(faster) >= 3 and point.source != "uniform")
    for a, b in itertools.pairwise(result.pareto):
        assert a.time_us < b.time_us
        assert a.evaluation.loss_delta > b.evaluation.loss_delta
    best = [p for p in result.finalists if p.source != "uniform"]
    assert len(best) <= 3
    assert all(p.evaluation.high <= budget.max_loss for p in result.finalists)
    assert any(p.source == "uniform" for p in result.finalists)


def test_the_fit_finds_the_families_bias(tmp_path):
    truth = Truth(2)
    result = truth.search(tmp_path / "study.journal")
    m = result.log_multipliers
    # What was built in is log(1.6 / 0.4) = 1.39; the prior and few plans leave it short.
    assert 0.5 < m["family:mlp"] - m["family:lm_head"] < 2.0
    # Near the budget: the interactions make far plans another matter.
    some = [a for a in every_plan(truth) if 0.8 < truth.loss(a) / truth.budget().max_loss < 1.2]
    truths = np.array([truth.loss(a) for a in some])
    before = np.array([truth.problem.loss(a) for a in some])
    after = np.array([result.refitted.loss(a) for a in some])
    assert np.median(np.abs(after / truths - 1)) < 0.15
    assert np.median(np.abs(after - truths)) < 0.25 * np.median(np.abs(before - truths))
    assert result.certificate.loss_error < 0.1 * truth.budget().max_loss
    assert result.certificate.bound <= result.certificate.value * 1.1
    assert result.certificate.gap < 0.1


@pytest.mark.parametrize("call", [0, 3, 8, 12])
def test_interrupted_search_repeats_nothing_and_ends_the_same(call, tmp_path):
    whole, parts = Truth(3), Truth(3)
    expected = whole.search(tmp_path / "whole.journal")

    def interrupted(schemes, fidelity):
        if len(parts.calls) == call:
            raise KeyboardInterrupt
        return parts.evaluate(schemes, fidelity)

    with pytest.raises(KeyboardInterrupt):
        parts.search(tmp_path / "parts.journal", evaluate=interrupted)
    assert len(parts.calls) == call
    result = parts.search(tmp_path / "parts.journal")
    assert parts.calls == whole.calls
    assert same(result, expected)
    assert result.evaluations == len(whole.calls) - call
    again = parts.search(tmp_path / "parts.journal")
    assert again.evaluations == 0
    assert same(again, expected)


def test_journal_cut_in_the_middle_of_a_line_is_mended(tmp_path):
    truth = Truth(4)
    path = tmp_path / "study.journal"
    truth.search(path, n_trials=6)
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    calls = len(truth.calls)
    truth.search(path, n_trials=6)
    assert len(truth.calls) == calls
    assert path.read_bytes().endswith(b"\n")


def test_more_trials_continue_the_study(tmp_path):
    whole, parts = Truth(5), Truth(5)
    expected = whole.search(tmp_path / "whole.journal", n_trials=14)
    parts.search(tmp_path / "parts.journal", n_trials=6)
    assert same(parts.search(tmp_path / "parts.journal", n_trials=14), expected)
    assert parts.calls == whole.calls


def test_seed_changes_only_what_optuna_draws(tmp_path):
    a, b, c = (Truth(0).search(tmp_path / f"{i}.journal", seed=seed) for i, seed in enumerate((7, 7, 8)))
    assert same(a, b)
    assert a.points[:6] == c.points[:6]


def test_other_budget_is_another_study_and_reuses_evaluations(tmp_path):
    truth = Truth(0)
    path = tmp_path / "study.journal"
    first = truth.search(path)
    looser = Budget(max_loss=1.5 * truth.budget().max_loss)
    second = truth.search(path, budget=looser)
    assert second.study_name != first.study_name
    assert len(set(truth.calls)) == len(truth.calls)
    assert second.evaluations < first.evaluations
    assert second.finalists[0].time_us <= first.finalists[0].time_us


def test_another_budget_starts_from_all_plans_measured_before_and_is_done_soon(tmp_path):
    truth = Truth(2)
    path = tmp_path / "study.journal"
    first = truth.search(path)
    known = {point.assignment: point.evaluation for point in first.points if point.full}
    tighter = Budget(max_loss=0.8 * truth.budget().max_loss)
    second = truth.search(path, budget=tighter, n_trials=40)
    again = {point.assignment: point.evaluation for point in second.points}
    # A plan that is surely over the tighter limit is not looked at beyond the first fidelity.
    assert set(known) <= set(again)
    assert all(again[plan] == known[plan] for plan in known if again[plan].samples == known[plan].samples)
    assert second.evaluations < first.evaluations / 3
    allowed = [a for a in every_plan(truth) if truth.measured(a).high <= tighter.max_loss]
    best = min(truth.problem.time_us(a) for a in allowed)
    assert second.finalists[0].time_us <= 1.02 * best


def test_numbers_of_another_problem_are_not_taken_for_known_plans(tmp_path):
    truth = Truth(2)
    path = tmp_path / "study.journal"
    truth.search(path, n_trials=8)
    turned = tuple(replace(unit, options=unit.options[::-1]) for unit in truth.problem.units)
    other = Truth(2)
    other.problem = replace(truth.problem, units=turned)
    other.uniform = {scheme: other.problem.uniform(scheme) for scheme in SCHEMES}
    found = other.search(path, n_trials=8)
    assert not [point for point in found.points if point.source == "known"]
    assert [point for point in truth.search(path, n_trials=8, seed=5).points if point.source == "known"]


def test_trials_carry_the_excess_over_the_limits_as_a_constraint(tmp_path):
    truth = Truth(1)
    path = tmp_path / "study.journal"
    result = truth.search(path)
    study = optuna.load_study(study_name=result.study_name, storage=studies.open_storage(path))
    full = {point.assignment: point for point in result.points if point.full}
    complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    assert complete
    for trial in complete:
        point = full[tuple(trial.user_attrs["plan"]["assignment"])]
        assert trial.constraints == {"budget": point.excess(truth.budget())}
        assert trial.values == [point.time_us, point.evaluation.loss_delta]


def test_other_weights_or_tokens_reuse_nothing(tmp_path):
    truth = Truth(0)
    path = tmp_path / "study.journal"
    first = truth.search(path, n_trials=5)
    second = truth.search(path, n_trials=5, fingerprint="other tokens")
    assert second.evaluations == first.evaluations
    assert second.study_name != first.study_name


def evaluation(rows) -> Evaluation:
    mean, spread = float(np.mean(rows)), 1.96 * float(np.std(rows)) / math.sqrt(len(rows))
    return Evaluation(loss_delta=mean, low=mean - spread, high=mean + spread, samples=len(rows), rows=tuple(rows))


def test_a_loss_is_surely_worse_by_pairs_of_rows_where_intervals_overlap():
    rng = np.random.default_rng(0)
    common = rng.normal(0.1, 0.05, size=32)
    better, worse = evaluation(common), evaluation(common + 0.01 + 0.001 * rng.normal(size=32))
    assert worse.low < better.high
    assert surely_worse(worse, better)
    assert not surely_worse(better, worse)
    assert not surely_worse(better, better)
    # On the eight rows that both have.
    assert surely_worse(evaluation(worse.rows[:8]), better)
    unsure = evaluation(common + 0.01 + 0.1 * rng.normal(size=32))
    assert not surely_worse(unsure, better)


def test_of_few_rows_nothing_is_sure(tmp_path):
    rows = (0.011, 0.012)
    few = Evaluation(loss_delta=0.0115, low=0.011, high=0.012, samples=2, rows=rows)
    budget = Budget(max_loss=0.01)
    point = PlanPoint(
        assignment=(0,), label="", source="uniform", predicted_loss=0.0, time_us=1.0, bytes=1, evaluation=few,
        fidelity=0, full=False, comparable=False,
    )  # fmt: skip
    better = replace(point, time_us=0.5, full=True, comparable=True, evaluation=evaluation([0.001] * 32))
    assert not hopeless(point, [better], budget)
    sure = evaluation(np.linspace(0.0114, 0.0116, 8))
    assert hopeless(replace(point, evaluation=sure), [], budget)
    assert not surely_worse(few, better.evaluation)
    assert hopeless(
        replace(point, evaluation=replace(few, loss_delta=math.inf, low=math.inf, high=math.inf)), [], budget
    )


def test_losses_of_exactly_zero_do_not_make_every_plan_free():
    truth = Truth(4)
    model = LossModel(truth.problem, truth.families, truth.budget().max_loss)
    plans = [truth.uniform["int8wo"], truth.uniform["int4wo-hqq"], (1, 2, 0, 2, 1, 2), (2, 0, 2, 1, 2, 0)]

    def point(assignment, delta, spread):
        found = Evaluation(loss_delta=delta, low=delta - spread, high=delta + spread, samples=3)
        return PlanPoint(
            assignment=assignment, label="", source="local", predicted_loss=0.0, time_us=1.0, bytes=1,
            evaluation=found, fidelity=0, full=True,
        )  # fmt: skip

    measured = [point(plan, truth.loss(plan), 0.01 * truth.loss(plan)) for plan in plans]
    steps = [point((0, 1, 0, 0, 1, 0), 0.0, 0.0), point((1, 0, 0, 1, 0, 0), 0.0, 0.0)]
    worst = truth.uniform["int4wo-hqq"]
    before = model.predict(model.fit(measured), worst)
    assert before == pytest.approx(truth.loss(worst), rel=0.25)
    assert model.predict(model.fit(measured + steps), worst) == pytest.approx(truth.loss(worst), rel=0.35)


def test_units_with_one_scheme_each_have_no_neighbours():
    unit = Unit(name="u", layers=("l",), options=(Option(scheme="none", time_us=1.0, loss=0.0, bytes=4),))
    point = PlanPoint(
        assignment=(0,), label="", source="uniform", predicted_loss=0.0, time_us=1.0, bytes=4,
        evaluation=evaluation([0.0] * 8), fidelity=0, full=True,
    )  # fmt: skip
    assert list(neighbours(Problem(units=(unit,)), point, Budget(max_loss=1.0))) == []


def test_equal_plans_are_surely_worse_one_time_in_forty_at_most():
    rng = np.random.default_rng(1)
    for rows in (4, 8, 32):
        pairs = rng.normal(0.0, 1.0, size=(4000, 2, rows))
        wrong = sum(surely_worse(evaluation(a), evaluation(b)) for a, b in pairs)
        assert 0.01 < wrong / 4000 < 0.027


def test_only_plans_that_could_win_are_measured_on_all_samples(tmp_path):
    truth = Truth(3)
    result = truth.search(tmp_path / "study.journal", fidelities=3)
    third = result.finalists[2].time_us  # the best three come first
    stopped = [p for p in result.points if p.fidelity == 1]
    assert stopped
    assert all(p.comparable and not p.full for p in stopped)
    assert any(p.time_us > third for p in stopped)
    assert all(p.full for p in result.finalists)
    assert set(result.pareto) & set(stopped)
    assert not any(p.fidelity == 0 for p in result.pareto)


def test_objective_memory(tmp_path):
    truth = Truth(1)
    budget = Budget(objective="memory", max_loss=truth.budget().max_loss)
    result = truth.search(tmp_path / "study.journal", budget=budget)
    in_budget = [a for a in every_plan(truth) if truth.measured(a).high <= budget.max_loss]
    assert result.finalists[0].bytes <= 1.02 * min(truth.problem.bytes(a) for a in in_budget)


@pytest.mark.parametrize(
    "limits", [{"max_time_us": 40.0}, {"max_bytes": 38_000}, {"max_time_us": 40.0, "max_bytes": 45_000}]
)
def test_objective_loss(limits, tmp_path):
    truth = Truth(1)
    result = truth.search(tmp_path / "study.journal", budget=Budget(objective="loss", **limits))
    allowed = [
        a
        for a in every_plan(truth)
        if truth.problem.time_us(a) <= limits.get("max_time_us", math.inf)
        and truth.problem.bytes(a) <= limits.get("max_bytes", math.inf)
    ]
    chosen = result.finalists[0]
    assert chosen.assignment in allowed
    best = min(truth.loss(a) for a in allowed)
    assert truth.loss(chosen.assignment) <= best + 0.05 * truth.budget().max_loss


@pytest.mark.parametrize(
    "budget",
    [
        Budget(objective="loss", max_bytes=300),
        Budget(objective="latency", max_loss=0.2, max_bytes=300),
        Budget(objective="memory", max_loss=0.2, max_time_us=75.0),
    ],
)
def test_a_plan_over_a_hard_limit_beats_none_within_it(budget, tmp_path):
    """Quantizing costs time here, as it may on a GPU: the unquantized plan is the fastest, and too large."""
    schemes = {"none": (10.0, 0.0, 100), "int8wo": (12.0, 0.001, 50), "int4wo-hqq": (15.0, 0.01, 25)}

    def unit(number):
        options = (
            Option(scheme=scheme, time_us=time, loss=loss * (1 + 0.1 * number), bytes=size)
            for scheme, (time, loss, size) in schemes.items()
        )
        return Unit(name=f"u{number}", layers=(f"l{number}",), options=tuple(options))

    problem = Problem(units=tuple(map(unit, range(6))))

    def evaluate(plan, fidelity):
        loss = problem.loss(problem.assignment(plan))
        return evaluation(loss * (1 + 0.01 * np.cos(np.arange(8 * (fidelity + 1)))))

    found = search(
        problem,
        evaluate=evaluate,
        budget=budget,
        families=dict.fromkeys((unit.name for unit in problem.units), "all"),
        uniform={scheme: problem.uniform(scheme) for scheme in schemes},
        storage=tmp_path / "study.journal",
        fingerprint="",
    )
    best = found.finalists[0]
    assert best.excess(budget) == 0
    assert best.value(budget.metric) <= 1.02 * budget.solve(problem).value


def test_retarget_needs_no_evaluation(tmp_path):
    truth = Truth(2)
    result = truth.search(tmp_path / "study.journal")
    calls = len(truth.calls)
    for share in (0.3, 0.7, 1.0):
        limit = share * truth.budget().max_loss
        solution = retarget(result.refitted, Budget(max_loss=limit))
        assert 0.5 * limit < truth.loss(solution.assignment) < 1.25 * limit
    with pytest.raises(SearchError, match="time of at most"):
        retarget(result.refitted, Budget(objective="loss", max_time_us=1.0))
    assert len(truth.calls) == calls


def test_a_budget_nothing_meets_gives_no_finalists(tmp_path):
    truth = Truth(0)
    schemes = ("int8wo", "int4wo-hqq")
    units = tuple(
        Unit(name=u.name, layers=u.layers, options=tuple(o for o in u.options if o.scheme in schemes))
        for u in truth.problem.units
    )
    problem = Problem(units=units)

    def evaluate(chosen, fidelity):
        return truth.measured(truth.problem.assignment(chosen), fidelity)

    result = search(
        problem,
        evaluate=evaluate,
        budget=Budget(max_loss=1e-5),
        families=truth.families,
        uniform={s: problem.uniform(s) for s in schemes},
        storage=tmp_path / "study.journal",
        fingerprint="",
        n_trials=6,
    )
    assert result.finalists == ()
    assert result.certificate is None
    assert not any(point.full for point in result.points)


def test_a_plan_that_breaks_the_model_is_kept_and_passed_over(tmp_path):
    truth = Truth(0)

    def evaluate(schemes, fidelity):
        if "int4wo-hqq" in (schemes["l0.a"], schemes["l3.a"]):
            return Evaluation(loss_delta=math.inf, low=math.inf, high=math.inf, samples=4)
        return truth.evaluate(schemes, fidelity)

    result = truth.search(tmp_path / "study.journal", evaluate=evaluate)
    broken = [p for p in result.points if p.evaluation.loss_delta == math.inf]
    assert broken
    assert not any(p.full for p in broken)
    assert result.finalists[0].time_us < truth.problem.time_us(truth.uniform["int8wo"])


def test_nan_loss_stops_with_the_reason_and_the_study_goes_on(tmp_path):
    truth = Truth(0)

    def broken(schemes, fidelity):
        return Evaluation(loss_delta=math.nan, low=math.nan, high=math.nan, samples=1)

    with pytest.raises(SearchError, match="number within its interval"):
        truth.search(tmp_path / "study.journal", evaluate=broken)
    assert truth.search(tmp_path / "study.journal").finalists


def test_one_fidelity_and_a_database(tmp_path):
    truth = Truth(0)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    result = truth.search(url, fidelities=1, n_trials=8)
    assert all(point.full for point in result.points if math.isfinite(point.evaluation.high))
    assert truth.search(url, fidelities=1, n_trials=8).evaluations == 0


def test_silent_and_without_traces_in_optuna(tmp_path, capfd, recwarn):
    level = optuna.logging.get_verbosity()
    seen = []
    Truth(0).search(tmp_path / "study.journal", progress=lambda done, total, text: seen.append((done, total, text)))
    assert optuna.logging.get_verbosity() == level
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert seen[0][:2] == (1, 25)
    assert seen[0][2].startswith("none: ")
    assert all("; best so far " in text and "× as fast as none" in text for _, _, text in seen)


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    truth = Truth(0)
    with pytest.raises(SearchError, match="needs a family"):
        truth.search(tmp_path / "s", families={})
    with pytest.raises(SearchError, match="at least 1"):
        truth.search(tmp_path / "s", n_trials=0)
    with pytest.raises(SearchError, match="one valid option index"):
        truth.search(tmp_path / "s", uniform={"none": (0,)})
    (tmp_path / "file").write_text("")
    with pytest.raises(SearchError, match="writable Optuna journal"):
        truth.search(tmp_path / "file" / "study.journal")
    with pytest.raises(SearchError, match="besides its objective"):
        Budget(objective="latency", max_time_us=5.0)
    with pytest.raises(SearchError, match="finite"):
        Budget(max_loss=math.nan)
    with pytest.raises(SearchError, match="latency, memory or loss"):
        Budget(objective="speed", max_loss=1.0)
