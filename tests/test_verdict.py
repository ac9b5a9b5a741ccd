"""Which plan wins and what it says, where ``none`` on every layer is the unquantized model and where it is not."""

from types import SimpleNamespace

import pytest

from autoq.additive import Additive
from autoq.calibration import calibrate
from autoq.evaluation import LossBudget
from autoq.profiler import LatencyModel, Timing
from autoq.profiler.end_to_end import UNQUANTIZED
from autoq.scheme import NONE, Scheme
from autoq.search import Budget, Evaluation, Option, PlanPoint, Problem, SearchResult, Unit
from autoq.verdict import Evidence, choose, finished_plan, front_rows
from autoq.workload import LayerInfo, LinearCall, PhaseInfo, Workload

INT8 = Scheme(name="int8wo")
WORKLOAD = Workload(
    layers=(LayerInfo(name="fc", k=64, n=64, dtype="bfloat16", device="cpu", bias=False),),
    calls=(LinearCall(layer="fc", phase="forward", m=1, dtype="bfloat16", count=1),),
    phases=(PhaseInfo(name="forward"),),
)
ISOLATED = {("fc", NONE, "forward"): 6.0, ("fc", INT8, "forward"): 4.0}
OPTIONS = (
    Option(scheme="none", time_us=6.0, loss=0.0, bytes=90),
    Option(scheme="int8wo", time_us=4.0, loss=0.01, bytes=50),
)
PROBLEM = Problem(units=(Unit(name="fc", layers=("fc",), options=OPTIONS),))


def timing(us):
    return {"forward": Timing(median_us=us, low_us=us, high_us=us, repeats=3)}


def point(option):
    loss = OPTIONS[option].loss
    return PlanPoint(
        assignment=(option,),
        label=OPTIONS[option].scheme,
        source="uniform",
        predicted_loss=loss,
        time_us=OPTIONS[option].time_us,
        bytes=OPTIONS[option].bytes,
        evaluation=Evaluation(loss_delta=loss, low=loss, high=loss, samples=4),
        fidelity=0,
        full=True,
    )


def evidence(*, stock, none, int8, limits):
    """Times in microseconds; ``none=None`` where it is the unquantized model."""
    points = (point(0), point(1))
    times = {UNQUANTIZED: timing(stock), "0": timing(int8)}
    if none is not None:
        times["none"] = timing(none)
    return Evidence(
        search=SearchResult(
            points=points,
            pareto=points,
            finalists=points,
            refitted=PROBLEM,
            log_multipliers={},
            certificate=None,
            evaluations=2,
            study_name="s",
        ),
        finalists={"0": points[1]} | ({} if none is None else {"none": points[0]}),
        phase_losses={},
        times=times,
        limits=limits,
        budget=LossBudget(max_increase=0.02, baseline=1.0, text="little"),
        latency=LatencyModel(
            isolated_us=ISOLATED,
            fixed_us={"forward": 0.0},
            factors={},
            calls={"forward": 1.0},
            error={"forward": 0.0},
        ),
        workload=WORKLOAD,
        scale=Additive(),
        how={},
        none_label=UNQUANTIZED if none is None else "none",
        unquantized_bytes=90 if none is None else 70,  # a tied weight is packed once more
    )


LATENCY = Budget(max_loss=0.02)


@pytest.mark.parametrize(
    ("times", "limits", "choice", "layers"),
    [
        ((9.0, None, 4.0), LATENCY, "0", {"fc": INT8}),
        ((9.0, None, 9.5), LATENCY, None, {"fc": NONE}),
        ((9.0, 6.0, 4.0), LATENCY, "0", {"fc": INT8}),
        ((9.0, 6.0, 7.0), LATENCY, "none", {"fc": NONE}),
        ((9.0, 6.0, 4.0), Budget(max_loss=0.0), "none", {"fc": NONE}),
        ((5.0, 6.0, 7.0), LATENCY, None, {}),
        ((9.0, 6.0, 4.0), Budget(objective="memory", max_loss=0.0), None, {}),
        ((9.0, 6.0, 7.0), Budget(objective="memory", max_loss=0.0, max_time_us=8.0), "none", {"fc": NONE}),
        ((9.0, 6.0, 7.0), Budget(max_loss=0.0, max_bytes=80), None, {}),
    ],
)
def test_unquantized_weights_in_our_kernels_are_a_plan_like_any_other(times, limits, choice, layers):
    stock, none, int8 = times
    found = evidence(stock=stock, none=none, int8=int8, limits=limits)
    assert choose(found) == choice
    plan = finished_plan(found, choice, {}, {})
    assert plan.layers == layers
    measured, predicted = plan.provenance["measured"], plan.provenance["predicted"]
    assert measured["baseline_latency_us"] == stock
    assert measured["latency_us"] == {None: stock, "0": int8, "none": none}[choice]
    assert measured.get("none_latency_us") == measured["phases"]["forward"].get("none_us") == none
    assert measured["baseline_weight_bytes"] == (90 if none is None else 70)
    assert ("latency_us" in predicted) == (layers != {})
    rows = {row["label"]: row for row in front_rows(found, choice)}
    assert set(rows) == {"none", "int8wo"} | (set() if none is None else {"unquantized"})
    chosen = {None: "none" if none is None else "unquantized", "0": "int8wo", "none": "none"}[choice]
    assert [label for label, row in rows.items() if row["chosen"]] == [chosen]
    base = rows["none" if none is None else "unquantized"]
    assert base["latency_measured_us"] == stock
    assert base["weight_bytes"] == measured["baseline_weight_bytes"]
    assert base["latency_predicted_us"] == pytest.approx(6.0 * stock / (none or stock))


@pytest.mark.parametrize("none_is_stock", [True, False])
def test_the_latency_model_is_fitted_to_the_kernels_that_none_runs(tmp_path, none_is_stock):
    def time(plans, stage):
        asked.append(set(plans))
        known = {UNQUANTIZED: timing(29.0), "none": timing(26.0), "int8wo": timing(24.0)}
        return {label: known[label] for label in (UNQUANTIZED, *plans)}

    asked = []
    timer = SimpleNamespace(compile_arguments={}, time=time)
    schemes = [NONE, INT8]
    model = calibrate(timer, WORKLOAD, ISOLATED, schemes, none_is_stock=none_is_stock, identity={}, folder=tmp_path)
    assert asked == [{"int8wo"} if none_is_stock else {"none", "int8wo"}]
    assert model.request_us({}, ["fc"]) == pytest.approx(29.0 if none_is_stock else 26.0)
    assert model.request_us({"fc": INT8}, ["fc"]) == pytest.approx(24.0)
