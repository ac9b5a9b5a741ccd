"""Hugging Face folders that bring code, pickles or strange names: nothing of them is run."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch

import autoq
from autoq import loading
from autoq.errors import AutoqError, InputError

transformers = pytest.importorskip("transformers")

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
EVIL = "import pathlib\npathlib.Path({target!r}).write_text('owned')\nclass Evil: pass\n"


class Owner:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "architectures"})
    ).save_pretrained(made)
    (made / "evil.py").write_text(EVIL.format(target=str(tmp_path / "OWNED")))
    return made


def change(folder, name, **fields):
    path = folder / name
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value | fields))


def owned(folder):
    return (folder.parent / "OWNED").exists() or "evil" in sys.modules


def test_the_folder_itself_is_read(folder):
    assert type(loading.load_model(str(folder)).model).__name__ == "LlamaForCausalLM"
    assert not owned(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}},
        {"model_type": "evil", "auto_map": {"AutoConfig": "../model/evil.Evil"}},
        {"model_type": "evil"},
        {"model_type": ["llama"]},
        {"model_type": "../evil"},
    ],
)
def test_code_that_comes_with_a_configuration_is_never_run(folder, fields):
    change(folder, "config.json", **fields)
    with pytest.raises(InputError, match="transformers must be able to read the model"):
        loading.load_model(str(folder))
    assert not owned(folder)


def test_code_for_the_tokenizer_is_never_run(folder):
    change(folder, "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    with pytest.raises(InputError):
        loading.load_model(str(folder))
    assert not owned(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"backbone": "owner/model"},
        {"use_timm_backbone": True},
        {"text_config": {"backbone_config": {"use_pretrained_backbone": True}}},
        {"_attn_implementation": "owner/kernel"},
        {"attn_implementation": {"": "sdpa", "vision": "owner/kernel"}},
    ],
)
def test_what_transformers_would_fetch_is_refused_by_name(folder, fields):
    change(folder, "config.json", **fields)
    with pytest.raises(InputError, match="would let transformers fetch code or weights by name") as caught:
        loading.load_model(str(folder))
    assert caught.value.where == str(folder / "config.json")
    assert next(iter(fields)) in caught.value.rule
    assert caught.value.fix.endswith("give module:function.")


@pytest.mark.parametrize(
    "fields", [{"_attn_implementation": "eager"}, {"backbone": None}, {"use_timm_backbone": False}]
)
def test_what_is_transformers_own_is_read(folder, fields):
    change(folder, "config.json", **fields)
    assert type(loading.load_model(str(folder)).model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "named", [["pipeline"], ["AutoTokenizer"], ["os"], ["__builtins__"], [3], "LlamaForCausalLM", []]
)
def test_an_architecture_is_a_model_class_or_nothing(folder, named):
    change(folder, "config.json", architectures=named)
    try:
        model = loading.load_model(str(folder)).model
    except InputError:
        model = None
    assert model is None or type(model).__name__ in ("LlamaModel", "LlamaForCausalLM")
    assert not owned(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_are_refused(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Owner(str(folder.parent / "OWNED"))))
    with pytest.raises(InputError):
        loading.load_model(str(folder))
    assert not owned(folder)


def test_weights_pickled_by_torch_are_refused_too(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(64, 32)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="transformers must be able to read the model"):
        loading.load_model(str(folder))


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}},
        {"architectures": ["pipeline"]},
        {"architectures": ["AutoModelForCausalLM"]},
        {"architectures": [["LlamaForCausalLM"]]},
        {"model_type": "evil"},
        {"model_type": None},
        {"hidden_size": 1 << 40},
        {"num_hidden_layers": 1 << 30},
        {"num_hidden_layers": -1},
        {"vocab_size": "many"},
        {"_attn_implementation": "evil/kernels"},
    ],
)
def test_a_quantized_checkpoint_s_configuration_is_not_trusted_either(folder, fields, tmp_path):
    model = loading.load_model(str(folder)).model
    autoq.apply(model, autoq.Plan(layers={"model.layers.0.mlp.up_proj": "int8wo"}))
    saved = tmp_path / "quantized"
    autoq.save_quantized(model, saved)
    (saved / "evil.py").write_text((folder / "evil.py").read_text())
    change(saved, "config.json", **fields)
    _seal(saved)
    with pytest.raises(AutoqError) as caught:
        autoq.hf.load(saved)
    assert str(saved) in str(caught.value) or caught.value.where
    assert not owned(folder)


def _seal(saved):
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]
    try:
        from malicious.readers import seal
    finally:
        del sys.path[:2]
    seal(saved)
