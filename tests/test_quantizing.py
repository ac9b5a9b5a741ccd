"""autoquant on plain and compiled models, at the next call, by hand, and from plan files."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import autoq
from autoq import language, quantizing
from autoq.candidates import Packed
from autoq.errors import CacheError, InputError, PlanError
from autoq.modules import QuantLinear, quantized_layers
from autoq.profiler import isolated as isolated_module
from autoq.results import Settings, TuneResult
from autoq.tuning import Tuning


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    monkeypatch.setattr(isolated_module, "_SECONDS_PER_SHAPE", 0.0)
    monkeypatch.setattr(isolated_module, "_MAX_COPIES", 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 128), nn.Linear(128, 32)

    def forward(self, x, *, scale=1.0):
        return self.fc2(torch.relu(self.fc1(x))) * scale


def net():
    torch.manual_seed(0)
    return Net().eval()


PLAN = autoq.Plan(layers={"fc1": "int8wo", "fc2": "int8wo"}, provenance={"request": {"max_degradation": 0.02}})
X = torch.linspace(-1, 1, 256).view(4, 64)


@pytest.fixture
def instant(monkeypatch):
    """Tuning that takes no time: remembers what it was asked, and answers with ``PLAN``."""
    asked = []

    def tune(model, batches, **arguments):
        asked.append((batches, arguments))
        return TuneResult(
            plan=PLAN, workload=None, notes=(), front_rows=[], measurement_rows=[], sensitivity_rows=[],
            problem=None, budget=None, scale=None, metric="", baseline_loss=0.0,
        )  # fmt: skip

    monkeypatch.setattr(quantizing, "tune", tune)
    return asked


def quantized(model):
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def expected():
    model = net()
    autoq.apply(model, PLAN)
    with torch.no_grad():
        return model(X)


def test_batches_tune_at_once(instant):
    model = net()
    assert autoq.autoquant(model, X) is model
    assert quantized(model) == ["fc1", "fc2"]
    assert instant[0][0] is X


@pytest.mark.parametrize("how", ["plain", "wrapped", "in place"])
def test_the_next_call_tunes_and_is_answered_by_the_tuned_model(instant, how):
    inner = net()
    model = torch.compile(inner, backend="eager") if how == "wrapped" else inner
    if how == "in place":
        inner.compile(backend="eager")
    model = autoq.autoquant(model, max_degradation=0.02)
    assert quantized(inner) == []
    with torch.no_grad():
        first, second = model(X, scale=1.0), model(X)
    assert torch.equal(first, expected())
    assert torch.equal(second, expected())
    assert len(instant) == 1
    assert instant[0][1]["max_degradation"] == 0.02
    assert quantized(inner) == ["fc1", "fc2"]
    assert not inner._forward_pre_hooks
    assert not model._forward_pre_hooks
    if how == "in place":
        assert inner._compiled_call_impl is not None


def test_a_call_in_inference_mode_is_fine(instant):
    model = autoq.autoquant(net())
    with torch.inference_mode():
        assert torch.equal(model(X), expected())


def test_recording_by_hand_keeps_every_call_until_it_is_ended(instant):
    model = autoq.autoquant(torch.compile(net(), backend="eager"), manual=True)
    with torch.no_grad():
        model(X)
        model(2 * X, scale=2.0)
    assert instant == []
    model.finalize_autoquant()
    ((batches, _),) = instant
    assert [batch.kwargs for batch in batches] == [{}, {"scale": 2.0}]
    assert torch.equal(batches[1].args[0], 2 * X)
    assert "finalize_autoquant" not in model.__dict__
    assert quantized(model._orig_mod) == ["fc1", "fc2"]


def test_ending_a_recording_of_nothing_is_refused(instant):
    model = autoq.autoquant(net(), manual=True)
    with pytest.raises(InputError, match="at least one call"):
        model.finalize_autoquant()


def test_a_tuned_model_copies_and_pickles(instant):
    model = autoq.autoquant(net())
    with torch.no_grad():
        wanted = model(X)
        assert torch.equal(copy.deepcopy(model)(X), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(model))(X), wanted)


def test_a_plan_file_is_written_and_then_replayed_without_measuring(instant, tmp_path):
    path = tmp_path / "plan.json"
    autoq.autoquant(net(), X, plan=path)
    assert autoq.Plan.load(path).layers == PLAN.layers
    replayed = autoq.autoquant(torch.compile(net(), backend="eager"), plan=path)
    assert len(instant) == 1
    with torch.no_grad():
        assert torch.equal(replayed(X), expected())


def test_a_plan_file_for_another_budget_is_refused_unless_accepted(instant, tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    with pytest.raises(PlanError, match=r"max_degradation is 0\.02 in the file and 0\.5 in the call"):
        autoq.autoquant(net(), plan=path, max_degradation=0.5)
    with pytest.raises(PlanError, match="phases"):
        autoq.autoquant(net(), plan=path, phases={"forward": autoq.Phase(X)})
    assert quantized(autoq.autoquant(net(), plan=path, max_degradation=0.5, accept_plan=True)) == ["fc1", "fc2"]
    assert quantized(autoq.autoquant(net(), plan=path, max_degradation=0.02)) == ["fc1", "fc2"]


def test_a_plan_for_another_model_and_a_cut_one_leave_the_model_alone(tmp_path):
    path = tmp_path / "plan.json"
    autoq.Plan(layers={"elsewhere": "int8wo"}).save(path)
    model = net()
    with pytest.raises(PlanError, match="another model"):
        autoq.autoquant(model, plan=path)
    path.write_text(path.read_text()[:30])
    with pytest.raises(PlanError, match="complete JSON"):
        autoq.autoquant(model, plan=path)
    assert quantized(model) == []


def test_what_a_plan_and_a_model_do_not_share_is_named(caplog, tmp_path):
    path = tmp_path / "plan.json"
    autoq.Plan(layers={"fc1": "int8wo", "gone": "int8wo"}).save(path)
    autoq.autoquant(net(), plan=path)
    assert "gone" in caplog.text
    assert "fc2" in caplog.text


def test_keep_float_brings_the_float_model_back(instant):
    model = autoq.autoquant(net(), X, keep_float=True)
    assert autoq.plan_of(model).layers == PLAN.layers
    autoq.restore(model)
    with torch.no_grad():
        assert torch.equal(model(X), net()(X))


def test_measuring_a_plan_gives_its_loss_and_times_and_changes_nothing():
    model = net()
    found = autoq.measure(model, PLAN, list(torch.randn(4, 8, 64)))
    assert found.metric == "relative_rms"
    assert 1e-3 < found.difference.low <= found.difference.mean <= found.difference.high < 2e-2
    assert found.phases.keys() == found.baseline_phases.keys() == {"forward"}
    assert found.weight_bytes == 128 * 64 + 4 * 128 + 32 * 128 + 4 * 32 + 4 * (128 + 32)
    assert quantized(model) == []
    with pytest.raises(PlanError, match="gone"):
        autoq.measure(model, autoq.Plan(layers={"gone": "int8wo"}), X)


def test_a_plan_is_measured_against_unquantized_weights_in_the_same_kernels_too():
    model = net().bfloat16()
    x = list(torch.randn(4, 8, 64).bfloat16())
    found = autoq.measure(model, autoq.Plan(layers={"fc1": "int8wo"}), x)
    assert found.none_phases.keys() == found.phases.keys() == found.baseline_phases.keys()
    assert found.baseline_weight_bytes == 2 * (128 * 64 + 128 + 128 * 32 + 32)
    stock = autoq.measure(model, autoq.Plan(layers={}), x)
    assert stock.phases == stock.baseline_phases
    assert (stock.none_phases, stock.difference.mean) == ({}, 0.0)
    assert stock.weight_bytes == stock.baseline_weight_bytes == found.baseline_weight_bytes
    assert autoq.measure(net(), autoq.Plan(layers={"fc1": "int8wo"}), torch.randn(8, 64)).none_phases == {}


# -- a causal language model ----------------------------------------------------------------------------------------


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tuned_llama(tmp_path_factory):
    model = llama()
    rows = torch.randint(3, 128, (8, 64))
    result = autoq.tune(
        model, rows, max_degradation=0.05, cache_dir=tmp_path_factory.mktemp("cache"), candidates=["int8wo", "fp6"],
        n_trials=4,
    )  # fmt: skip
    return model, result


def test_a_language_model_gets_a_prompt_and_a_single_token_phase_and_says_so(tuned_llama):
    _, result = tuned_llama
    assert {phase.name: phase.calls for phase in result.workload.phases} == {"prefill": 1, "decode": 128}
    head = {call.phase: call.m for call in result.workload.calls_of("lm_head")}
    assert head == {"prefill": 1, "decode": 1}  # logits of the last token only
    body = {call.phase: call.m for call in result.workload.calls_of("model.layers.0.mlp.up_proj")}
    assert body == {"prefill": 127, "decode": 1}
    assert any("request is taken to be prefill × 1, decode × 128" in note for note in result.notes)


def test_few_tokens_are_extended_by_sampled_text_and_it_says_so(tuned_llama):
    _, result = tuned_llama
    assert any("sampled from the model" in note for note in result.notes)
    assert result.plan.provenance["budget"]["metric"] == "nll"


def test_a_tied_head_is_quantized_without_changing_the_embedding(tuned_llama):
    model, result = tuned_llama
    head = next(one for one in result.workload.layers if one.name == "lm_head")
    assert head.tied_to == "model.embed_tokens.weight"
    tuned = copy.deepcopy(model)
    autoq.apply(tuned, result.plan.replace({"lm_head": "int8wo"}))
    assert torch.equal(tuned.model.embed_tokens.weight, model.model.embed_tokens.weight)
    front = result.front
    none, int8 = (front[front["label"] == name].iloc[0] for name in ("none", "int8wo"))
    floats = sum(parameter.nbytes for parameter in model.parameters())
    assert none["weight_bytes"] == floats  # the embedding counts once
    tables = model.lm_head.weight.numel() + 4 * 128
    assert int8["weight_bytes"] > model.model.embed_tokens.weight.nbytes + tables


def test_a_tied_head_in_autoqs_kernels_is_held_twice_and_counted_so():
    model = llama().bfloat16()
    plan = autoq.Plan(layers={"lm_head": "none", "model.layers.0.mlp.up_proj": "none"})
    settings = Settings(loss_fn=lambda outputs, batch: outputs.logits.float().square().mean(dim=(1, 2)))
    tuning = Tuning(model, torch.randint(3, 128, (2, 8)), None, settings, None)
    tuning.prepare()
    size = tuning.costs.weight_bytes(plan.layers)
    assert size == tuning.costs.weight_bytes({}) + model.lm_head.weight.nbytes
    autoq.apply(model, plan)
    packed = sum(one.candidate.weight_bytes(Packed(one.packed)) for one in quantized_layers(model).values())
    assert packed + sum(parameter.nbytes for parameter in model.parameters()) == size
    prompt = torch.randint(3, 128, (1, 8))
    assert model.generate(input_ids=prompt, max_new_tokens=2, do_sample=False).shape[1] > 8


def test_generate_triggers_tuning_and_goes_on(instant, monkeypatch):
    plan = autoq.Plan(layers={"model.layers.0.mlp.up_proj": "int8wo"})
    model = torch.compile(llama(), backend="eager")
    monkeypatch.setattr(quantizing, "_apply", lambda model, found, **_: autoq.apply(model, plan))
    autoq.autoquant(model)
    prompt = torch.randint(3, 128, (1, 8))
    tokens = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] <= 12
    ((batches, _),) = instant
    assert torch.equal(batches[0], prompt)
    assert quantized(model._orig_mod) == ["model.layers.0.mlp.up_proj"]


def test_a_decode_step_can_be_repeated_and_sees_its_context():
    model = llama()
    line = torch.randint(3, 128, (1, 17))
    step = language.decode_step(model, line[:, :16], line[:, 16:])
    with torch.no_grad():
        wanted = model(line).logits[:, -1]
        for _ in range(40):  # more calls than the cache has room for, were it not rewound
            found = model(**step()).logits[:, -1]
        assert torch.allclose(found, wanted, atol=1e-4)


def test_extended_rows_begin_with_the_given_ones_and_are_reproducible():
    model = llama()
    rows = [torch.randint(3, 128, (1, 32))]
    more = language.extended(model, rows, seed=1, minimum=300)
    assert more[0] is rows[0]
    assert sum(one.numel() for one in more) >= 300
    again = language.extended(model, rows, seed=1, minimum=300)
    assert torch.equal(more[1], again[1])
    assert language.extended(model, rows, seed=1, minimum=32) is rows


def test_batches_that_are_no_tokens_are_refused():
    with pytest.raises(InputError, match="token rows"):
        autoq.tune(llama(), torch.randn(2, 8))


def test_autoquant_takes_whatever_tune_takes_with_the_same_defaults():
    own = {"plan", "accept_plan", "manual", "keep_float"}
    assert autoq.autoquant.__kwdefaults__ == autoq.tune.__kwdefaults__ | {
        name: autoq.autoquant.__kwdefaults__[name] for name in own
    }


def test_autoquant_hands_the_foreign_profile_to_the_tuning(tmp_path):
    with pytest.raises(CacheError, match="got 'nothing-of-this-name', which is of none"):
        autoq.autoquant(net(), torch.randn(4, 8), cache_dir=tmp_path, profile_from="nothing-of-this-name")
