import math

import pytest
import torch
from torch import nn

from autoq import losses
from autoq.additive import Additive
from autoq.errors import InputError
from autoq.evaluation import LossMeter, largest, loss_budget, paired
from autoq.losses import Batch, OutputKL, RelativeRMS, TokenNLL, as_batches, perplexity, token_nll
from autoq.phase_forms import PhaseForms
from autoq.scheme import Scheme
from autoq.shadow import PackedStore, Shadow, share_weights


class Logits(nn.Module):
    """Fixed logits, whatever the tokens."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, -1)


def test_perplexity_of_uniform_logits_is_the_vocabulary():
    rows = torch.randint(0, 50, (3, 7))
    assert perplexity(Logits(torch.zeros(50)), rows) == pytest.approx(50, rel=1e-6)


def test_perplexity_is_the_exponential_of_the_mean_over_predicted_tokens():
    torch.manual_seed(0)
    logits, rows = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    by_hand = [-torch.log_softmax(logits[r, t], 0)[rows[r, t + 1]].item() for r in range(2) for t in range(4)]
    assert math.exp(token_nll(logits, rows).double().mean()) == pytest.approx(math.exp(sum(by_hand) / 8), rel=1e-6)


@pytest.mark.parametrize("rows", [torch.zeros(3, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)])
def test_perplexity_refuses_rows_without_a_predicted_token(rows):
    with pytest.raises(InputError, match="token_rows"):
        perplexity(Logits(torch.zeros(5)), rows)


def test_batches_in_every_form():
    x = torch.ones(2, 3)
    assert [len(as_batches(form)) for form in (x, {"x": x}, [x, x], iter([x]), [(x, x)], lambda: {"x": x})] == [
        1, 1, 2, 1, 1, 1,
    ]  # fmt: skip
    assert Batch.of((x, x)).args == (x, x)
    assert Batch.of({"a": x}).kwargs == {"a": x}


@pytest.mark.parametrize("nothing", [[], torch.empty(0, 4), [torch.empty(0)], 7])
def test_empty_batches_are_refused(nothing):
    with pytest.raises(InputError, match="batches"):
        as_batches(nothing)


def test_kl_and_relative_rms_are_zero_for_the_model_itself_and_known_for_a_change():
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    batch = Batch.of(logits)
    kl = OutputKL()
    assert kl.losses({"logits": logits}, 0, batch).tolist() == [0.0, 0.0]
    changed = kl.losses({"logits": torch.tensor([[math.log(3.0), 0.0], [2.0, 0.0]])}, 0, batch)
    assert changed[0].item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), rel=1e-5)
    rms = RelativeRMS()
    rms.losses(torch.tensor([[3.0, 4.0]]), 0, batch)
    assert rms.losses(torch.tensor([[3.0, 4.5]]), 0, batch).item() == pytest.approx(0.1, rel=1e-6)


def test_token_nll_does_not_depend_on_how_many_rows_are_taken_at_once(monkeypatch):
    torch.manual_seed(1)
    logits, rows = torch.randn(6, 9, 13), torch.randint(0, 13, (6, 9))
    whole = token_nll(logits, rows)
    monkeypatch.setattr(losses, "_ROW_TOKENS", 9)
    assert torch.equal(token_nll(logits, rows), whole)


def test_a_paired_interval_covers_the_truth_nineteen_times_in_twenty():
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for trial in range(200):
        baseline = torch.randn(32, generator=generator)
        change = 0.1 + 0.05 * torch.randn(32, generator=generator)
        found = paired(baseline + change, baseline, seed=trial)
        inside += found.low <= 0.1 <= found.high
    assert 180 <= inside <= 199  # 95 %, less what a bootstrap of 32 samples misses


def test_pairing_removes_what_samples_have_in_common():
    torch.manual_seed(0)
    baseline = 100 * torch.randn(32)
    found = paired(baseline + 0.01, baseline)
    assert found.mean == pytest.approx(0.01, abs=1e-5)
    assert found.high - found.low < 1e-4


def test_the_perplexity_budget_is_a_ratio_and_others_are_as_documented():
    nll = loss_budget("nll", 3.0, max_degradation=0.05, max_increase=None)
    assert nll.max_increase == pytest.approx(math.log(1.05))
    assert loss_budget("kl", 0.0, max_degradation=0.05, max_increase=None).max_increase == 0.01
    assert loss_budget("eval_fn", 2.0, max_degradation=0.05, max_increase=None).max_increase == pytest.approx(0.1)
    assert loss_budget("eval_fn", 0.0, max_degradation=0.05, max_increase=0.3).max_increase == 0.3
    for baseline in (0.0, -1.0):
        with pytest.raises(InputError, match="max_increase"):
            loss_budget("eval_fn", baseline, max_degradation=0.05, max_increase=None)


def test_squares_add_up_on_the_additive_scale():
    scale = Additive(squares=True)
    assert scale.back(scale.to(0.03) + scale.to(0.04)) == pytest.approx(0.05)
    assert scale.back(scale.to(-0.03)) == pytest.approx(-0.03)
    assert scale.slope(0.03) == pytest.approx((scale.to(0.03 + 1e-6) - scale.to(0.03)) / 1e-6, rel=1e-4)
    assert Additive().to(0.3) == Additive().back(0.3) == 0.3
    assert Additive().slope(0.3) == 1.0


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8)).eval()


def test_a_shadow_shares_weights_changes_scheme_and_leaves_the_model_alone():
    model = small_model()
    store = PackedStore(model, ["0", "2"])
    shadow = Shadow(model, store)
    x = torch.randn(5, 64)
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(shadow.model(x), wanted)
        shadow.assign({"0": Scheme.parse("int4wo-hqq(group_size=64)")})
        assert not torch.equal(shadow.model(x), wanted)
        shadow.assign({})
        assert torch.equal(shadow.model(x), wanted)
    assert type(model[0]) is nn.Linear
    assert share_weights(model)[0].weight is model[0].weight


def test_the_store_packs_once_and_forgets_the_least_recently_used():
    model = small_model()
    from autoq import candidates

    int8 = candidates.parse("int8wo")
    store = PackedStore(model, ["0", "2"], limit_bytes=1)
    first = store.get("0", int8)
    assert store.get("0", int8) is first
    store.get("2", int8)
    assert store.get("0", int8) is not first
    assert store.taken({"0": int8.scheme, "2": int8.scheme}).keys() == {"0"}


def test_exact_products_leave_no_trace_and_agree_with_the_model():
    model = small_model().bfloat16()
    shadow = Shadow(model, PackedStore(model, ["0", "2"]))
    x = torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        with shadow.exact_products():
            exact = shadow.model(x)
        assert "forward" not in shadow.model[0].__dict__
        assert torch.allclose(exact.float(), model(x).float(), rtol=0.02, atol=0.01)


class Meter:
    """A LossMeter over a small model with eight samples in four batches."""

    def __init__(self, **arguments):
        self.model = small_model()
        self.batches = as_batches(list(torch.randn(4, 2, 64)))
        self.meter = LossMeter(
            Shadow(self.model, PackedStore(self.model, ["0", "2"])), RelativeRMS(), self.batches, **arguments
        )


def test_a_meter_measures_more_rows_at_the_higher_fidelity():
    meter = Meter().meter
    plan = {"0": Scheme.parse("fp6(format=e3m2)")}
    few, many = meter.difference(plan, 0), meter.difference(plan, 1)
    assert (few.samples, many.samples) == (2, 8)
    assert 0.01 < many.low < many.mean < many.high < 0.2


def test_fidelities_are_an_eighth_a_quarter_and_all_of_the_batches():
    def levels(count, **arguments):
        model = small_model()
        batches = as_batches(list(torch.randn(count, 2, 64)))
        return LossMeter(Shadow(model, PackedStore(model, ["0"])), RelativeRMS(), batches, **arguments).levels

    assert levels(8) == (1, 2, 8)
    assert levels(32) == (4, 8, 32)
    assert levels(5) == (1, 5)
    assert levels(1) == (1,)
    assert levels(8, eval_fn=lambda model: 0.0) == (8,)


def test_a_higher_fidelity_runs_only_the_batches_that_it_adds():
    made = Meter()
    meter, ran = made.meter, []
    meter.baseline()
    plan = {"0": Scheme.parse("fp6(format=e3m2)")}
    whole = LossMeter(meter.shadow, meter.metric, made.batches).losses(plan)
    losses = meter.metric.losses
    meter.metric.losses = lambda outputs, index, batch: ran.append(index) or losses(outputs, index, batch)
    assert torch.equal(meter.losses(plan, 0), whole[:2])
    assert torch.equal(meter.losses(plan, 1), whole)
    assert ran == [0, 1, 2, 3]
    meter.losses({"2": Scheme.parse("int8wo")}, 0)
    assert torch.equal(meter.losses(plan, 1), whole)
    assert ran == [0, 1, 2, 3, 0, 0, 1, 2, 3]


def test_the_rows_of_a_difference_are_the_pairs_and_at_most_64_means():
    torch.manual_seed(1)
    losses, baseline = torch.rand(10), torch.rand(10)
    assert paired(losses, baseline).rows == pytest.approx((losses.double() - baseline.double()).tolist())
    many, base = torch.rand(1000), torch.rand(1000)
    found = paired(many, base)
    assert len(found.rows) == 63
    assert found.rows[1] == pytest.approx((many - base)[16:32].double().mean().item(), abs=1e-7)
    assert sum(found.rows[:62]) * 16 + found.rows[62] * 8 == pytest.approx(1000 * found.mean)


def test_rows_of_a_part_are_the_first_rows_of_the_whole():
    torch.manual_seed(2)
    losses, baseline = torch.rand(500), torch.rand(500)
    whole, part = paired(losses, baseline), paired(losses[:130], baseline)
    assert len(whole.rows) == 63
    assert part.samples == 130
    assert part.rows == whole.rows[:16]
    assert part.mean == pytest.approx((losses - baseline)[:130].double().mean().item())


def test_batches_of_unequal_size_are_paired_with_their_own_samples():
    torch.manual_seed(3)
    model = small_model()
    batches = as_batches([torch.randn(rows, 64) for rows in (3, 1, 2, 2, 3, 1, 2, 1)])
    meter = LossMeter(Shadow(model, PackedStore(model, ["0", "2"])), RelativeRMS(), batches)
    plan = {"0": Scheme.parse("fp6(format=e3m2)")}
    found = [meter.difference(plan, level) for level in range(3)]
    assert [one.samples for one in found] == [3, 4, 15]
    assert found[0].rows == found[2].rows[:3]
    assert found[1].rows == found[2].rows[:4]


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_plan_that_breaks_the_model_has_an_infinite_loss(broken):
    meter = Meter().meter
    meter.baseline()
    losses = meter.metric.losses
    meter.metric.losses = lambda outputs, index, batch: losses(outputs, index, batch).index_fill(
        0, torch.tensor([0]), broken
    )
    found = meter.difference({"0": Scheme.parse("int8wo")})
    assert (found.mean, found.low, found.high, found.rows) == (math.inf, math.inf, math.inf, ())
    values = iter([1.0, 1.0, 1.0, broken, 1.0, 1.0])
    scalar = Meter(eval_fn=lambda model: next(values)).meter
    assert scalar.difference({"0": Scheme.parse("int8wo")}).high == math.inf


def test_a_baseline_from_an_earlier_run_is_used_instead_of_running_the_model():
    model = small_model()
    batches = as_batches(list(torch.randn(8, 2, 64)))
    loss = losses.UserLoss(lambda outputs, batch: outputs.square().mean(dim=1))

    def meter():
        return LossMeter(Shadow(model, PackedStore(model, ["0", "2"])), loss, batches)

    measured = meter()
    plan = {"2": Scheme.parse("int8wo")}
    expected = [measured.difference(plan, level) for level in range(3)]
    remembering = meter()
    remembering.remember(measured.baseline())
    ran = []
    remembering.shadow.model.register_forward_hook(lambda *_: ran.append(1))
    assert [remembering.difference(plan, level) for level in range(3)] == expected
    assert len(ran) == 8


class Counted(LossMeter):
    """Keeps the assignments that it ran the model under."""

    def losses(self, assignment, level=-1):
        self.ran = [*getattr(self, "ran", []), {layer: str(scheme) for layer, scheme in assignment.items()}]
        return super().losses(assignment, level)


def counted_meter(rows):
    model = small_model()
    shadow = Shadow(model, PackedStore(model, ["0", "2"]))
    batches = as_batches(list(torch.randn(4, 2, 64)))
    return Counted(shadow, RelativeRMS(), batches, forms=PhaseForms(rows=rows))


PHASES = {"decode": {"0": 1, "2": 1}, "prefill": {"0": 512, "2": 512}}


def test_a_plan_with_a_mix_has_a_loss_per_phase_and_the_larger_counts():
    meter = counted_meter(PHASES)
    few, many = (dict.fromkeys(("0", "2"), Scheme.parse(name)) for name in ("int8wo", "int8dq"))
    mix = dict.fromkeys(("0", "2"), Scheme.parse("int8mix(m_switch=32)"))
    by_phase = meter.by_phase(mix)
    assert list(by_phase) == ["decode", "prefill"]
    assert by_phase == {"decode": meter.difference(few), "prefill": meter.difference(many)}
    assert 0 < by_phase["decode"].mean < by_phase["prefill"].mean
    assert by_phase["decode"].high < by_phase["prefill"].high
    assert largest(by_phase) == by_phase["prefill"]
    # Its batches have two rows, which the kernels themselves would not round.
    assert meter.difference(mix) == by_phase["prefill"]


def test_a_plan_without_mixes_is_measured_once_and_a_mix_that_never_switches_too():
    for rows, scheme in ((PHASES, "int8dq"), ({"a": {"0": 32, "2": 40}, "b": {"0": 64, "2": 64}}, "int8mix")):
        meter = counted_meter(rows)
        plan = dict.fromkeys(("0", "2"), Scheme.parse(scheme))
        first, second = meter.by_phase(plan).values()
        assert first == second
        assert meter.ran == [{}, {"0": "int8dq", "2": "int8dq"}]  # the baseline, the plan
        assert not meter.forms.differ(plan)


def test_without_a_workload_a_mix_is_measured_on_one_row_and_on_many():
    meter = Meter().meter
    mix = {"0": Scheme.parse("int4mix(group_size=64,m_switch=128)")}
    assert meter.by_phase(mix) == {
        "few rows": meter.difference({"0": Scheme.parse("int4wo-hqq(group_size=64)")}),
        "many rows": meter.difference({"0": Scheme.parse("int4dq(group_size=64)")}),
    }


def test_a_scalar_eval_fn_is_repeated_and_a_vector_one_is_paired():
    calls = []

    def scalar(model):
        calls.append(model)
        return 1.0

    meter = Meter(eval_fn=scalar).meter
    assert meter.difference({}).samples == 3
    assert len(calls) == 6
    vector = Meter(eval_fn=lambda model: model[0](torch.ones(4, 64)).abs().mean(dim=1)).meter
    assert vector.difference({}).samples == 4


def test_a_nan_loss_is_refused_by_name():
    with pytest.raises(InputError, match=r"eval_fn.*NaN"):
        Meter(eval_fn=lambda model: math.nan).meter.baseline()
    meter = Meter()
    meter.model[2].bias.data.fill_(math.nan)
    with pytest.raises(InputError, match=r"relative_rms.*NaN"):
        meter.meter.baseline()
    assert TokenNLL().unit == "nats per token"
