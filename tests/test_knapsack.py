"""The knapsack against enumeration, and its bounds on problems of a model's size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autoq.errors import SearchError
from autoq.knapsack import Option, Problem, Unit, frontier, solve

LIMIT = {"loss": "max_loss", "time": "max_time_us", "bytes": "max_bytes"}


def small(seed: int, *, units: int = 6, options: int = 4) -> Problem:
    """Independent values; units have one to ``options`` options; every other seed has negative losses."""
    rng = np.random.default_rng(seed)
    lowest = -1.0 if seed % 2 else 0.0
    return Problem(
        units=tuple(
            Unit(
                name=f"u{u}",
                layers=(f"l{u}",),
                options=tuple(
                    Option(
                        scheme=f"s{s}",
                        time_us=rng.uniform(1, 10),
                        loss=rng.uniform(lowest, 5),
                        bytes=int(rng.integers(1, 100)),
                    )
                    for s in range(rng.integers(1, options + 1))
                ),
            )
            for u in range(units)
        ),
        fixed_time_us=3.0,
        fixed_bytes=7,
    )


def model_sized(seed: int, *, blocks: int = 32, schemes: int = 12) -> Problem:
    """A 7B model's shapes: time follows bytes, losses span decades and quadruple per bit, layers repeat."""
    rng = np.random.default_rng(seed)
    bits = np.linspace(16, 3, schemes)
    sizes = [4096 * 4096] * 4 + [4096 * 14336] * 3
    speed = 1 + 0.2 * np.cos(np.arange(schemes))
    units = []
    for u in range(7 * blocks):
        size, sensitivity = sizes[u % 7], 1e-4 * np.exp(rng.normal())
        options = tuple(
            Option(
                scheme=f"s{s}",
                time_us=float(size * bits[s] / 1.6e5 * speed[s]),
                loss=float(sensitivity * 4.0 ** (8 - bits[s]) * (1 + 0.3 * rng.normal())) if s else 0.0,
                bytes=int(size * bits[s] / 8),
            )
            for s in range(schemes)
        )
        units.append(Unit(name=f"u{u}", layers=(f"l{u}",), options=options))
    return Problem(units=tuple(units))


def enumerated(problem: Problem) -> dict[str, np.ndarray]:
    """Every plan's values, in the order of ``itertools.product``."""
    values = {}
    for metric, fixed in (("time", problem.fixed_time_us), ("loss", 0.0), ("bytes", problem.fixed_bytes)):
        total = np.array([float(fixed)])
        for unit in problem.units:
            row = [{"time": o.time_us, "loss": o.loss, "bytes": o.bytes}[metric] for o in unit.options]
            total = (total[:, None] + np.array(row)).ravel()
        values[metric] = total
    return values


@pytest.mark.parametrize(
    ("objective", "limited"),
    [
        ("time", ("loss",)),
        ("bytes", ("loss",)),
        ("loss", ("time",)),
        ("time", ("loss", "bytes")),
        ("loss", ("time", "bytes")),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_value_and_bound_enclose_the_enumerated_optimum(objective, limited):
    allowed = 1e-3 if len(limited) == 1 else 1e-2
    infeasible = 0
    for seed in range(200 if len(limited) == 1 else 60):
        problem = small(seed)
        values = enumerated(problem)
        rng = np.random.default_rng(1000 + seed)
        limits = {m: rng.uniform(values[m].min() - 0.5, np.median(values[m])) for m in limited}
        feasible = np.all([values[m] <= limit for m, limit in limits.items()], axis=0)
        call = {LIMIT[m]: limit for m, limit in limits.items()}
        if not feasible.any():
            infeasible += 1
            with pytest.raises(SearchError, match="nearest"):
                solve(problem, objective=objective, **call)
            continue
        best = values[objective][feasible].min()
        solution = solve(problem, objective=objective, **call)
        assert solution.bound <= best + 1e-9
        assert best - 1e-9 <= solution.value <= best + allowed * abs(best)
        assert problem.value(solution.assignment, objective) == solution.value
        for metric, limit in limits.items():
            assert problem.value(solution.assignment, metric) <= limit + 1e-9 * abs(limit)
    assert 0 < infeasible < 0.7 * seed


def test_frontier_is_the_convex_hull_of_all_plans():
    for seed in range(50):
        problem = small(seed, units=5)
        values = enumerated(problem)
        points = frontier(problem)
        times, losses = np.array([p.time_us for p in points]), np.array([p.loss for p in points])
        assert (np.diff(times) > 0).all()
        assert (np.diff(losses) < 0).all()
        assert times[0] == pytest.approx(values["time"].min())
        assert losses[-1] == pytest.approx(values["loss"].min())
        # Convex, and no plan lies below it: together that is the hull.
        slopes = np.diff(losses) / np.diff(times)
        assert (np.diff(slopes) > -1e-9).all()
        inside = values["time"] <= times[-1]
        on_hull = np.interp(values["time"][inside], times, losses)
        assert (values["loss"][inside] >= on_hull - 1e-9).all()


def test_frontier_in_bytes_changes_one_unit_at_a_time():
    problem = model_sized(0, blocks=2)
    points = frontier(problem, objective="bytes")
    assert (np.diff([p.bytes for p in points]) > 0).all()
    for a, b in itertools.pairwise(points):
        assert sum(i != j for i, j in zip(a.assignment, b.assignment, strict=True)) == 1


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("seed", [0, 1])
def test_gap_at_the_size_of_a_model(seed, share):
    problem = model_sized(seed)
    points = frontier(problem)
    point = points[int(share * len(points))]
    slack = point.loss + 3e-3 * abs(point.loss)
    assert solve(problem, objective="time", max_loss=slack).gap <= 1e-3
    loss = solve(problem, objective="loss", max_time_us=1.0007 * point.time_us)
    assert loss.gap <= 1e-3
    assert loss.value <= point.loss
    two = solve(problem, objective="time", max_loss=slack, max_bytes=1.01 * point.bytes)
    assert two.gap <= 1e-2
    assert solve(problem, objective="loss", max_time_us=1.05 * point.time_us, max_bytes=0.97 * point.bytes).gap <= 1e-2


def test_a_limit_met_exactly_is_met():
    problem = small(3)
    for assignment in itertools.islice(itertools.product(*(range(len(u.options)) for u in problem.units)), 50):
        limit = problem.loss(assignment)
        solution = solve(problem, objective="time", max_loss=limit)
        assert solution.value <= problem.time_us(assignment) + 1e-4 * solution.value


def test_equal_layers_do_not_multiply_states():
    option = Unit(
        name="x",
        layers=("x",),
        options=tuple(
            Option(scheme=f"s{i}", time_us=time_us, loss=loss, bytes=1)
            for i, (time_us, loss) in enumerate([(1.0, 0.0), (0.7, 0.1), (0.61, 0.3), (0.3, 0.9)])
        ),
    )
    units = tuple(Unit(name=f"u{i}", layers=(f"l{i}",), options=option.options) for i in range(224))
    assert solve(Problem(units=units), objective="time", max_loss=33.33).gap <= 1e-3


def test_without_limits_ties_go_to_the_lower_loss():
    unit = Unit(
        name="u",
        layers=("l",),
        options=(
            Option(scheme="a", time_us=1.0, loss=0.5, bytes=1),
            Option(scheme="b", time_us=1.0, loss=0.1, bytes=9),
        ),
    )
    solution = solve(Problem(units=(unit,)), objective="time")
    assert solution.assignment == (1,)
    assert solution.gap == 0


def test_limit_on_the_objective_itself():
    problem = small(1)
    best = solve(problem, objective="time", max_loss=10.0)
    assert solve(problem, objective="time", max_loss=10.0, max_time_us=best.value) == best
    with pytest.raises(SearchError, match="time of at most"):
        solve(problem, objective="time", max_loss=10.0, max_time_us=0.9 * best.bound)


def test_infeasible_names_the_nearest_value():
    problem = small(0)
    least = enumerated(problem)["loss"].min()
    with pytest.raises(SearchError, match=f"got {least:.6g} as the nearest"):
        solve(problem, objective="time", max_loss=least - 1)
    with pytest.raises(SearchError, match="must be a number"):
        solve(problem, objective="time", max_loss=float("nan"))


def test_assignments_and_schemes_are_inverse():
    problem = small(4)
    assignment = tuple(len(unit.options) - 1 for unit in problem.units)
    assert problem.assignment(problem.schemes(assignment)) == assignment
    assert problem.uniform("s3", fallback="s0") == tuple(3 if len(u.options) == 4 else 0 for u in problem.units)
    with pytest.raises(SearchError, match="Offered: s0"):
        problem.uniform("int8wo")
    with pytest.raises(SearchError, match="one valid option index per unit"):
        problem.loss((0,))


@pytest.mark.parametrize(
    ("build", "rule"),
    [
        (lambda: Option(scheme="a", time_us=float("inf"), loss=0.0, bytes=1), "finite"),
        (lambda: Option(scheme="a", time_us=-1.0, loss=0.0, bytes=1), "negative"),
        (lambda: Unit(name="u", layers=("l",), options=()), "at least one"),
        (lambda: Problem(units=()), "at least one unit"),
        (lambda: Problem(units=small(0).units * 2), "decided once"),
    ],
)
def test_impossible_values_are_refused(build, rule):
    with pytest.raises(SearchError, match=rule):
        build()
