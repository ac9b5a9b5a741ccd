"""The decode step as a decision: attention and KV cache are measured under the plan, kept in it, and heeded."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import autoq  # noqa: E402
from autoq import decode_choice  # noqa: E402
from autoq.attention import using  # noqa: E402
from autoq.decode_choice import DecodeOption, best  # noqa: E402
from autoq.errors import InputError, PlanError  # noqa: E402
from autoq.evaluation import Difference  # noqa: E402
from autoq.generating import _DECODERS  # noqa: E402
from autoq.plan import Plan  # noqa: E402
from autoq.profiler import Timing  # noqa: E402


def make(**changes):
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 120,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
            "initializer_range": 0.3,
        }
        | changes
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def tokens(rows=40, length=64):
    return torch.randint(3, 120, (rows, length), generator=torch.Generator().manual_seed(1))


def option(attention, kv_cache, *, loss, time, size):
    timing = Timing(median_us=time, low_us=time, high_us=time, repeats=3)
    difference = Difference(mean=loss, low=loss, high=loss, samples=4)
    times = {"prefill": timing, "decode": timing}
    return DecodeOption(attention=attention, kv_cache=kv_cache, loss=difference, times=times, kv_bytes=size)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return autoq.tune(
        make(),
        tokens(),
        candidates=["int8wo"],
        max_increase=10.0,
        kv_cache=("none", "int8", "int4"),
        n_trials=3,
        cache_dir=tmp_path_factory.mktemp("cache"),
    )


def test_every_precision_is_measured_and_one_is_chosen(tuned):
    rows = tuned.plan.provenance["decoding"]
    assert [(row["attention"], row["kv_cache"]) for row in rows] == [
        ("stock", "none"), ("autoq", "none"), ("autoq", "int8"), ("autoq", "int4")
    ]  # fmt: skip
    stock, exact, int8, int4 = rows
    assert abs(exact["loss_delta"] - stock["loss_delta"]) < 1e-4  # the same function in another order
    assert 0 < abs(int8["loss_delta"] - exact["loss_delta"]) < 0.003
    assert 0 < abs(int4["loss_delta"] - exact["loss_delta"]) < 0.05
    head, places = 32, 127 + 1  # a prompt of 127 tokens and one more
    assert [row["kv_bytes"] for row in rows] == [
        2 * 2 * places * size for size in (4 * head, 4 * head, head + 4, head // 2 + 4)
    ]
    chosen = [row for row in rows if row["chosen"]]
    assert len(chosen) == 1
    calls = tuned.plan.phases
    assert all(
        row["request_us"] == pytest.approx(sum(count * row[f"{phase}_us"] for phase, count in calls.items()))
        for row in rows
    )
    assert chosen[0]["request_us"] == min(row["request_us"] for row in rows)
    expected = {} if chosen[0]["attention"] == "stock" else {"attention": "autoq", "kv_cache": chosen[0]["kv_cache"]}
    assert tuned.plan.model == expected


def test_the_losses_are_those_of_the_model_with_that_cache(tuned):
    model, rows = make(), tokens()
    plain = autoq.perplexity(model, rows)
    autoq.apply(model, tuned.plan.replace({}))
    measured = {row["kv_cache"]: row["loss_delta"] for row in tuned.plan.provenance["decoding"][1:]}
    for precision, loss in measured.items():
        with using(model, precision):
            ratio = autoq.perplexity(model, rows) / plain
        assert torch.tensor(ratio).log().item() == pytest.approx(loss, abs=2e-4)


def test_a_plan_s_decision_goes_to_its_file_and_to_the_model(tuned, tmp_path):
    decided = {"attention": "autoq", "kv_cache": "int8"}
    plan = Plan(layers=dict.fromkeys(tuned.plan.layers, "int8wo"), model=decided)
    plan.save(tmp_path / "plan.json")
    model = make()
    report = autoq.apply(model, Plan.load(tmp_path / "plan.json"))
    assert report.attention == model.config._attn_implementation == "autoq"
    assert "attention: autoq's" in str(report)
    assert autoq.plan_of(model).model == decided
    autoq.generate(model, tokens(1), max_new_tokens=4, compiled=False)
    assert _DECODERS[model].kv_cache == "int8"
    autoq.generate(model, tokens(1), max_new_tokens=4, compiled=False, kv_cache="none")
    assert _DECODERS[model].kv_cache == "none"
    autoq.save_quantized(model, tmp_path / "saved")
    assert autoq.hf.load(tmp_path / "saved").config._attn_implementation == "autoq"
    assert autoq.hf.load(tmp_path / "saved", attn_implementation="sdpa").config._attn_implementation == "sdpa"


def test_an_attention_that_the_model_cannot_have_changes_nothing():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(PlanError, match="attention is autoq, for a model of transformers"):
        autoq.apply(model, Plan(layers={"0": "int8wo"}, model={"attention": "autoq"}))
    assert type(model[0]) is torch.nn.Linear
    with pytest.raises(PlanError, match="got flash for LlamaForCausalLM"):
        autoq.apply(make(), Plan(layers={"lm_head": "int8wo"}, model={"attention": "flash"}))


def test_the_best_option_is_the_fastest_within_the_budget_or_the_smallest():
    calls = {"prefill": 1.0, "decode": 10.0}
    options = [
        option("stock", "none", loss=0.01, time=100.0, size=512),
        option("autoq", "none", loss=0.01, time=50.0, size=512),
        option("autoq", "int8", loss=0.012, time=45.0, size=272),
        option("autoq", "int4", loss=0.2, time=40.0, size=144),
    ]
    assert best(options, calls, max_loss=None, memory=False) == 3
    assert best(options, calls, max_loss=0.015, memory=False) == 2
    assert best(options, calls, max_loss=0.011, memory=False) == 1
    assert best(options, calls, max_loss=0.001, memory=False) == 0
    assert best(options, calls, max_loss=0.015, memory=True) == 2
    assert best(options[:2], calls, max_loss=None, memory=True) == 1
    assert options[2].section() == {"attention": "autoq", "kv_cache": "int8"}
    assert options[0].section() == {}
    assert options[1].request_us(calls) == 550.0


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (make, {"kv_cache": ["int2"]}, "kv_cache is one of none, int8, int4"),
        (make, {"kv_cache": ["int8"], "phases": True}, "the phases that autoq makes"),
        (lambda: make(num_attention_heads=4), {"kv_cache": ["int4"]}, "a multiple of 32 numbers; got 16"),
    ],
)
def test_what_cannot_be_decided_is_refused_before_anything_is_measured(model, settings, message, tmp_path, monkeypatch):
    monkeypatch.setattr(decode_choice, "runs", None)
    if "phases" in settings:
        settings = settings | {"phases": {"prefill": autoq.Phase({"input_ids": tokens(1)}, 1)}}
    with pytest.raises(InputError, match=message):
        autoq.tune(model(), tokens(), cache_dir=tmp_path, **settings)
    assert not list(tmp_path.iterdir())
