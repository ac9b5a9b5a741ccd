"""One layer quantized at a time: what is measured, which pairs are worth it, and what they say of the others."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from autoq import estimates, pairs
from autoq.errors import ModelError
from autoq.knapsack import Option, Problem, Unit
from autoq.losses import OutputKL, RelativeRMS, TokenNLL, UserLoss, as_batches
from autoq.precise import Precise
from autoq.scheme import Scheme
from autoq.search_values import Budget
from autoq.shadow import PackedStore, Shadow

INT4 = Scheme.parse("int4wo-hqq(group_size=64)")
INT8 = Scheme.parse("int8wo")
LAYERS = [f"model.layers.{block}.mlp.{role}" for block in range(3) for role in ("up_proj", "down_proj")] + ["lm_head"]


def language_model(dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def text(rows, length=65):
    return as_batches({"input_ids": torch.randint(128, (rows, length), generator=torch.Generator().manual_seed(0))})


def measured(model, pairs_, batches=None, metric=None):
    store = PackedStore(model, LAYERS if hasattr(model, "model") else ["0", "2"])
    return pairs.measure(model, store, metric or TokenNLL(), batches or text(4), pairs_)


def test_a_pair_is_the_divergence_with_that_layer_alone_quantized():
    model, batch = language_model(), text(4)[0]
    found = measured(model, [(layer, INT4) for layer in LAYERS])
    assert len(found) == len(LAYERS)
    shadow = Shadow(model, PackedStore(model, LAYERS))
    with torch.no_grad():
        before = functional.log_softmax(batch.call(model).logits[:, :-1], dim=-1)
        for (layer, scheme), loss in found.items():
            shadow.assign({layer: Scheme.parse(scheme)})
            now = functional.log_softmax(batch.call(shadow.model).logits[:, :-1], dim=-1)
            divergence = functional.kl_div(now, before, log_target=True, reduction="none").sum(dim=-1)
            assert loss.mean == pytest.approx(divergence.mean().item(), rel=1e-4)
            assert 0 < loss.low < loss.mean < loss.high
            assert loss.samples == 4  # 64 predictions of each row


def test_pairs_measured_together_are_those_measured_alone():
    model = language_model()
    wanted = [("lm_head", INT8), ("model.layers.2.mlp.up_proj", INT4), ("model.layers.0.mlp.down_proj", INT8)]
    together = measured(model, wanted)
    assert list(together) == [(layer, str(scheme)) for layer, scheme in reversed(wanted)]
    for pair in wanted:
        assert measured(model, [pair]) == {(pair[0], str(pair[1])): together[pair[0], str(pair[1])]}


def test_a_bfloat16_model_is_measured_as_exactly_as_a_float32_one():
    model = language_model(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    wanted = [(layer, INT8) for layer in LAYERS]
    low, high = measured(model, wanted), measured(exact, wanted)
    for pair, loss in high.items():
        assert low[pair].mean == pytest.approx(loss.mean, rel=0.02)
    # Rounding alone, which is not what a layer costs, is of the same size in the model's own arithmetic.
    batch = text(4)[0]
    with torch.no_grad():
        now = functional.log_softmax(batch.call(model).logits[:, :-1].float(), dim=-1)
        before = functional.log_softmax(batch.call(exact).logits[:, :-1], dim=-1)
        rounding = functional.kl_div(now, before, log_target=True, reduction="none").sum(dim=-1).mean().item()
    assert rounding > 0.5 * min(loss.mean for loss in high.values())


def test_the_model_is_left_as_it_was():
    model = language_model(torch.bfloat16).train()
    before = {name: (one.data_ptr(), one.dtype) for name, one in model.named_parameters()}
    measured(model, [("lm_head", INT4)])
    assert {name: (one.data_ptr(), one.dtype) for name, one in model.named_parameters()} == before
    assert model.training
    assert not any("forward" in one.__dict__ or one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def test_the_exact_copy_shares_layers_and_embeddings_and_converts_the_rest():
    model = language_model(torch.bfloat16)
    precise = Precise(model, PackedStore(model, LAYERS))
    parameters = dict(precise.model.named_parameters())
    assert parameters["model.embed_tokens.weight"] is model.model.embed_tokens.weight
    assert precise.model.lm_head.weight is model.lm_head.weight
    assert precise.model.model.layers[1].mlp.up_proj.weight is model.model.layers[1].mlp.up_proj.weight
    assert parameters["model.norm.weight"].dtype == torch.float32
    left_out = "model.layers.0.self_attn.q_proj.weight"  # not in the store
    assert parameters[left_out] is dict(model.named_parameters())[left_out]
    with pytest.raises(RuntimeError), precise.quantized("lm_head", INT4):
        precise.model.lm_head(torch.zeros(1, 3))
    assert "packed" not in precise.model.lm_head.forward.keywords


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 48)).to(dtype).eval()


def test_other_models_are_measured_by_their_metric_on_the_scale_of_its_scores():
    inputs = as_batches(list(torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(0))))
    model = small()
    shadow = Shadow(model, PackedStore(model, ["0", "2"]))
    shadow.assign({"2": INT4})
    metric = RelativeRMS()
    with torch.no_grad():
        for index, batch in enumerate(inputs):
            metric.losses(batch.call(model), index, batch)
        rms = torch.cat([metric.losses(batch.call(shadow.model), i, batch) for i, batch in enumerate(inputs)])
    found = measured(model, [("2", INT4)], inputs, RelativeRMS())["2", str(INT4)]
    assert found.mean == pytest.approx(rms.square().mean().item(), rel=1e-4)
    assert found.samples == 32
    own = UserLoss(lambda outputs, given: (outputs - given[:, :48]).square().mean(dim=1))
    with torch.no_grad():
        change = [own.losses(one.call(shadow.model), 0, one) - own.losses(one.call(model), 0, one) for one in inputs]
    found = measured(model, [("2", INT4)], inputs, own)["2", str(INT4)]
    assert found.mean == pytest.approx(torch.cat(change).mean().item(), rel=1e-3)
    low = as_batches([one.given.bfloat16() for one in inputs])
    again = measured(small(torch.bfloat16), [("2", INT4)], low, OutputKL())
    assert again["2", str(INT4)].mean > 0


class Casting(nn.Sequential):
    def forward(self, x):
        return self[0](x.bfloat16() @ self[1].weight.diag()[:64])


def test_a_model_that_does_not_run_in_float32_is_refused():
    model = Casting(nn.Linear(96, 48), nn.LayerNorm(96), nn.Linear(96, 48)).bfloat16()
    assert model(torch.randn(4, 64).bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ModelError, match="float32"):
        measured(model, [("0", INT4)], as_batches(torch.randn(4, 64).bfloat16()), RelativeRMS())


def test_a_pair_whose_loss_is_no_number_is_left_out():
    calls = []

    def loss(outputs, given):
        calls.append(outputs)
        return outputs[:, 0] * (math.nan if len(calls) == 2 else 1.0)

    found = measured(small(), [("0", INT4), ("2", INT4)], as_batches(torch.randn(4, 64)), UserLoss(loss))
    assert len(calls) == 3
    assert [layer for layer, _ in found] == ["2"]


def test_a_model_that_asserts_its_dtype_is_refused():
    class Strict(nn.Sequential):
        def forward(self, x):
            assert x.dtype == torch.bfloat16
            return super().forward(x)

    model = Strict(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48)).bfloat16()
    with pytest.raises(ModelError, match=r"float32.*AssertionError"):
        measured(model, [("0", INT4)], as_batches(torch.randn(4, 64).bfloat16()), RelativeRMS())


def test_a_model_that_would_be_held_twice_is_refused():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 8)
            self.experts = nn.Parameter(torch.zeros(4, 64, 64))

    model = Experts().bfloat16()
    with pytest.raises(ModelError, match="twice"):
        Precise(model, PackedStore(model, ["linear"]))


def test_long_rows_are_cut():
    ids = torch.arange(6000).view(2, 3000)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position": torch.arange(3000)}
    (found,), count = pairs.sample(as_batches([batch]), TokenNLL(), 1024)
    assert count == 1024
    assert torch.equal(found.kwargs["input_ids"], ids[:1, :1024])
    assert found.kwargs["attention_mask"].shape == (1, 1024)
    assert torch.equal(found.kwargs["position"], torch.arange(1024))


def test_the_sample_is_the_first_whole_rows():
    batches = as_batches([{"input_ids": torch.arange(n * 300).view(n, 300), "flag": True} for n in (4, 4)])
    for tokens, rows in ((900, [3]), (1024, [4]), (1200, [4]), (1500, [4, 1]), (9999, [4, 4])):
        found, count = pairs.sample(batches, TokenNLL(), tokens)
        assert [len(one.kwargs["input_ids"]) for one in found] == rows
        assert count == 300 * sum(rows)
        assert all(one.kwargs["flag"] for one in found)
        assert all(torch.equal(a.kwargs["input_ids"], b.kwargs["input_ids"][: len(a.kwargs["input_ids"])])
                   for a, b in zip(found, batches, strict=False))  # fmt: skip
    assert pairs.sample(batches * 3, RelativeRMS()) == ((batches * 3)[: pairs.BATCHES], 0)


# -- which pairs ------------------------------------------------------------------------------------------------------


def problem(units):
    """Units of name → {scheme: (time, loss)}; bytes are ten times the time."""
    return Problem(
        units=tuple(
            Unit(
                name=name,
                layers=(name,),
                options=tuple(
                    Option(scheme=scheme, time_us=time, loss=loss, bytes=int(10 * time))
                    for scheme, (time, loss) in options.items()
                ),
            )
            for name, options in units.items()
        )
    )


def rows_of(problem_):
    return [
        {"layer": layer, "scheme": option.scheme, "score": option.loss}
        for unit in problem_.units
        for layer in unit.layers
        for option in unit.options
        if option.loss
    ]


# A unit gains 10 µs for the loss that its name says, in thousandths.
UNITS = {str(loss): {"none": (20.0, 0.0), "int4": (10.0, loss / 1000)} for loss in (1, 2, 4, 8, 16, 32, 64, 128, 256)}


@pytest.mark.parametrize(
    ("budget", "closest"),
    [
        (Budget(max_loss=0.02), "16"),  # 1 + 2 + 4 + 8 thousandths are in, with 16 more they are not
        (Budget(max_loss=0.2), "128"),
        (Budget(objective="memory", max_loss=0.02), "16"),
        (Budget(objective="loss", max_time_us=135.0), "16"),  # five layers are quantized, four would be too slow
        (Budget(objective="loss", max_bytes=1350), "16"),
    ],
)
def test_pairs_near_the_price_of_the_limit_come_first(budget, closest, monkeypatch):
    monkeypatch.setattr(pairs, "_LIMIT_SHARES", (1.0,))
    made = problem(UNITS)
    found = pairs.close(made, budget, rows_of(made))
    assert len(found) == len(UNITS)
    assert found[0] == (closest, "int4")
    assert found[-1] in {("1", "int4"), ("256", "int4")}


def test_what_is_at_stake_counts():
    units = {
        "large": {"none": (2000.0, 0.0), "int4": (1000.0, 1.0)},
        "small": {"none": (2.0, 0.0), "int4": (1.0, 0.001)},
        "edge": {"none": (20.0, 0.0), "int4": (10.0, 0.01)},
    }
    found = pairs.close(problem(units), Budget(max_loss=0.5), rows_of(problem(units)))
    assert found == [("large", "int4"), ("edge", "int4"), ("small", "int4")]


def test_every_scheme_has_a_few_pairs_also_one_that_never_wins():
    units = {
        f"layer{i}": {
            "none": (20.0, 0.0),
            "good": (10.0 + i / 100, 0.01),
            "fine": (12.0 + i / 100, 0.006),
            "bad": (19.0, 5.0 + i / 10),
        }
        for i in range(20)
    }
    made = problem(units)
    found = pairs.close(made, Budget(max_loss=0.1), rows_of(made), 12)
    assert len(found) == len(set(found)) == 12
    count = {scheme: [pair[1] for pair in found].count(scheme) for scheme in ("good", "fine", "bad", "none")}
    assert count["bad"] == 3
    assert count["none"] == 0
    assert min(count["good"], count["fine"]) >= 3
    roles = {f"layer{i}": f"block{i}.{'qkv'[i % 3]}" for i in range(20)}
    named = replace(made, units=tuple(replace(one, layers=(roles[one.name],)) for one in made.units))
    spread = pairs.close(named, Budget(max_loss=0.1), rows_of(named), 9)
    assert {(layer[-1], scheme) for layer, scheme in spread} == {(a, b) for a in "qkv" for b in ("good", "fine", "bad")}
    few = pairs.close(made, Budget(max_loss=0.1), rows_of(made), 3)
    assert sorted(scheme for _, scheme in few) == ["bad", "fine", "good"]
    assert pairs.close(made, Budget(max_loss=0.1), rows_of(made), 12) == found


def test_a_unit_is_measured_at_its_most_sensitive_layer():
    options = (Option(scheme="none", time_us=2, loss=0, bytes=1), Option(scheme="int4", time_us=1, loss=0.3, bytes=1))
    made = Problem(units=(Unit(name="qkv", layers=("q", "k", "v"), options=options),))
    scores = [
        {"layer": layer, "scheme": "int4", "score": score}
        for layer, score in zip("qkv", (0.1, 0.15, 0.05), strict=True)
    ]
    assert pairs.close(made, Budget(max_loss=0.2), scores) == [("k", "int4")]


def test_a_unit_with_nothing_to_decide_comes_last():
    units = {"fixed": {"int4": (10.0, 0.016)}, **{name: UNITS[name] for name in ("8", "16", "32")}}
    made = problem(units)
    for budget in (Budget(max_loss=0.05), Budget(max_loss=1.0), Budget(max_loss=0.0), Budget(max_bytes=10**6)):
        found = pairs.close(made, budget, rows_of(made))
        assert len(found) == 4
        assert found[-1] == ("fixed", "int4")
    alone = problem({"fixed": units["fixed"]})
    assert pairs.close(alone, Budget(max_loss=0.1), rows_of(alone)) == [("fixed", "int4")]


# -- what they say of others ------------------------------------------------------------------------------------------


def row(layer, scheme, score, measured_=None, spread=1.0):
    """A row whose interval is a factor each way."""
    low, high = (None, None) if measured_ is None else (measured_ / spread, measured_ * spread)
    return {
        "layer": layer,
        "scheme": scheme,
        "score": score,
        "measured": measured_,
        "measured_low": low,
        "measured_high": high,
    }


def blocks(ratios, count=40, scheme="int4"):
    """Measured rows of ``count`` blocks: role → measured over score."""
    return [row(f"{i}.{role}", scheme, 0.1, 0.1 * ratio) for i in range(count) for role, ratio in ratios.items()]


def test_unmeasured_rows_are_scaled_by_the_ratio_of_their_role():
    rows = [*blocks({"q": 0.5, "v": 2.0}), row("9.q", "int8", 1.0), row("9.v", "fp6", 1.0), row("9.other", "fp6", 1.0)]
    found = estimates.calibrated(rows)
    assert found["3.q", "int4"] == 0.05
    assert found["9.q", "int8"] == pytest.approx(0.5, rel=0.1)
    assert found["9.v", "fp6"] == pytest.approx(2.0, rel=0.1)
    assert found["9.other", "fp6"] == pytest.approx(1.0, rel=0.1)


def test_a_few_pairs_move_their_role_part_of_the_way():
    moved = []
    for count in (0, 1, 3, 30):
        rows = [*blocks({"q": 1.0}), *blocks({"v": 2.0}, count), row("30.v", "int4", 1.0)]
        moved.append(estimates.calibrated(rows)["30.v", "int4"])
    assert moved[0] == pytest.approx(1.0, rel=1e-9)
    assert moved[0] < moved[1] < moved[2] < moved[3]
    assert moved[3] == pytest.approx(2.0, rel=0.1)
    assert 1.2 < moved[1] < 1.8


def test_what_fades_on_its_way_through_the_model_is_seen():
    fading = [math.exp(0.05 * i) for i in range(20)]
    rows = [row(f"{i}.q", "int4", 1.0, fading[i] if i % 4 == 0 else None) for i in range(20)]
    found = estimates.calibrated(rows)
    for i in range(20):
        assert found[f"{i}.q", "int4"] == pytest.approx(fading[i], rel=0.1)


def test_families_and_schemes_are_corrected_too():
    rows = [row(f"{i}.{role}", "int4", 0.1, 0.1 * (1 + i % 2)) for i in range(40) for role in "qkv"]
    rows += [row("20.x", "int4", 1.0), row("21.x", "int4", 1.0)]
    alike = estimates.calibrated(rows)
    assert alike["20.x", "int4"] == pytest.approx(alike["21.x", "int4"], rel=0.01)
    apart = estimates.calibrated(rows, {one["layer"]: f"family {int(one['layer'][:-2]) % 2}" for one in rows})
    assert apart["20.x", "int4"] == pytest.approx(1.0, rel=0.15)
    assert apart["21.x", "int4"] == pytest.approx(2.0, rel=0.15)
    rows = [*blocks({"q": 1.0}), *blocks({"v": 1.0}, scheme="int8")]
    rows += [row(f"{i}.q", "int8", 1.0, 2.0) for i in range(20)] + [row("20.q", "int8", 1.0), row("20.v", "int4", 1.0)]
    found = estimates.calibrated(rows)
    assert found["20.q", "int8"] > 1.05 > found["20.v", "int4"]


def test_a_measurement_counts_by_its_interval():
    sure = [row("0.q", "int4", 1.0, 1.0, 1.01), row("1.q", "int4", 1.0, 2.0, 1.01), row("x.q", "int4", 1.0)]
    unsure = [sure[0], row("1.q", "int4", 1.0, 2.0, 3.0), sure[2]]
    assert estimates.calibrated(unsure)["x.q", "int4"] < estimates.calibrated(sure)["x.q", "int4"]


def test_an_estimate_is_as_sure_as_the_measurements_of_its_kind_make_it():
    rows = [*blocks({"q": 0.5}), row("9.q", "int8", 1.0), row("9.other", "fp6", 1.0)]
    found = estimates.estimates(rows)
    measured = found["3.q", "int4"]
    assert measured == (0.05, rows[3]["measured_low"], rows[3]["measured_high"], True)
    near, far = found["9.q", "int8"], found["9.other", "fp6"]
    assert not near.measured
    assert near.low * near.high == pytest.approx(near.loss**2)
    # What is left of a pair itself, the parts of its scheme and of the measured one, and for another role those too.
    assert math.log(near.high / near.loss) / 1.96 == pytest.approx(math.hypot(0.2, 0.1, 0.1), abs=0.01)
    assert math.log(far.high / far.loss) / 1.96 == pytest.approx(math.hypot(0.2, 0.1, 0.1, 0.25, 0.25), abs=0.03)
    (nothing,) = estimates.estimates([row("a", "int4", 1.0)]).values()
    assert nothing.loss == 1.0
    assert math.log(nothing.high) / 1.96 == pytest.approx(math.hypot(0.2, 1.0, 0.25, 0.1))


def test_what_cannot_be_told_from_nothing_counts_as_not_measured():
    rows = [row("a", "int4", 1.0, 0.5), row("b", "int4", 1.0, 0.1), row("c", "int4", 1.0, -0.1)]
    rows[1]["measured_low"] = -0.1
    found = estimates.calibrated(rows)
    assert found["a", "int4"] == 0.5
    alone = estimates.calibrated([rows[0], row("b", "int4", 1.0), row("c", "int4", 1.0)])
    assert found == alone
    assert 0.5 < found["b", "int4"] < 1.0
    nothing = [row("a", "int4", 1.0), row("b", "int8", 2.0)]
    assert estimates.calibrated(nothing) == {("a", "int4"): 1.0, ("b", "int8"): 2.0}
