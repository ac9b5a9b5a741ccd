"""transformers models with autoq's attention: the same answers as with theirs, wherever it runs, and a way back."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from autoq import attention  # noqa: E402  (needs transformers)
from autoq.errors import InputError  # noqa: E402
from autoq.kv_cache import KVCache  # noqa: E402
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
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "vocab_size": 200,
            "pad_token_id": 0,
            "max_position_embeddings": 256,
        }
        | changes
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tokens(rows=2, length=21):
    return torch.randint(1, 200, (rows, length), generator=torch.Generator().manual_seed(1))


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts calls of the operator, by the number of queries."""

    def __init__(self):
        super().__init__()
        self.queries = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.autoq.attention.default:
            self.queries.append(args[0].shape[2])
        return function(*args, **(kwargs or {}))


@pytest.fixture
def calls():
    with Counted() as counted:
        yield counted.queries


def both(model, run):
    """What a model answers with sdpa and with autoq's attention."""
    found = []
    for name in ("sdpa", "autoq"):
        model.set_attn_implementation(name)
        with torch.inference_mode():
            found.append(run(model))
    return found


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generated_tokens_are_the_same_with_padding_on_the_left(calls, cache):
    model, ids = llama(), tokens()
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    theirs, ours = both(model, lambda m: m.generate(ids, attention_mask=mask, **settings))
    assert torch.equal(theirs, ours)
    assert calls.count(1) == 3 * 11
    assert calls.count(21) == 3


def test_logits_are_those_of_sdpa_with_and_without_a_mask(calls):
    model, ids = llama(), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for given in (None, mask):
        theirs, ours = both(model, lambda m, given=given: m(ids, attention_mask=given).logits)
        kept = slice(None) if given is None else given.bool()
        torch.testing.assert_close(ours[kept], theirs[kept], rtol=1e-4, atol=1e-5)
    assert len(calls) == 6


def test_a_sliding_window_is_kept(calls):
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=200, sliding_window=5,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs, ours = both(model, lambda m: m(tokens()).logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert calls


def test_an_encoder_sees_all_that_is_no_padding(calls):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=200
    )
    model = transformers.AutoModel.from_config(config).eval()
    ids, mask = tokens(), torch.ones(2, 21, dtype=torch.long)
    mask[1, 9:] = 0
    for given in (None, mask):
        theirs, ours = both(model, lambda m, given=given: m(ids, attention_mask=given).last_hidden_state)
        kept = slice(None) if given is None else given.bool()
        torch.testing.assert_close(ours[kept], theirs[kept], rtol=1e-4, atol=1e-5)
    assert len(calls) == 4


@pytest.mark.parametrize("reason", ["gradient", "dropout", "head", "float mask"])
def test_what_the_kernel_does_not_do_goes_to_sdpa(calls, reason):
    model = llama(num_attention_heads=8, num_key_value_heads=2) if reason == "head" else llama()  # 96 / 8 = 12
    model.set_attn_implementation("autoq")
    ids = tokens()
    if reason == "dropout":
        model.config.attention_dropout = 0.5
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        model.train()
    mask = torch.zeros(2, 1, 21, 21) if reason == "float mask" else None
    if reason == "gradient":
        model(ids).logits.sum().backward()
        assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    else:
        with torch.no_grad():
            model(ids, attention_mask=mask)
    assert calls == []


@pytest.mark.parametrize(("precision", "error"), [("int8", 0.01), ("int4", 0.15)])
def test_rounded_keys_and_values_cost_little_with_or_without_a_cache(precision, error):
    model, ids = llama(num_attention_heads=3, num_key_value_heads=1), tokens()  # heads of 32
    with torch.inference_mode():
        plain = model(ids).logits
        with attention.using(model, precision):
            rounded = model(ids).logits
        assert model.config._attn_implementation == "sdpa"
        assert 0 < (rounded - plain).norm() <= error * plain.norm()
        cache = KVCache(
            model.config, batch=2, max_length=30, dtype=torch.float32, device=torch.device("cpu"), kv_cache=precision
        )
        with attention.using(model, precision):
            cached = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(cached, rounded, rtol=1e-4, atol=1e-5)


def test_a_cache_takes_the_bytes_its_precision_says():
    config = llama(num_attention_heads=3, num_key_value_heads=1).config
    sizes = {
        precision: KVCache(
            config, batch=2, max_length=64, dtype=torch.bfloat16, device=torch.device("cpu"), kv_cache=precision
        ).nbytes
        for precision in ("none", "int8", "int4")
    }
    rows = 3 * 2 * 1 * 64 * 2  # layers, sequences, heads, tokens, keys and values
    assert sizes == {"none": rows * 64, "int8": rows * 36, "int4": rows * 20}


@pytest.mark.parametrize(
    ("changes", "precision", "message"),
    [
        ({"num_attention_heads": 2}, "int4", "a multiple of 32 numbers; got 48"),
        ({}, "int2", "kv_cache is one of none, int8, int4; got"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(changes, precision, message):
    with pytest.raises(InputError, match=message):
        KVCache(
            llama(**changes).config,
            batch=1,
            max_length=8,
            dtype=torch.float32,
            device=torch.device("cpu"),
            kv_cache=precision,
        )


def test_layers_that_see_a_window_are_refused():
    config = transformers.MistralConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=5)
    with pytest.raises(InputError, match=r"attends to all tokens.*model\.generate"):
        KVCache(config, batch=1, max_length=8, dtype=torch.float32, device=torch.device("cpu"))
