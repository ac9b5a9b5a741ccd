"""transformers' own ``from_pretrained`` and ``save_pretrained`` with models that autoq quantized."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import autoq
from autoq.applying import apply, plan_of, restore
from autoq.checkpoint import save_quantized
from autoq.errors import CheckpointError, InputError
from autoq.modules import find_linears, quantized_layers
from autoq.plan import Plan

transformers = pytest.importorskip("transformers")
from autoq import hf  # noqa: E402
from autoq.hf_quantizer import AutoqConfig  # noqa: E402

TOKENS = torch.arange(12).view(2, 6)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
SCHEMES = ("int8wo", "sinq(bits=4,group_size=32)", "none", "fp6(format=e3m2)", "int8dq")


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """No bars, no reports."""
    logging = transformers.utils.logging
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def make(kind="LlamaForCausalLM", **fields):
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.LlamaConfig(**sizes | heads | fields)).eval().bfloat16()


def quantized(**fields):
    """A model with several schemes, its head among them."""
    model = make(**fields)
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in LINEARS]
    plan = Plan(
        layers={name: SCHEMES[i % len(SCHEMES)] for i, name in enumerate(names)}, provenance={"comment": "mixed"}
    )
    apply(model, plan, keep_float=True)
    return model


@pytest.fixture(scope="module")
def model():
    return quantized()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "llama"
    save_quantized(model, path)
    return path


@pytest.fixture(scope="module")
def resaved(model, tmp_path_factory):
    """What transformers' own ``save_pretrained`` writes."""
    path = tmp_path_factory.mktemp("hf") / "resaved"
    model.save_pretrained(path)
    return path


def same(one, other):
    with torch.no_grad():
        return torch.equal(one(TOKENS).logits, other(TOKENS).logits)


def states(model):
    """Every tensor of a model, packed weights as bytes."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def check_equal(loaded, model):
    assert type(loaded) is type(model)
    assert not any(module.training for module in loaded.modules())
    ours, theirs = states(loaded), states(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert same(loaded, model)
    assert plan_of(loaded) == plan_of(model)
    assert loaded.lm_head.candidate.scheme == model.lm_head.candidate.scheme


def test_from_pretrained_gives_the_same_model_as_load(folder, model):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    check_equal(loaded, model)
    check_equal(hf.load(folder), loaded)
    assert {one.device.type for one in states(loaded).values()} == {"cpu"}
    assert loaded.generate(TOKENS[:1], do_sample=False, max_new_tokens=3).shape == (1, 9)
    assert loaded.hf_quantizer.is_autoq
    assert "_keys_to_ignore_on_load_unexpected" not in vars(loaded)


def test_nothing_is_missing_unexpected_or_read_twice(folder, caplog, monkeypatch):
    opened = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: opened.append(real(*arguments)) or opened[-1])
    _, info = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (no iterator)
    assert sum(opened) == stored
    assert "REPORT" not in caplog.text


def test_the_model_is_built_without_float_weights(folder, linear_devices):
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert linear_devices == {"meta"}


def test_save_pretrained_of_a_tuned_model_opens_again(resaved, model):
    assert {path.name for path in resaved.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(resaved)
    check_equal(loaded, model)


def test_so_does_one_in_shards_of_a_loaded_model(folder, model, tmp_path):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    loaded.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check_equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model)
    save_quantized(loaded, tmp_path / "again")
    check_equal(hf.load(tmp_path / "again"), model)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_the_files_of_a_folder_are_enough_without_its_manifest(folder, model, tmp_path):
    """As the cache of the Hub has them: links to the configuration and the tensors."""
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    check_equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model)
    (tmp_path / "autoq.json").symlink_to(folder / "autoq.json")
    check_equal(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_a_base_model_is_saved_and_opened_alone(model, tmp_path):
    model.model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaModel
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).last_hidden_state, model.model(TOKENS).last_hidden_state)


def others():
    """Kinds of models besides Llama: transposed weights, two stacks, experts as parameters, experts as layers."""
    common = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 96}
    moe = common | {"hidden_size": 64, "num_key_value_heads": 1, "num_local_experts": 4}
    yield transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
        )
    )
    yield transformers.BertModel(transformers.BertConfig(hidden_size=64, **common))
    yield transformers.MixtralForCausalLM(transformers.MixtralConfig(**moe))
    yield autoq.split_experts(transformers.MixtralForCausalLM(transformers.MixtralConfig(**moe)))


def test_other_kinds_of_models_come_back_too(tmp_path):
    torch.manual_seed(0)
    for number, model in enumerate(others()):
        model.eval().bfloat16()
        names = [site.name for site in find_linears(model) if site.reason is None]
        count = len(apply(model, Plan(layers=dict.fromkeys(names, "int8wo"))).applied)
        assert count == (5, 7, 5, 13)[number]
        folder, resaved = tmp_path / f"{number}", tmp_path / f"{number}-resaved"
        save_quantized(model, folder)
        model.save_pretrained(resaved)
        wanted = model(TOKENS)[0]
        for loaded in (hf.load(folder), type(model).from_pretrained(folder), type(model).from_pretrained(resaved)):
            assert torch.equal(loaded(TOKENS)[0], wanted)
            assert len(quantized_layers(loaded)) == count


def test_an_asked_for_dtype_is_the_one_of_to(folder, model):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = copy.deepcopy(model).to(torch.float32)
    assert loaded.dtype == torch.float32
    assert same(loaded, wanted)
    assert [one.dtype for one in quantized_layers(loaded).values()] == [torch.float32] * 15


def test_a_quantized_model_is_on_one_device(folder, model):
    for device_map in ("auto", "cpu", {"": "cpu"}, torch.device("cpu")):
        assert same(transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map), model)
    for device_map in ("balanced", {"model": "cpu", "lm_head": "disk"}):
        with pytest.raises(InputError, match="a quantized model is on one device"):
            transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)


def test_a_changed_file_is_refused(folder, tmp_path):
    save_quantized(hf.load(folder), tmp_path / "llama")
    path = tmp_path / "llama" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file is as it was saved"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")


def test_tensors_that_autoq_did_not_write_are_refused(folder, tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert entry == {"quant_method": "autoq", "autoq": autoq.__version__}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    with pytest.raises(CheckpointError, match=r"have 'autoq' in their metadata; got none\. Remove \"quantization_con"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


NOTES = {
    "no JSON": ("{", "holds one complete JSON value"),
    "a key less": ('{"schema": 3, "layers": {}, "tied": {}}', "has schema, layers, tied and plan"),
    "a newer schema": ('{"schema": 99, "layers": {}, "tied": {}, "plan": {}}', "reads checkpoints up to schema 3"),
    "layers in a list": ('{"schema": 3, "layers": [], "tied": {}, "plan": {}}', r"\$\.layers is an object"),
    "tied to a number": ('{"schema": 3, "layers": {}, "tied": {"a": 1}, "plan": {}}', r"\$\.tied\[\"a\"\] is a name"),
    "no plan": ('{"schema": 3, "layers": {}, "tied": {}, "plan": 5}', "a plan is a JSON object"),
}


@pytest.mark.parametrize("name", NOTES)
def test_forged_metadata_is_refused(resaved, tmp_path, name):
    from safetensors.torch import load_file, save_file

    text, says = NOTES[name]
    (tmp_path / "config.json").write_bytes((resaved / "config.json").read_bytes())
    save_file(load_file(resaved / "model.safetensors"), tmp_path / "model.safetensors", {"format": "pt", "autoq": text})
    with pytest.raises((CheckpointError, autoq.AutoqError), match=says):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


CHILD = """
import sys, transformers
transformers.utils.logging.disable_progress_bar()
folders = sys.argv[1:]
for folder in folders:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as problem:
        print(f"refused: {problem}")
assert "autoq" not in sys.modules
import autoq.hf
for folder in folders:
    print(len(autoq.plan_of(transformers.AutoModelForCausalLM.from_pretrained(folder)).layers))
"""


def test_transformers_refuses_the_folders_until_autoq_hf_is_imported(folder, resaved):
    """Never a model with made-up weights: the stored headers have the weights' names and another shape."""
    run = [sys.executable, "-c", CHILD, str(folder), str(resaved)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    refused = "refused: You set `ignore_mismatched_sizes` to `False`, thus raising an error."
    lines = done.stdout.splitlines()
    assert [line[: len(refused)] for line in lines[:2]] == [refused] * 2
    assert lines[2:] == ["15", "15"]
    assert done.stderr.count("Unknown quantization type, got autoq") == 2


def test_a_float_model_is_not_quantized_by_the_config(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=AutoqConfig())


def test_a_state_dict_beside_the_folder_is_refused(folder):
    with pytest.raises(InputError, match="is read from its files"):
        transformers.LlamaForCausalLM.from_pretrained(
            None, config=transformers.AutoConfig.from_pretrained(folder), state_dict={}
        )


def test_the_mark_moves_with_the_model_and_goes_with_the_quantization(model, tmp_path):
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.hf_quantizer.is_autoq
        assert same(twin, model)
    twin = copy.deepcopy(model)
    restore(twin)
    assert not hasattr(twin, "hf_quantizer")
    twin.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, twin.model.layers[1].mlp.up_proj.weight)


def test_a_plan_that_changes_nothing_leaves_no_mark(tmp_path):
    plain = make().float()
    apply(plain, Plan(layers={"lm_head": "none"}))
    assert not hasattr(plain, "hf_quantizer")


def test_save_pretrained_writes_what_is_quantized_now(tmp_path):
    model = quantized()
    apply(model, Plan(layers={"lm_head": "int8wo"}), keep_float=True)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.scheme == "int8wo"
    assert same(loaded, model)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["autoq"])["plan"]["layers"]["lm_head"] == {"scheme": "int8wo"}


def test_the_tokenizer_may_be_saved_before_or_after(model, tmp_path):
    (Path(tmp_path) / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path)
    assert same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert (Path(tmp_path) / "tokenizer.json").read_text() == "{}"
