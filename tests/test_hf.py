import importlib.util
import json
import socket
from pathlib import Path

import pytest
import torch

from autoq import hf
from autoq.applying import apply, plan_of
from autoq.checkpoint import save_quantized
from autoq.checkpoint_files import opened
from autoq.errors import CheckpointError, InputError
from autoq.modules import quantized_layers
from autoq.plan import Plan

transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")

_SPEC = importlib.util.spec_from_file_location("checkpoint_forging", Path(__file__).with_name("checkpoint_forging.py"))
forging = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(forging)

TOKENS = torch.arange(12).view(2, 6)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make(kind="LlamaForCausalLM", **fields):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(**sizes | heads | fields)
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval().bfloat16()
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in LINEARS]
    apply(model, Plan(layers=dict.fromkeys(names, "int8wo")))
    return model


@pytest.fixture
def saved(tmp_path):
    model = make()
    model.generation_config.update(max_new_tokens=5, temperature=0.7, do_sample=True)
    save_quantized(model, tmp_path / "llama")
    return model, tmp_path / "llama"


def test_a_model_comes_back_in_one_line(saved):
    model, folder = saved
    loaded = hf.load(folder)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert not loaded.training
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert len(quantized_layers(loaded)) == 14
    assert plan_of(loaded) == plan_of(model)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    known = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    assert loaded.config.to_dict() == model.config.to_dict() | known
    assert loaded.generate(TOKENS[:1], do_sample=False).shape == (1, 6 + 5)


def test_the_model_is_built_without_weights(saved, linear_devices):
    _, folder = saved
    hf.load(folder)
    assert linear_devices == {"meta"}


def test_a_model_without_a_head_and_in_shards(tmp_path):
    model = make("LlamaModel")
    save_quantized(model, tmp_path / "llama", max_shard_bytes=20_000)
    loaded = hf.load(tmp_path / "llama", attn_implementation="eager")
    assert type(loaded) is transformers.LlamaModel
    assert loaded.config._attn_implementation == "eager"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state)


def test_a_tokenizer_is_saved_beside_the_model_and_stays_when_it_is_saved_again(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{}")

    save_quantized(make(), tmp_path / "llama", tokenizer=Tokenizer())
    (tmp_path / "llama" / "README.md").write_text("mine")
    save_quantized(make(vocab_size=80), tmp_path / "llama")
    assert (tmp_path / "llama" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "llama" / "README.md").read_text() == "mine"
    assert hf.load(tmp_path / "llama").config.vocab_size == 80


CONFIGS = {
    "code beside it": ({"auto_map": {"AutoModel": "evil.Model"}}, r"\$\.auto_map would let transformers fetch or run"),
    "a kernel of the Hub": ({"attn_implementation": "someone/kernel"}, "fetch or run"),
    "the same, inner name": ({"_attn_implementation_internal": "someone/kernel"}, "fetch or run"),
    "nested": ({"text_config": {"_attn_implementation": "someone/kernel"}}, r"\$\.text_config\._attn_implementation"),
    "experts of the Hub": ({"experts_implementation": "someone/kernel"}, "fetch or run"),
    "pretrained backbone": ({"use_pretrained_backbone": True}, "fetch or run"),
    "a backbone of the Hub": (
        {"model_type": "dpt", "architectures": ["DPTModel"], "backbone": "evil/repo"},
        r"\$\.backbone would let",
    ),
    "its arguments": ({"backbone_kwargs": {"a": 1}}, r"\$\.backbone_kwargs would let"),
    "another library's model": (
        {"text_config": {"model_type": "timm_wrapper"}},
        r"\$\.text_config\.model_type would let",
    ),
    "nested in lists": ({"parts": [[{"auto_map": {}}]]}, r"\$\.parts\[0\]\[0\]\.auto_map would let"),
    "a function": ({"architectures": ["pipeline"]}, '"architectures" has the class'),
    "a module": ({"architectures": ["models"]}, '"architectures" has the class'),
    "a class that is no model": ({"architectures": ["LlamaConfig"]}, '"architectures" has the class'),
    "an attribute of an attribute": ({"architectures": ["models.llama"]}, '"architectures" has the class'),
    "a hidden name": ({"architectures": ["__loader__"]}, '"architectures" has the class'),
    "another model's class": ({"architectures": ["GPT2LMHeadModel"]}, '"architectures" has the class'),
    "no class": ({"architectures": None}, '"architectures" has the class'),
    "two classes": ({"architectures": ["LlamaModel", "LlamaForCausalLM"]}, '"architectures" has the class'),
    "unknown model": ({"model_type": "lama"}, "KeyError"),
    "a type that is a list": ({"model_type": ["llama"]}, "TypeError"),
    "text for a number": ({"hidden_size": "64"}, "understands the configuration"),
    "no heads": ({"num_attention_heads": 0, "head_dim": None}, "understands the configuration|without values"),
    "negative size": ({"hidden_size": -64}, "understands the configuration|without values"),
    "a million layers": ({"num_hidden_layers": 10**6}, r"\$\.num_hidden_layers is at most 2048 here; got 1000000"),
    "two thousand layers": ({"num_hidden_layers": 2000}, r"at most 11\d+ modules and parameters"),
    "a million labels": ({"num_labels": 1 << 20}, r"\$\.num_labels is at most 2048 here"),
    "as many heads": ({"num_key_value_heads": 1 << 20}, r"\$\.num_key_value_heads is at most 65536 here"),
    "a list of depths": (
        {"model_type": "convnext", "architectures": ["ConvNextModel"], "depths": [268435456, 2, 2, 2]},
        r"\$\.depths is at most 2048 here; got \[268435456, 2, 2, 2\]",
    ),
    "depths that add up": ({"depths": [1000, 1000, 1000]}, r"\$\.depths is at most 2048 here"),
    "depths in a list": ({"depths": [[10**6]]}, r"\$\.depths\[0\] is at most 2048 here"),
    "sizes in a list": ({"hidden_sizes": [1 << 30]}, r"\$\.hidden_sizes is at most 262144 here"),
    "a function's name": ({"to_dict": 5}, "understands|TypeError|architectures"),
    "other sizes": ({"intermediate_size": 128}, "the layer is the model's"),
    "more layers": ({"num_hidden_layers": 3}, "not in the checkpoint: model.layers.2"),
    "fewer layers": ({"num_hidden_layers": 1}, "the model has the checkpoint's layers"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_forged_configuration_is_refused(saved, name):
    _, folder = saved
    change, says = CONFIGS[name]
    forging.changed_json(folder, "config.json", lambda config: config | change)
    with pytest.raises(CheckpointError, match=says):
        hf.load(folder)


def test_memory_that_transformers_cannot_have_is_a_refusal(saved, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(transformers.LlamaConfig, "from_dict", full)
    with pytest.raises(
        CheckpointError, match=r"config\.json: transformers understands the configuration; got MemoryError"
    ):
        hf.load(saved[1])


def test_no_configuration_that_passes_the_check_asks_the_network(saved, monkeypatch):
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_exists", refuse)
    with opened(saved[1]) as checkpoint:
        for kind in transformers.CONFIG_MAPPING:
            for more in ({}, {"backbone": "evil/repo"}):
                value = {"model_type": kind, **more}
                try:
                    hf._check(value, Path("config.json"), checkpoint)
                    with hf._understood(Path("config.json")):
                        transformers.CONFIG_MAPPING[kind].from_dict(value)
                except CheckpointError:
                    continue
    assert asked == []


def test_words_that_are_labels_are_no_settings(tmp_path):
    model = make(label2id={"backbone": 0, "custom_x": 1, "num_layers": 9999}, id2label={0: "backbone", 1: "custom_x"})
    save_quantized(model, tmp_path / "llama")
    assert hf.load(tmp_path / "llama").config.label2id["num_layers"] == 9999


def test_a_configuration_of_many_labels_is_saved_and_read(tmp_path):
    labels = {number: f"a name of a class of about forty letters {number}" for number in range(21841)}
    model = make("LlamaModel", id2label=labels, label2id={name: number for number, name in labels.items()})
    save_quantized(model, tmp_path / "llama")
    assert (tmp_path / "llama" / "config.json").stat().st_size > 1 << 20
    assert hf.load(tmp_path / "llama").config.id2label == labels


def test_infinite_numbers_of_a_configuration_come_back(tmp_path):
    sizes = {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "num_hidden_layers": 1, "vocab_size": 64}
    torch.manual_seed(0)
    config = transformers.Mamba2Config(**sizes, state_size=16, n_groups=1)
    model = transformers.Mamba2ForCausalLM(config).eval()
    apply(model, Plan(layers={"backbone.layers.0.mixer.out_proj": "int8wo"}))
    save_quantized(model, tmp_path / "mamba")
    assert "__float__" in (tmp_path / "mamba" / "config.json").read_text()
    loaded = hf.load(tmp_path / "mamba")
    assert tuple(loaded.config.time_step_limit) == (0.0, float("inf"))
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_the_reason_that_transformers_gives_is_kept(saved):
    forging.changed_json(saved[1], "config.json", lambda config: config | {"hidden_size": "64"})
    with pytest.raises(CheckpointError, match=r"hidden_size.+expected int, got str"):
        hf.load(saved[1])


def test_a_forged_generation_configuration_is_refused(saved):
    _, folder = saved
    for value in ([], {"custom_generate": "someone/code"}, {"num_beams": 10**9}):
        forging.replaced(folder, "generation_config.json", json.dumps(value).encode())
        with pytest.raises(CheckpointError, match=r"generation_config\.json"):
            hf.load(folder)


def test_a_configuration_that_was_changed_is_refused(saved):
    _, folder = saved
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("96", "97"))
    with pytest.raises(CheckpointError, match=r"config\.json: the file is as it was saved"):
        hf.load(folder)


def test_a_checkpoint_of_another_kind_of_model_says_how_to_load_it(tmp_path):
    save_quantized(torch.nn.Sequential(torch.nn.Linear(4, 4)), tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"has config\.json; got none\. Build the model yourself"):
        hf.load(tmp_path / "plain")


def test_without_transformers_it_says_what_to_install(saved, monkeypatch):
    _, folder = saved
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'autoq\[hf\]'"):
        hf.load(folder)
