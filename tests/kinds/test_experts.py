"""Experts as 3-D parameters: left alone by name, or split into linear layers."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

import autoq
from autoq.applying import apply
from autoq.checkpoint import load_quantized, save_quantized
from autoq.errors import ModelError, PlanError
from autoq.experts import split_experts
from autoq.modules import find_linears, quantized_layers
from autoq.other_weights import other_weights
from autoq.plan import Plan
from autoq.profiler.end_to_end import repeated_blocks
from autoq.recorder import record

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = torch.arange(48).view(2, 24)


def mixtral(**fields):
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES | {"intermediate_size": 96, "num_local_experts": 4} | fields)
    ).eval()


def qwen3_moe():
    fields = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES | fields)).eval()


def gpt_oss():
    """With biases, transposed weights, and gate and up interleaved."""
    fields = {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES | fields)).eval()
    for name, parameter in model.named_parameters():
        if "_bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, gpt_oss])
def test_a_split_model_computes_the_same(make):
    model = make()
    before = logits(model)
    size = sum(one.nbytes for one in model.parameters())
    assert split_experts(model) is model
    assert (logits(model) - before).norm() / before.norm() < 1e-5
    assert sum(one.nbytes for one in model.parameters()) == size
    names = [site.name for site in find_linears(model) if ".experts." in site.name]
    assert len(names) == 2 * 4 * 2
    assert names[:2] == ["model.layers.0.mlp.experts.0.gate_up_proj", "model.layers.0.mlp.experts.0.down_proj"]
    assert "experts (3-D parameters)" not in {one.kind for one in other_weights(model)}


def test_experts_without_a_gate():
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    fields = {"hidden_size": 64, "moe_intermediate_size": 96, "n_routed_experts": 4, "moe_latent_size": None}
    config = transformers.NemotronHConfig(**fields)
    config._experts_implementation = "eager"
    model = nn.ModuleDict({"experts": NemotronHExperts(config)}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, weights = torch.randn(10, 64), torch.rand(10, 2)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(10)])
    with torch.no_grad():
        before = model["experts"](x, index, weights)
        split_experts(model)
        assert torch.allclose(model["experts"](x, index, weights), before, atol=1e-5)
    assert [site.name for site in find_linears(model)][:2] == ["experts.0.up_proj", "experts.0.down_proj"]


def test_unsplit_experts_are_listed_with_their_share():
    model = mixtral()
    report = apply(model, Plan(layers={"lm_head": "int8wo"}))
    experts = [one for one in report.others if one.kind == "experts (3-D parameters)"]
    total = sum(one.nbytes for one in mixtral().parameters())
    assert {one.name: one.size_bytes for one in experts} == {
        f"model.layers.{layer}.mlp.experts.{name}": size
        for layer in range(2)
        for name, size in (("gate_up_proj", 4 * 192 * 64 * 4), ("down_proj", 4 * 64 * 96 * 4))
    }
    assert sum(one.share for one in experts) == pytest.approx(2 * 4 * (192 + 96) * 64 * 4 / total)
    share = sum(one.share for one in experts)
    assert f"as they are: experts (3-D parameters), {share:.1%} of the model's bytes (4 weights)" in str(report)


def test_a_split_model_is_quantized_saved_and_loaded(tmp_path):
    model = split_experts(mixtral())
    names = [site.name for site in find_linears(model) if ".experts." in site.name]
    apply(model, Plan(layers=dict.fromkeys(names, "int8wo")))
    assert set(quantized_layers(model)) == set(names)
    expected = logits(model)
    save_quantized(model, tmp_path / "saved")
    loaded = load_quantized(lambda: split_experts(mixtral()), tmp_path / "saved").eval()
    assert torch.equal(logits(loaded), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)


def test_experts_of_a_block_are_siblings_role_by_role():
    workload = record(split_experts(mixtral()), TOKENS).workload
    group = tuple(f"model.layers.0.mlp.experts.{number}.down_proj" for number in range(4))
    assert group in workload.siblings


def test_blocks_are_the_models_and_not_its_experts():
    model = split_experts(mixtral(num_local_experts=6))
    assert repeated_blocks(model) == list(model.model.layers)


def test_training_goes_on_through_split_experts():
    model = split_experts(mixtral())
    model(TOKENS, labels=TOKENS).loss.backward()
    assert model.model.layers[0].mlp.experts[0].down_proj.weight.grad.abs().sum() > 0


def test_a_model_without_such_experts_is_refused():
    with pytest.raises(ModelError, match=r"Sequential: .*experts as 3-D parameters"):
        autoq.split_experts(nn.Sequential(nn.Linear(8, 8)))
    model = split_experts(mixtral())
    with pytest.raises(ModelError, match="experts as 3-D parameters"):
        split_experts(model)


def test_a_plan_of_split_experts_is_refused_by_the_whole_model():
    plan = Plan(layers={"model.layers.0.mlp.experts.0.down_proj": "int8wo"})
    with pytest.raises(PlanError, match=r"model\.layers\.0\.mlp\.experts\.0\.down_proj"):
        apply(mixtral(), plan)
