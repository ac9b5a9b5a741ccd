"""A model of transformers in one line, and its scores in the lm-evaluation-harness."""

import importlib.util
import math

import pytest
import torch

import autoq
from autoq import hf
from autoq.applying import apply
from autoq.errors import CheckpointError, InputError
from autoq.plan import Plan

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

_TEXT = "the of and to a in is that for it as was with be by on not he his but at are this have from"
WORDS = _TEXT.split(" ")
TEXT = " ".join(WORDS[(7 * i * i + 3 * i) % len(WORDS)] for i in range(2100))


@pytest.fixture(scope="module")
def tokenizer():
    """A word a token."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )


def make():
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tuned") / "tiny"
    make().save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "text.txt").write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def tuned(tokenizer, model_folder, tmp_path_factory):
    return hf.tune(
        torch.compile(make(), backend="eager"),
        tokenizer=tokenizer,
        text=model_folder / "text.txt",
        rows=32,
        phases={"prompt": autoq.Phase(torch.arange(12).view(2, 6))},
        candidates=["int8wo"],
        max_degradation=0.5,
        objective="memory",
        n_trials=2,
        cache_dir=tmp_path_factory.mktemp("cache"),
    )


def test_a_folder_is_loaded_with_its_tokenizer_and_the_settings_are_those_of_tune(model_folder, monkeypatch):
    class Called(Exception):  # noqa: N818 (no error)
        pass

    def called(*arguments, **settings):
        raise Called(*arguments, settings)

    monkeypatch.setattr("autoq.hf_tuning.tune_model", called)
    with pytest.raises(Called) as caught:
        hf.tune(str(model_folder), text=model_folder / "text.txt", rows=3, max_degradation=0.02, ties="siblings")
    model, tokens, settings = caught.value.args
    assert type(model) is transformers.LlamaForCausalLM
    assert tokens.shape == (3, 64)
    assert tokens[0, :3].tolist() == [WORDS.index(word) + 2 for word in TEXT.split(" ")[:3]]
    assert settings == {"max_degradation": 0.02, "ties": "siblings"}
    batches = [torch.arange(6).view(1, 6)]
    with pytest.raises(Called) as caught:
        hf.tune(str(model_folder), batches=batches)
    assert caught.value.args[1:] == (batches, {})


def test_a_model_is_tuned_and_quantized_in_one_line(tuned):
    assert type(tuned.model._orig_mod) is transformers.LlamaForCausalLM
    assert tuned.judged_by.startswith("32 rows of 64 tokens of ")
    assert set(tuned.report.applied) == {name for name, one in tuned.result.plan.layers.items() if str(one) != "none"}
    assert str(tuned.report.applied["lm_head"]) == "int8wo"
    assert autoq.plan_of(tuned.model) == tuned.result.plan
    prompt = tuned.tokenizer("the of and", return_tensors="pt")
    assert tuned.model.generate(**prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 5)


def test_what_was_tuned_is_saved_and_opened_by_name(tuned, tmp_path):
    tuned.save(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(tokens[:, :50]).logits, tuned.model(tokens[:, :50]).logits)
    with pytest.raises(CheckpointError, match=r"writable|replaces only"):
        tuned.save(tmp_path / "out" / "config.json")


def test_a_model_is_taken_with_its_tokenizer_or_batches(tokenizer, model_folder):
    with pytest.raises(InputError, match=r"LlamaForCausalLM: .*got neither. Pass tokenizer=, or batches="):
        hf.tune(make())
    with pytest.raises(InputError, match="judged by text or by batches; got both"):
        hf.tune(make(), tokenizer=tokenizer, batches=torch.arange(6).view(1, 6), text="text.txt")
    with pytest.raises(InputError, match="a model by name comes with its tokenizer"):
        hf.tune(model_folder, tokenizer=tokenizer)
    (model_folder / "short.txt").write_text("")
    with pytest.raises(InputError, match="the text has at least 64 tokens; got 0"):
        hf.tune(make(), tokenizer=tokenizer, text=model_folder / "short.txt")


def test_the_module_has_its_names_and_no_others():
    assert hf.__all__ == ["Tuned", "lm_eval_model", "load", "tune"]
    assert all(callable(getattr(hf, name)) for name in hf.__all__)
    with pytest.raises(AttributeError, match=r"module 'autoq\.hf' has no attribute 'train'"):
        _ = hf.train


# -- the lm-evaluation-harness -----------------------------------------------------------------------------------------


def test_without_the_harness_it_says_what_to_install(tokenizer, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    with pytest.raises(
        InputError, match=r"needs the lm-evaluation-harness; got it is not installed\. Run: pip install"
    ):
        hf.lm_eval_model(make(), tokenizer)


SHORT = [" ".join(TEXT.split(" ")[i : i + 40]) for i in (0, 60)]
ROWS = [{"query": " ".join(WORDS[i : i + 6]), "choices": WORDS[i + 6 : i + 9], "gold": i % 3} for i in range(12)]


@pytest.fixture(scope="module")
def evaluate():
    """Scores of two tasks of a few rows: which of three words follows, and the perplexity of a text."""
    lm_eval = pytest.importorskip("lm_eval")
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    choice = {
        "task": "next_word",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(ROWS)},
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    rolling = {
        "task": "words",
        "custom_dataset": lambda **_: {"test": Dataset.from_list([{"text": text} for text in SHORT])},
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    tasks = [one | {"test_split": "test", "num_fewshot": 0} for one in (choice, rolling)]
    manager = TaskManager(include_defaults=False)  # its own thousands of files are not needed

    def run(model, tokenizer):
        subject = hf.lm_eval_model(model, tokenizer)
        found = lm_eval.simple_evaluate(model=subject, tasks=tasks, task_manager=manager, bootstrap_iters=0)
        return found["results"], found["samples"]

    return run


@pytest.fixture(scope="module", autouse=True)
def offline():
    """Nothing is fetched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def log_likelihood(model, tokenizer, query, word):
    """Of a word after a text, computed by hand."""
    tokens = tokenizer(f"{query} {word}", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(torch.log_softmax(model(tokens).logits[0, -2].float(), -1)[tokens[0, -1]])


def test_the_harness_s_scores_are_those_of_the_quantized_model(evaluate, tokenizer):
    model = make()
    names = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    apply(model, Plan(layers=dict.fromkeys(names, "int4wo-hqq(group_size=32)")))
    results, samples = evaluate(torch.compile(model), tokenizer)
    by_hand = [[log_likelihood(model, tokenizer, row["query"], word) for word in row["choices"]] for row in ROWS]
    for sample in samples["next_word"]:
        wanted = by_hand[sample["doc_id"]]
        assert [float(one[0]) for one in sample["filtered_resps"]] == pytest.approx(wanted, abs=1e-4)
    hits = [max(range(3), key=lambda i: one[i]) == row["gold"] for one, row in zip(by_hand, ROWS, strict=True)]
    assert results["next_word"]["acc,none"] == pytest.approx(sum(hits) / len(hits))
    total = 0.0
    for tokens in [tokenizer(text, return_tensors="pt")["input_ids"] for text in SHORT]:
        whole = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), tokens], dim=1)
        with torch.no_grad():
            found = torch.log_softmax(model(whole[:, :-1]).logits[0].float(), -1)
        total += float(found.gather(1, tokens.T).sum())
    assert results["words"]["word_perplexity,none"] == pytest.approx(math.exp(-total / 80), rel=1e-4)


def test_the_harness_takes_models_of_transformers_only(tokenizer):
    pytest.importorskip("lm_eval")
    with pytest.raises(InputError, match="the harness evaluates transformers models; got Linear"):
        hf.lm_eval_model(torch.nn.Linear(2, 2), tokenizer)
