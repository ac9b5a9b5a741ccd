"""autoq.generate: the tokens of model.generate, one graph for a growing cache, and sampling from the right weights."""

import gc
import weakref

import pytest
import torch

transformers = pytest.importorskip("transformers")

import autoq  # noqa: E402
from autoq.decoding import Decoder  # noqa: E402
from autoq.errors import InputError  # noqa: E402
from autoq.sampling import Sampling  # noqa: E402
from autoq_kernels.cpu import build  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    build.load()


def llama(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 96,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "vocab_size": 200,
            "pad_token_id": 0,
            "max_position_embeddings": 256,
        }
        | changes
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tokens(rows=2, length=21, seed=1):
    return torch.randint(1, 200, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(ids):
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return mask


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tuned", [False, True])
def test_greedy_tokens_are_those_of_transformers(tuned, compiled):
    model, ids = llama(), tokens()
    if tuned:
        layers = {name: "int8wo" for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
        autoq.apply(model, autoq.Plan(layers=layers))
    for prompt, mask in ((ids, None), (ids, padded(ids)), (tokens(seed=2), None)):
        ours = autoq.generate(model, prompt, attention_mask=mask, max_new_tokens=30, compiled=compiled)
        theirs = model.generate(prompt, attention_mask=mask, max_new_tokens=30, do_sample=False)
        assert torch.equal(ours, theirs)
    assert model.config._attn_implementation == "sdpa"


def test_a_sequence_that_ends_is_padded_and_all_ended_stop():
    model, ids = llama(), tokens()
    free = autoq.generate(model, ids, max_new_tokens=20, eos_token_id=[], compiled=False)[:, 21:]
    end = int(free[0, 4])
    stop = 1 + max(int((row == end).nonzero()[0]) if (row == end).any() else 19 for row in free)
    ours = autoq.generate(model, ids, max_new_tokens=20, eos_token_id=end, pad_token_id=7, compiled=False)
    theirs = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=end, pad_token_id=7)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] == 21 + stop
    first = int((ours[0, 21:] == end).nonzero()[0])
    assert ours[0, 21 + first + 1 :].eq(7).all()


def test_one_graph_serves_a_growing_cache_and_the_next_call():
    model, ids = llama(torch.bfloat16), tokens(1)
    torch._dynamo.utils.counters.clear()
    first = autoq.generate(model, ids, max_new_tokens=2)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    again = autoq.generate(model, ids, max_new_tokens=40)
    other = autoq.generate(model, tokens(1, 9), max_new_tokens=40)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert torch.equal(again[:, : first.shape[1]], first)
    assert other.shape == (1, 49)


def test_a_changed_model_is_compiled_anew():
    model, ids = llama(), tokens(1)
    before = autoq.generate(model, ids, max_new_tokens=12)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, dims=0))  # in place: the same graph, other tokens
    rolled = autoq.generate(model, ids, max_new_tokens=1)
    assert int(rolled[0, -1]) == (int(before[0, 21]) + 1) % 200
    model.lm_head = torch.nn.Linear(96, 200, bias=False)
    ours = autoq.generate(model, ids, max_new_tokens=12)
    assert torch.equal(ours, model.generate(ids, max_new_tokens=12, do_sample=False))


def test_the_model_is_not_kept_alive_and_nothing_hangs_on_it():
    model = llama()
    names = set(vars(model))
    autoq.generate(model, tokens(1), max_new_tokens=3, compiled=False)
    assert set(vars(model)) == names
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_streamer_gets_what_is_returned():
    class Kept:
        def __init__(self):
            self.values, self.ended = [], False

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.ended = True

    model, ids, kept = llama(), tokens(1), Kept()
    found = autoq.generate(model, ids, max_new_tokens=6, eos_token_id=[], streamer=kept, compiled=False)
    assert torch.equal(torch.cat([kept.values[0][0], *kept.values[1:]]), found[0])
    assert len(kept.values) == 7
    assert kept.ended


def test_a_compiled_prompt_of_any_length_gives_the_same_logits():
    model = llama()
    compiled = Decoder(model, batch=2, max_length=64, compiled=False, compiled_prefill=True)
    eager = Decoder(model, batch=2, max_length=64, compiled=False)
    torch._dynamo.utils.counters.clear()
    for length in (21, 13, 40, 2):
        ids = tokens(length=length)
        torch.testing.assert_close(compiled.prefill(ids), eager.prefill(ids), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_decoder_rewinds():
    model, ids = llama(), tokens(1)
    decoder = Decoder(model, max_length=32, compiled=False)
    decoder.prefill(ids)
    first = decoder.step(ids[:, :1]).clone()
    decoder.step(ids[:, 1:2])
    decoder.rewind(21)
    assert decoder.length == 21
    assert torch.equal(decoder.step(ids[:, :1]), first)


@pytest.mark.parametrize("top_k", [None, 5, 1000])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.9, 1.0])
def test_weights_are_those_of_transformers(top_k, top_p):
    logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [2.0], [6.0]])
    expected = transformers.TemperatureLogitsWarper(0.7)(None, logits)
    if top_k is not None:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None and top_p < 1:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    weights, words = Sampling(temperature=0.7, top_k=top_k, top_p=top_p).weights(logits)
    dense = weights if words is None else torch.zeros(3, 700).scatter(1, words, weights)
    torch.testing.assert_close(dense / dense.sum(1, keepdim=True), expected.softmax(dim=-1), rtol=1e-4, atol=1e-6)


def test_drawing_follows_the_weights_and_the_seed():
    logits = torch.tensor([[1.0, 0.0, -1.0, 3.0]]).expand(20_000, 4)
    drawn = Sampling(temperature=2.0).choose(logits, torch.Generator().manual_seed(0))
    share = drawn[:, 0].bincount(minlength=4) / 20_000
    torch.testing.assert_close(share, (logits[0] / 2).softmax(0), atol=0.012, rtol=0)
    model, ids = llama(), tokens()
    first, again, other = (
        autoq.generate(model, ids, max_new_tokens=12, temperature=1.0, top_p=0.95, seed=seed, compiled=False)
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 1 or more; got 0"),
        ({"temperature": -1.0}, "temperature is 0 or more"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is above 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 1 or more"),
        ({"top_k": 5}, "Give a temperature"),
        ({"kv_cache": "fp8"}, "kv_cache is one of none, int8, int4"),
        ({"attention_mask": torch.tensor([[1] * 20 + [0]])}, "padding is on the left"),
        ({"attention_mask": torch.ones(1, 5)}, "has the prompt's shape"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, message):
    if "attention_mask" in arguments and arguments["attention_mask"].shape[1] == 5:
        arguments["attention_mask"][0, 0] = 0
    with pytest.raises(InputError, match=message):
        autoq.generate(llama(), tokens(1), compiled=False, **arguments)


def test_settings_that_the_loop_does_not_have_are_refused_not_ignored():
    model = llama()
    model.generation_config.repetition_penalty = 1.2
    with pytest.raises(InputError, match=r"generation_config.*no repetition_penalty; got 1\.2.*model\.generate"):
        autoq.generate(model, tokens(1), max_new_tokens=2)


def test_other_models_are_refused():
    with pytest.raises(InputError, match="serves models of transformers"):
        autoq.generate(torch.nn.Linear(2, 2), tokens(1))
    config = transformers.MistralConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        intermediate_size=64,
        sliding_window=8,
    )
    windowed = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="attends to all tokens"):
        autoq.generate(windowed, tokens(1))
