"""Scores and measured losses of plans whose arithmetic depends on the phase."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autoq import candidates, pairs, sensitivity
from autoq.additive import Additive
from autoq.errors import ModelError
from autoq.evaluation import Difference, LossMeter
from autoq.judging import Judge
from autoq.losses import RelativeRMS, TokenNLL, as_batches
from autoq.phase_forms import PhaseForms
from autoq.search import Budget, Evaluation, Option, PlanPoint, Problem, SearchResult, Unit
from autoq.shadow import PackedStore, Shadow

IDENTITY = {"weights": "w", "metric": "m"}


def judge(folder, schemes, rows, *, model=None):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48)).eval()
    shadow = Shadow(model, PackedStore(model, ["0", "2"]))
    meter = LossMeter(shadow, RelativeRMS(), as_batches(list(torch.randn(4, 8, 64))), forms=PhaseForms(rows=rows))
    meter.baseline()
    return Judge(
        model=model,
        meter=meter,
        candidates=[candidates.parse(one) for one in schemes],
        identity=IDENTITY,
        folder=folder,
        seed=0,
        scale=Additive(),
    )


def by_scheme(rows):
    return {(row["layer"], row["scheme"]): row for row in rows}


def test_a_mix_is_scored_as_what_it_is_on_the_rows_of_the_largest_phase(tmp_path, monkeypatch):
    rows = {"prefill": {"0": 512, "2": 1}, "decode": {"0": 1, "2": 1}}
    one = judge(tmp_path, ["none", "int8mix", "int8wo", "int8dq"], rows)
    found = by_scheme(one.scores(lambda *_: None))
    assert len(found) == 6
    assert found["0", "int8mix(m_switch=32)"] == found["0", "int8dq"] | {"scheme": "int8mix(m_switch=32)"}
    assert found["2", "int8mix(m_switch=32)"] == found["2", "int8wo"] | {"scheme": "int8mix(m_switch=32)"}
    assert found["0", "int8dq"]["score"] > found["0", "int8wo"]["score"]
    monkeypatch.setattr(sensitivity, "scores", None)  # what was scored serves other phases too
    again = judge(tmp_path, ["int8mix(m_switch=8)"], {"prefill": {"0": 1, "2": 512}})
    assert (
        by_scheme(again.scores(lambda *_: None))["2", "int8mix(m_switch=8)"]["score"] == found["2", "int8dq"]["score"]
    )


def test_a_loss_is_known_again_unless_a_mix_means_something_else(tmp_path):
    def fingerprint(schemes, m):
        return judge(tmp_path, schemes, {"forward": {"0": m, "2": m}}).fingerprint

    plain = hashlib.sha256(json.dumps(IDENTITY, sort_keys=True).encode()).hexdigest()[:16]
    assert fingerprint(["int8wo", "int8dq"], 1) == fingerprint(["int8wo"], 512) == plain
    assert fingerprint(["int8mix"], 512) == fingerprint(["int8mix"], 64) != fingerprint(["int8mix"], 31)


# -- one layer at a time ----------------------------------------------------------------------------------------------


def measured_problem(rows):
    """A problem with the rows' scores; times fall with the order of the schemes."""
    layers = {one["layer"] for one in rows}
    return Problem(
        units=tuple(
            Unit(
                name=layer,
                layers=(layer,),
                options=(
                    Option(scheme="none", time_us=9.0, loss=0.0, bytes=9),
                    *(
                        Option(scheme=one["scheme"], time_us=4.0 - number, loss=one["score"], bytes=1)
                        for number, one in enumerate(one for one in rows if one["layer"] == layer)
                    ),
                ),
            )
            for layer in sorted(layers)
        )
    )


def test_pairs_are_measured_once_whatever_the_budget(tmp_path, monkeypatch):
    rows = {"forward": {"0": 512, "2": 512}}
    one = judge(tmp_path, ["none", "int8mix", "int8dq", "fp6(format=e3m2)"], rows)
    scores = one.scores(lambda *_: None)
    assert {row.get("measured") for row in scores} == {None}
    steps = []
    found = one.measured_pairs(measured_problem(scores), BUDGET, scores, lambda *step: steps.append(step), count=3)
    assert [(row["layer"], row["scheme"], row["score"]) for row in found] == [
        (row["layer"], row["scheme"], row["score"]) for row in scores
    ]
    known = {pair: row["measured"] for pair, row in by_scheme(found).items() if row["measured"] is not None}
    forms = {(layer, "int8dq" if scheme.startswith("int8mix") else scheme) for layer, scheme in known}
    assert [step[1:] for step in steps] == [(done, len(forms)) for done in range(1, len(forms) + 1)]
    assert 1 <= len(forms) <= 3
    for row in found:
        if row["measured"] is not None:
            assert row["measured_low"] <= row["measured"] <= row["measured_high"]
            assert 0.5 < row["measured"] / row["score"] < 2.0
    mixed = {layer: row for (layer, scheme), row in by_scheme(found).items() if scheme.startswith("int8mix")}
    assert all(row["measured"] == by_scheme(found)[layer, "int8dq"]["measured"] for layer, row in mixed.items())

    monkeypatch.setattr(pairs, "measure", None)  # another budget, another run: nothing is measured again
    again = judge(tmp_path, ["none", "int8mix", "int8dq", "fp6(format=e3m2)"], rows)
    same = again.measured_pairs(measured_problem(scores), BUDGET, again.scores(lambda *_: None), print, count=3)
    assert same == found
    other = Budget(objective="loss", max_time_us=100.0)
    kept = again.measured_pairs(measured_problem(scores), other, scores, print, count=len(forms))
    assert kept == found


def test_new_scores_keep_what_was_measured(tmp_path):
    rows = {"forward": {"0": 512, "2": 512}}
    one = judge(tmp_path, ["none", "int8dq"], rows)
    scores = one.scores(lambda *_: None)
    found = one.measured_pairs(measured_problem(scores), BUDGET, scores, lambda *_: None)
    assert all(row["measured"] is not None for row in found)
    more = judge(tmp_path, ["none", "int8dq", "int8wo"], rows)
    kept = by_scheme(more.scores(lambda *_: None))
    assert {pair: row["measured"] for pair, row in kept.items() if row["scheme"] == "int8dq"} == {
        pair: row["measured"] for pair, row in by_scheme(found).items()
    }


def test_the_tokens_of_measured_pairs_are_counted(tmp_path):
    class Embedded(nn.Sequential):
        def forward(self, input_ids):
            return {"logits": super().forward(input_ids)}

    torch.manual_seed(0)
    model = Embedded(nn.Embedding(32, 64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    batches = as_batches([{"input_ids": torch.randint(32, (4, 200))} for _ in range(3)])
    layers = ["1", "3"]
    shadow = Shadow(model, PackedStore(model, layers))
    forms = PhaseForms(rows={"forward": dict.fromkeys(layers, 1)})
    made = Judge(
        model=model,
        meter=LossMeter(shadow, TokenNLL(), batches, forms=forms),
        candidates=[candidates.parse("int8wo")],
        identity=IDENTITY,
        folder=tmp_path,
        seed=0,
        scale=Additive(),
    )
    scores = made.scores(lambda *_: None)
    assert made.tokens["pairs"] == 0
    made.measured_pairs(measured_problem(scores), BUDGET, scores, lambda *_: None)
    assert made.tokens["pairs"] == 3 * 1200  # six rows, for two pairs and the unquantized model


def test_a_model_that_does_not_run_in_float32_goes_by_its_scores(tmp_path, monkeypatch):
    one = judge(tmp_path, ["none", "int8dq"], {"forward": {"0": 1, "2": 1}})
    scores = one.scores(lambda *_: None)

    def refuse(*_, **__):
        raise ModelError("the model runs in float32")

    monkeypatch.setattr(pairs, "measure", refuse)
    found = one.measured_pairs(measured_problem(scores), BUDGET, scores, lambda *_: None)
    assert [row["score"] for row in found] == [row["score"] for row in scores]
    assert all(row["measured"] is None for row in found)
    assert "float32" in one.notes[0]


# -- finalists --------------------------------------------------------------------------------------------------------

PROBLEM = Problem(
    units=(
        Unit(
            name="0",
            layers=("0",),
            options=tuple(
                Option(scheme=scheme, time_us=time, loss=0.0, bytes=1)
                for scheme, time in (("none", 9.0), ("int8mix(m_switch=32)", 1.0), ("int8wo", 2.0))
            ),
        ),
    )
)
BUDGET = Budget(objective="latency", max_loss=0.03)


def evaluation(loss):
    return Evaluation(loss_delta=loss, low=loss - 0.001, high=loss + 0.001, samples=8)


def point(option, loss):
    return PlanPoint(
        assignment=(option,),
        label="",
        source="uniform",
        predicted_loss=0.0,
        time_us=PROBLEM.time_us((option,)),
        bytes=1,
        evaluation=evaluation(loss),
        fidelity=1,
        full=True,
    )


def search_result(*points):
    return SearchResult(
        points=points,
        pareto=points,
        finalists=points,
        refitted=PROBLEM,
        log_multipliers={},
        certificate=None,
        evaluations=0,
        study_name="",
    )


def meter_giving(loss):
    """A meter that notes what it measures, and a judge of it; two phases, on either side of 32 rows."""
    measured = []

    def difference(plan):
        measured.append({layer: str(scheme) for layer, scheme in plan.items()})
        return Difference(mean=loss, low=loss - 0.001, high=loss + 0.001, samples=8)

    forms = PhaseForms(rows={"prefill": {"0": 64}, "decode": {"0": 1}})
    meter = SimpleNamespace(forms=forms, difference=difference)
    made = Judge(model=None, meter=meter, candidates=(), identity={}, folder=None, seed=0, scale=Additive())
    return made, measured


@pytest.mark.parametrize(("decode", "counts"), [(0.005, 0.01), (0.05, 0.05)])
def test_a_finalist_counts_with_its_worst_phase(decode, counts):
    mixed, wo = point(1, 0.01), point(2, 0.02)
    made, measured = meter_giving(decode)
    found, losses = made.in_every_phase(search_result(mixed, wo), BUDGET)
    assert measured == [{"0": "int8wo"}]  # decoding only: the search has measured the other phase
    assert losses == {(1,): {"prefill": evaluation(0.01), "decode": evaluation(decode)}}
    assert found.points[0] == found.finalists[0]
    assert found.points[0].evaluation == evaluation(counts)
    assert (found.points[0].excess(BUDGET) == 0) == (counts < 0.03)
    assert found.points[1] is wo
    assert [one.assignment for one in found.pareto] == ([(1,)] if counts < 0.02 else [(1,), (2,)])


def test_finalists_without_mixes_are_left_as_they_are():
    made, measured = meter_giving(1.0)
    result = search_result(point(0, 0.0), point(2, 0.02))
    assert made.in_every_phase(result, BUDGET) == (result, {})
    assert measured == []
