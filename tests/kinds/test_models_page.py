"""Every example of docs/models.md, run as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from autoq.modules import quantized_layers

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.M | re.S)
EXAMPLES = {
    title: code
    for title, text in _SECTION.findall(PAGE.read_text())
    for code in re.findall(r"```python\n(.*?)```", text, re.S)
}


def ran(title):
    """The names that an example defines."""
    names = {"__name__": "example"}
    exec(compile(EXAMPLES[title], f"models.md: {title}", "exec"), names)
    return names


def schemes(report):
    return {str(scheme) for scheme in report.applied.values()}


def kinds(report):
    return {one.kind for one in report.others}


def test_a_decoder_language_model_generates():
    names = ran("Decoder language models")
    model, report = names["model"], names["report"]
    assert len(report.applied) == 30 * 7 + 1
    assert schemes(report) == {"int8wo"}
    assert report.others == ()
    assert model.lm_head.scheme == "int8wo"
    assert isinstance(model.get_input_embeddings().weight, torch.nn.Parameter)
    assert names["answer"].startswith("Water boils at a temperature of around ")


def test_gpt2_is_quantized():
    names = ran("GPT-2")
    assert len(names["result"].workload.quantizable) == 2 * 4 + 1
    assert {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"} <= set(names["report"].applied)
    assert names["report"].others == ()
    assert names["answer"].shape == (1, 16)


def test_experts_are_left_alone_by_name_or_split():
    names = ran("Mixtures of experts")
    experts = [one for one in names["left"] if one.kind == "experts (3-D parameters)"]
    assert sum(one.size_bytes for one in experts) == 2 * 4 * 3 * 64 * 128 * 4
    assert 0.6 < sum(one.share for one in experts) < 0.9
    assert torch.allclose(names["before"], names["after"], atol=1e-5)
    applied = names["report"].applied
    for role in ("gate_up_proj", "down_proj"):
        mine = [applied[f"model.layers.1.mlp.experts.{number}.{role}"] for number in range(4)]
        assert len(set(mine)) == 1
    assert kinds(names["report"]) == {"parameters of other modules"}  # the routers


def test_an_encoder_and_decoder():
    names = ran("Encoder and decoder")
    assert names["result"].metric == "kl"
    assert {"encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.o"} <= set(
        names["report"].applied
    )
    left = names["result"].plan.provenance["model"]["left_alone"]
    direct = "linear layers: its weight is read outside its own forward"
    assert left[direct]["weights"] == 4
    share = f"{left[direct]['share']:.1%}"
    assert f"{share} of the model's bytes stay as they are: {direct}." in names["result"].notes
    assert names["answer"].shape[0] == 8


def test_a_sentence_encoder_keeps_its_embeddings_and_their_order():
    names = ran("Sentence encoders")
    assert names["cosines"].mean() > 0.99
    assert torch.equal(names["new_ranking"][:, 0], names["ranking"][:, 0])
    assert names["ranking"][:, 0].tolist() == [3, 2, 1]
    assert len(names["report"].applied) >= 30


def test_a_vision_transformer():
    names = ran("Vision transformers")
    assert names["result"].metric == "kl"
    assert "classifier" in names["report"].applied
    assert kinds(names["report"]) == {"convolutions", "parameters of other modules"}


def test_a_convnets_linear_head():
    names = ran("Convnets")
    report = names["report"]
    assert list(report.applied) == ["4"]
    ((name, kind, share),) = [(one.name, one.kind, one.share) for one in report.others]
    bytes_of_conv, bytes_of_all = 32 * 3 * 9, 32 * 3 * 9 + 32 + 512 * 100 + 100
    assert (name, kind, share) == ("0.weight", "convolutions", bytes_of_conv / bytes_of_all)
    assert str(report).splitlines()[-1] == "as they are: convolutions, 1.7% of the model's bytes (1 weight)"


def test_a_classifier_judged_by_its_wrong_answers():
    names = ran("An MLP judged by its accuracy")
    assert names["before"] < 0.12
    assert names["after"] - names["before"] <= 0.01
    assert len(names["report"].applied) == 3
    assert names["result"].metric == "eval_fn"
    measured = names["result"].plan.provenance["measured"]
    assert measured["loss_delta"] == pytest.approx(float(names["after"] - names["before"]), abs=2 / 597)


def test_adapters_stay_and_can_be_trained():
    names = ran("LoRA and PEFT")
    model = names["model"]
    assert {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"} <= set(names["report"].applied)
    assert kinds(names["report"]) == {"linear layers: it is a LoRA adapter"}
    trained = {name for name, one in model.named_parameters() if one.grad is not None and one.grad.abs().sum() > 0}
    assert len([name for name in trained if ".lora_" in name]) == 8
    assert len(quantized_layers(model)) == len(names["report"].applied)
    assert names["answer"].shape == (1, 16)


def test_a_pipeline_still_works():
    names = ran("Pipelines")
    pipe = names["pipe"]
    assert len(quantized_layers(pipe.transformer)) >= 4
    assert torch.equal(names["first"], names["second"])
    error = (names["second"] - names["before"]).norm() / names["before"].norm()
    assert 0 < error < 0.02
    assert not hasattr(pipe.transformer, "finalize_autoquant")


def test_a_distributed_model():
    try:
        names = ran("DistributedDataParallel")
    finally:
        torch.distributed.destroy_process_group()
    assert set(names["report"].applied) == {"0", "2"}
    assert type(names["model"]).__name__ == "DistributedDataParallel"
    assert names["outputs"].shape == (8, 64)


def test_every_example_is_tested():
    source = Path(__file__).read_text()
    assert all(f'ran("{title}")' in source for title in EXAMPLES)
    assert len(EXAMPLES) == 11
