"""The arithmetic of benchmarks/search.py: areas, kept losses, baselines, regrets, correlations. No times."""

import contextlib
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from autoq.search import Option, Problem, Unit

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    """The parts of the benchmark, found beside its script."""
    sys.path.insert(0, str(FOLDER))
    try:
        from search_bench import accuracy, baselines, cost, fronts, frozen, ours, regret, report, store
    finally:
        sys.path.remove(str(FOLDER))
    return SimpleNamespace(
        accuracy=accuracy, baselines=baselines, cost=cost, fronts=fronts, frozen=frozen, ours=ours, regret=regret,
        report=report, store=store,
    )  # fmt: skip


PHASES = (("prefill", 4.0), ("decode", 1.0))
CALLS = {"prefill": 1.0, "decode": 128.0}
SCHEMES = {"none": (10.0, 0.0, 16), "int8dq": (6.0, 0.02, 8), "fp6(format=e2m3)": (5.0, 0.05, 6)}


def frozen_problem(bench, units=12, seed=0):
    """A problem whose options cost about the same everywhere, with the file's other fields filled in."""
    drawn = random.Random(seed)
    sizes = {f"layer{number}": drawn.uniform(0.5, 2.0) for number in range(units)}
    pass_us = {(u, s, p): sizes[u] * us * k for u in sizes for s, (us, _, _) in SCHEMES.items() for p, k in PHASES}
    problem = Problem(
        units=tuple(
            Unit(
                name=name,
                layers=(name,),
                options=tuple(
                    Option(
                        scheme=scheme,
                        time_us=sum(CALLS[p] * pass_us[name, scheme, p] for p in CALLS),
                        loss=loss * drawn.uniform(0.5, 1.5) / units,
                        bytes=int(1000 * bits * size),
                    )
                    for scheme, (_, loss, bits) in SCHEMES.items()
                ),
            )
            for name, size in sizes.items()
        ),
        fixed_time_us=100.0 + 128 * 3.0,
        fixed_bytes=7,
    )
    return bench.frozen.Frozen(
        problem=problem,
        families=dict.fromkeys(sizes, "mlp"),
        shapes={name: f"{number}x64" for number, name in enumerate(sizes)},
        calls=CALLS,
        fixed_us={"prefill": 100.0, "decode": 3.0},
        pass_us=pass_us,
        about={"weights": "w", "batches": "b"},
    )


def true_losses(problem, plan, rows=8, noise=0.002):
    """Losses per row of a plan: what the problem predicts, twice as large for one scheme, and noise by row and plan."""
    mean = sum(o.loss * (2.0 if o.scheme == "int8dq" else 1.0) for o in problem.options(plan))
    drawn = random.Random(repr(plan))
    return [mean + (drawn.gauss(0.0, noise) if mean else 0.0) for _ in range(rows)]


class Measured:
    """In a measurer's place: losses made up from the plan, each plan counted when it is new."""

    def __init__(self, bench, problem):
        self.bench, self.problem, self.seen = bench, problem, []

    def changes(self, schemes, rows):
        plan = self.problem.assignment(schemes)
        self.seen.append(plan)
        return true_losses(self.problem, plan, rows)

    def evaluation(self, schemes, rows):
        return self.bench.store.as_evaluation(self.changes(schemes, rows))


def test_area_of_a_front_is_that_of_its_rectangles(bench):
    plan, unit = bench.fronts.Plan, bench.fronts.LOSS_UNIT
    one = plan(0.5, 0.2 * unit)
    assert bench.fronts.hypervolume([one]) == pytest.approx(0.5 * 0.8)
    two = [one, plan(0.75, 0.0)]
    assert bench.fronts.hypervolume(two) == pytest.approx(0.5 * 0.8 + 0.25 * 0.2)
    beaten, outside, slower = plan(0.8, 0.1 * unit), plan(0.4, 1.01 * unit), plan(1.2, -0.5 * unit)
    assert bench.fronts.hypervolume([*two, beaten, outside, slower]) == pytest.approx(bench.fronts.hypervolume(two))
    assert bench.fronts.gain([beaten, plan(0.75, 0.0)], [one]) == pytest.approx(0.25 * 0.2)
    assert bench.fronts.gain([], two) == 0.0
    assert bench.fronts.front([*two, beaten]) == two


def test_store_keeps_losses_for_other_processes_and_after_a_torn_line(bench, tmp_path):
    path = tmp_path / "deep" / "losses.jsonl"
    first, second = bench.store.LossStore(path, "here"), bench.store.LossStore(path, "here")
    first.put("plan", [0.1, 0.2])
    assert second.get("plan", 2) == [0.1, 0.2]
    assert second.get("plan", 1) == [0.1]
    assert second.get("plan", 3) is None
    with path.open("a") as stream:
        stream.write('{"of": "here", "plan": "torn", "los')  # killed in the middle
    second.put("plan", [0.1, 0.2, 0.3])
    assert first.get("plan", 3) == [0.1, 0.2, 0.3]
    fresh = bench.store.LossStore(path, "here")
    assert fresh.get("plan", 3) == [0.1, 0.2, 0.3]
    assert fresh.get("torn", 1) is None
    assert bench.store.LossStore(path, "elsewhere").get("plan", 1) is None


def test_no_rows_are_measured_twice_and_what_is_asked_for_counts(bench, tmp_path, monkeypatch):
    calls = []

    class Shadow:
        model = None

        def assign(self, plan):
            self.plan = dict(plan)

        def exact_products(self):
            return contextlib.nullcontext()

    shadow = Shadow()
    batches = [SimpleNamespace(kwargs={"input_ids": torch.zeros(4, 512)}) for _ in range(3)]

    def losses(model, batches, metric):
        calls.append((len(shadow.plan), len(batches)))
        return torch.full((4 * len(batches),), 2.0 + 0.5 * len(shadow.plan))

    monkeypatch.setattr(bench.store, "model_losses", losses)
    meter = SimpleNamespace(shadow=shadow, metric=None, batches=batches)
    measurer = bench.store.Measurer(meter, bench.store.LossStore(tmp_path / "losses.jsonl", "here"))
    plan = {"a": "int8wo"}
    assert measurer.changes(plan, 4) == [0.5] * 4
    assert measurer.changes(plan, 8) == [0.5] * 8
    assert calls == [(0, 1), (1, 1), (0, 1), (1, 1)]  # the second four rows only
    assert measurer.changes(plan, 8) == [0.5] * 8
    assert measurer.changes({"a": "none"}, 8) == [0.0] * 8
    assert len(calls) == 4
    assert measurer.asked_tokens == (4 + 8 + 8 + 8) * 512
    assert measurer.measured_tokens == 16 * 512
    again = bench.store.Measurer(meter, bench.store.LossStore(tmp_path / "losses.jsonl", "here"))
    assert again.changes(plan, 8) == [0.5] * 8
    assert again.measured_tokens == 0


def test_frozen_problem_is_read_as_it_was_written(bench, tmp_path):
    frozen = frozen_problem(bench)
    frozen.save(tmp_path / "problem.json")
    read = bench.frozen.Frozen.load(tmp_path / "problem.json")
    assert read == frozen
    assert read.with_times(json.loads(json.dumps(frozen.times()))) == frozen
    assert frozen.ratio(frozen.none) == 1.0
    schemes = frozen.problem.schemes(frozen.uniform["int8dq"])
    parts = sum(CALLS[phase] * frozen.phase_us(schemes, phase) for phase in CALLS)
    assert parts == pytest.approx(frozen.problem.time_us(frozen.uniform["int8dq"]))


def test_times_of_the_reference_are_taken_over(bench):
    frozen = frozen_problem(bench)
    times = frozen.times()
    times["fixed_us"]["decode"] += 1.0
    moved = frozen.with_times(times)
    assert moved.problem.fixed_time_us == pytest.approx(frozen.problem.fixed_time_us + 128.0)
    del times["pass_us"]["3x64"]
    with pytest.raises(bench.frozen.InputError, match="3x64"):
        frozen.with_times(times)


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_baselines_begin_with_uniform_plans_and_resume_alike(bench, tmp_path, sampler):
    frozen = frozen_problem(bench)

    def run(folder, stops):
        for stop in stops:
            study = bench.baselines.open_study(folder, sampler, 3)
            while len(bench.baselines.finished(study)) < stop:
                measure = lambda plan: sum(true_losses(frozen.problem, plan)) / 8  # noqa: E731
                bench.baselines.step(study, sampler, 3, frozen, measure)
        return bench.baselines.plans(study, frozen)

    whole = run(tmp_path / "whole", [30])
    assert run(tmp_path / "parts", [2, 17, 30]) == whole
    assert [plan.ratio for plan in whole[:3]] == [frozen.ratio(one) for one in frozen.uniform.values()]
    assert whole[0] == (1.0, 0.0)
    assert len(set(whole)) > 15


def test_a_regret_is_the_extra_time_over_the_best_of_all_plans(bench):
    frozen = frozen_problem(bench, units=5)
    changes = {p: true_losses(frozen.problem, p) for p in bench.regret.every_plan(frozen.problem)}
    assert len(changes) == 3**5
    rows = bench.regret.regrets(frozen.problem, frozen.families, changes, n_trials=40, seeds=2)
    assert [row["seed"] for row in rows] == [0, 1] * (len(rows) // 2)
    assert len({row["max_loss"] for row in rows}) == len(rows) // 2 > 0
    for row in rows:
        allowed = [p for p, one in changes.items() if bench.store.as_evaluation(one).high <= row["max_loss"]]
        best = min(frozen.problem.time_us(plan) for plan in allowed)
        assert row["best_us"] == best
        assert row["regret"] == pytest.approx(row["found_us"] / best - 1.0)
        assert 0.0 <= row["regret"] <= 0.02
        assert row["evaluations"] <= 40


def test_some_layers_in_groups_make_a_problem_of_their_own(bench):
    frozen = frozen_problem(bench)
    groups = {"pair": ("layer1", "layer4"), "single": ("layer2",)}
    problem = bench.regret.sub_problem(frozen, groups, ("none", "int8dq"))
    assert [unit.layers for unit in problem.units] == list(groups.values())
    pair = problem.units[0].options[1]
    ones = [frozen.problem.units[index].options[1] for index in (1, 4)]
    assert (pair.scheme, pair.time_us) == ("int8dq", pytest.approx(sum(one.time_us for one in ones)))
    assert pair.bytes == sum(one.bytes for one in ones)
    assert problem.fixed_time_us == 0.0


def test_rank_correlation_shares_ranks_between_ties(bench):
    spearman = bench.accuracy.spearman
    assert spearman([1, 2, 3, 4], [10, 100, 1000, 10000]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 4.5, variances 4.5 and 5.
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5.0))
    assert math.isnan(spearman([1, 2], [1, 2]))


def test_random_plans_mix_all_schemes_at_every_share(bench):
    frozen = frozen_problem(bench, units=60)
    plans = bench.accuracy.random_plans(frozen, 200, seed=1)
    assert plans == bench.accuracy.random_plans(frozen, 200, seed=1)
    assert plans != bench.accuracy.random_plans(frozen, 200, seed=2)
    shares = sorted(sum(option != 0 for option in plan) / 60 for plan in plans)
    assert shares[20] < 0.2 < 0.4 < shares[100] < 0.6 < 0.8 < shares[180]
    assert {option for plan in plans for option in plan} == {0, 1, 2}


def test_the_reference_run_goes_on_until_it_has_its_plans(bench, tmp_path):
    frozen = frozen_problem(bench, units=12)
    begin = bench.ours.Start(frozen=frozen, tokens={})
    measured = Measured(bench, frozen.problem)
    found, searches = bench.ours.long_run(begin, measured, 8, tmp_path, n_trials=60, say=lambda _: None)
    assert len(found) == 60
    assert len(searches) > 1
    assert sum(one["new_plans"] for one in searches) >= 60
    before = len(measured.seen)
    again, _ = bench.ours.long_run(begin, measured, 8, tmp_path, n_trials=60, say=lambda _: None)
    assert again == found
    assert len(measured.seen) == before  # all of it is in the studies


def test_all_that_our_search_evaluates_is_counted(bench, tmp_path):
    frozen = frozen_problem(bench)
    begin = bench.ours.Start(frozen=frozen, tokens={"scores": 6144, "pairs": 25 * 1024})
    n_trials = bench.ours.affordable(begin, 8, 20)
    assert n_trials == (20 * 4096 - 6144 - 25 * 1024) // 4096 == 12
    measured = Measured(bench, frozen.problem)
    outcome = bench.ours.run(begin, measured, 8, tmp_path, n_trials=n_trials, max_loss=0.15, seed=0)
    assert outcome.tokens["plans"] == 4096 * len(outcome.result.points) == 4096 * len(set(measured.seen))
    assert outcome.evaluations <= 20
    plans = bench.ours.plans(frozen, outcome.result)
    assert plans[frozen.none] == (1.0, 0.0)
    assert all(0.0 < plan.ratio <= 1.0 for plan in plans.values())


def test_knapsack_problem_has_the_size_of_a_model_and_gaps_within_what_is_promised(bench):
    problem = bench.cost.knapsack_problem()
    assert len(problem.units) == 224
    assert {len(unit.options) for unit in problem.units} == {12}
    rows = bench.cost.knapsack(repeats=1)
    assert set(rows) == {"hull", "one limit", "two limits"}
    assert rows["one limit"]["gap"] <= 1e-3
    assert rows["two limits"]["gap"] <= 1e-2


def test_figures_say_what_was_met_and_leave_out_what_was_not_measured(bench):
    data = {"regret": 0.01, "spearman": 0.9, "evaluations": 49, "latency_error_median": float("nan")}
    data["nsga2_ratio"] = None
    lines = {line.split()[0]: line for line in bench.report.figures(data).splitlines()}
    assert set(lines) == set(data)
    assert lines["regret"].endswith("≤ 2.00%  met")
    assert lines["spearman"].endswith("≥ 0.950  MISSED")
    assert lines["evaluations"].endswith("≤ 49  met")
    assert lines["nsga2_ratio"].endswith("theirs: 0   met")
    assert lines["latency_error_median"].endswith("nan")


def test_the_command_prints_a_file_again_and_refuses_unknown_parts(tmp_path):
    path = tmp_path / "out.json"
    rows = [{"max_loss": 0.1, "best_us": 5.0, "found_us": 5.0, "regret": 0.0, "evaluations": 9, "plans": 256}]
    path.write_text(json.dumps({"regret": 0.0, "regret_block": rows}))
    script = str(FOLDER / "search.py")
    printed = subprocess.run([sys.executable, script, "--table", str(path)], capture_output=True, text=True, check=True)
    assert "9 of 256" in printed.stdout
    assert "0.00%   ≤ 2.00%  met" in printed.stdout
    refused = subprocess.run([sys.executable, script, "--parts", "speed"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "regret-block" in refused.stderr


def test_the_reference_file_holds_the_plans_its_gain_is_that_of(bench):
    for path in FOLDER.glob("search_reference.json"):
        content = json.loads(path.read_text())
        plans, uniform = ([bench.fronts.Plan(*one) for one in listed]
                          for listed in (content["plans"], content["uniform"].values()))  # fmt: skip
        assert bench.fronts.gain(plans, uniform) == pytest.approx(content["gain"], abs=1e-5)
        assert len(plans) == 300
        assert all(len(listed) >= 100 for listed in content["baselines"].values())
        shapes = content["times"]["pass_us"].values()
        assert {tuple(by_scheme) for by_scheme in shapes} == {tuple(next(iter(shapes)))}


def test_an_evaluation_keeps_its_rows(bench):
    found = bench.store.as_evaluation([0.1, 0.3, 0.2, 0.2])
    assert found.loss_delta == pytest.approx(0.2)
    assert found.low <= found.loss_delta <= found.high
    assert found.rows == pytest.approx((0.1, 0.3, 0.2, 0.2))
