"""The engines of PyTorch: what they answer, how their bytes are counted, and where their time goes. In this process."""

import types

import pytest
import torch
import transformers

from autoq.applying import apply
from autoq.attention import NAMES
from autoq.decoding import Decoder
from autoq.errors import InputError
from autoq.model_bench import breakdown, loading, own_engines, worker_torch
from autoq.model_bench.breakdown import Call
from autoq.model_bench.torch_engines import Decoding, Eager, NoCache, Static
from autoq.plan import Plan


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=160,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def uncompiled(monkeypatch):
    """The engines' code itself: what compilation changes is tested with whole runs."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


TOKENS = torch.randint(1, 160, (2, 12), generator=torch.Generator().manual_seed(1))


def greedy(engine, tokens, steps):
    found = [engine.ready(tokens)]
    for _ in range(steps):
        found.append(engine.step(found[-1]).argmax(dim=-1, keepdim=True))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("kind", [Eager, Static])
def test_engines_choose_the_tokens_of_generate(model, uncompiled, kind):
    with torch.no_grad():
        engine = kind(model)
        found = greedy(engine, TOKENS, 5)
        again = greedy(engine, TOKENS, 5)
        other = greedy(engine, TOKENS[:1, :7], 5)
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    for tokens, chosen in ((TOKENS, found), (TOKENS, again), (TOKENS[:1, :7], other)):
        expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
        assert torch.equal(chosen, expected[:, tokens.shape[1] :])


@pytest.mark.parametrize("kind", [Eager, Static, NoCache])
def test_prefill_is_the_logits_of_the_last_token(model, uncompiled, kind):
    with torch.no_grad():
        expected = model(TOKENS).logits
        engine = kind(model)
        for _ in range(2):
            torch.testing.assert_close(engine.prefill(TOKENS), expected[:, -1])
        torch.testing.assert_close(engine.logits(TOKENS), expected)


def test_a_prompt_that_is_in_the_cache_is_not_run_again(model, uncompiled, monkeypatch):
    with torch.no_grad():
        engine = Static(model)
        engine.prefill(TOKENS)
        monkeypatch.setattr(engine, "_fill", lambda _: pytest.fail("the prompt was run again"))
        assert torch.equal(greedy(engine, TOKENS, 2), greedy(engine, TOKENS, 2))


def test_a_context_beyond_the_cache_is_refused(model, uncompiled):
    with torch.no_grad():
        engine = Static(model)
        assert engine.max_length == 64
        following = engine.ready(torch.ones(1, 64, dtype=torch.long))
        with pytest.raises(InputError, match="65 tokens of 64"):
            engine.step(following)


def test_an_engine_without_a_cache_only_reads_prompts(model, uncompiled):
    with pytest.raises(InputError, match="only reads prompts"):
        NoCache(model).step(TOKENS[:, :1])


@pytest.mark.parametrize("kv_cache", ["none", "int8"])
def test_the_decoder_serves_each_number_of_rows_and_keeps_its_prompt(model, uncompiled, kv_cache):
    with torch.no_grad():
        model.set_attn_implementation(NAMES[kv_cache])
        engine = Decoding(model, kv_cache=kv_cache)
        expected = Decoder(model, batch=2, max_length=64, kv_cache=kv_cache, compiled=False)
        chosen = [expected.prefill(TOKENS).argmax(dim=-1, keepdim=True)]
        for _ in range(4):
            chosen.append(expected.advance(chosen[-1]).clone())
        for _ in range(2):
            assert torch.equal(advanced(engine, TOKENS, 4), torch.cat(chosen, dim=1))
        assert torch.equal(greedy(engine, TOKENS, 4), torch.cat(chosen, dim=1))
        assert advanced(engine, TOKENS[:1, :7], 4).shape == (1, 5)
        assert engine.kv_bytes_per_token() == 2 * 2 * 2 * (16 * 4 if kv_cache == "none" else 16 + 4)


def advanced(engine, tokens, steps):
    found = [engine.ready(tokens)]
    for _ in range(steps):
        found.append(engine.advance(found[-1]).clone())
    return torch.cat(found, dim=1)


def test_losses_under_a_quantized_cache_are_of_the_numbers_it_holds(model, uncompiled):
    with torch.no_grad():
        engine = Decoding(model, kv_cache="int8")
        found = engine.logits(TOKENS)
        decoder = Decoder(model, batch=2, max_length=64, kv_cache="int8", compiled=False)
        steps = [decoder.prefill(TOKENS[:, :1])] + [decoder.step(one).clone() for one in TOKENS[:, 1:].split(1, dim=1)]
        torch.testing.assert_close(found, torch.stack(steps, dim=1), rtol=1e-4, atol=1e-4)
        assert not torch.equal(found, model(TOKENS).logits)


def test_the_worker_sums_the_losses_of_long_rows(model):
    row = torch.randint(1, 160, (300,), generator=torch.Generator().manual_seed(2))
    logits = torch.randn(300, 160, generator=torch.Generator().manual_seed(3))
    expected = torch.nn.functional.cross_entropy(logits[:-1], row[1:])
    assert worker_torch._loss(logits, row) == pytest.approx(float(expected), rel=1e-5)


def test_engines_that_differ_in_how_they_run_only_are_judged_once(tmp_path):
    engines, _ = own_engines("smollm2", plans={"a": tmp_path / "a.json"}, kv_caches=("none", "int8"))
    judged = {}
    for one in engines:
        judged.setdefault(one.judged, []).append(one.name)
    assert list(judged.values()) == [
        ["bf16-eager", "bf16-compiled", "bf16-compiled-nocache", "bf16-attention", "bf16-decoder"],
        ["autoq-a-stock"],
        ["autoq-a"],
        ["autoq-a-kv-int8"],
    ]


def tied(model):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": True})
    ).eval()


def test_own_engines_hold_siblings_and_tied_tables_once(model, uncompiled, monkeypatch):
    def made(kind):
        monkeypatch.setattr(loading, "load_model", lambda _: types.SimpleNamespace(model=tied(model)))
        return loading.engine_of(model="any", kind=kind, attention="autoq", scheme="int8wo")

    own, stock = made("decoder"), made("static")
    assert own.note == "10 layers fused into 4; the embedding reads the head's packed weight"
    assert stock.note is None
    table = 160 * 64 * 4
    assert loading.weight_bytes(stock.model) - loading.read_bytes(stock.model) == table
    assert loading.weight_bytes(own.model) == loading.read_bytes(own.model)
    assert loading.weight_bytes(own.model) == pytest.approx(loading.read_bytes(stock.model), rel=0.05)
    with torch.no_grad():
        torch.testing.assert_close(own.prefill(TOKENS), own.logits(TOKENS)[:, -1], rtol=1e-4, atol=1e-4)
        order = breakdown.calls_in_order(own, TOKENS[:, :1])
    assert order[64, 128] == ["int8wo"] * 2  # queries, keys and values
    assert order[64, 192] == ["int8wo"] * 2  # gate and up


def test_weights_count_once_and_an_embedding_of_its_own_is_not_read(model):
    table = model.get_input_embeddings().weight.nbytes
    assert loading.weight_bytes(model) == sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    assert loading.weight_bytes(model) - loading.read_bytes(model) == table
    other = tied(model)
    assert loading.read_bytes(other) == loading.weight_bytes(other) == loading.weight_bytes(model) - table


def test_packed_weights_count_as_they_are_packed(model):
    before = loading.weight_bytes(model)
    layer = model.model.layers[0].mlp.up_proj
    size = layer.weight.nbytes
    apply(model, Plan(layers={"model.layers.0.mlp.up_proj": "int8wo"}))
    assert loading.weight_bytes(model) == before - size + model.model.layers[0].mlp.up_proj.packed.nbytes


@pytest.mark.parametrize("kind", ["decode", ""])
def test_an_engine_that_does_not_exist_is_refused(kind):
    with pytest.raises(InputError, match="an engine of PyTorch is one of eager, static"):
        loading.engine_of(model="smollm2", kind=kind, attention="sdpa")


def test_calls_of_one_shape_are_told_apart_by_their_order(model):
    layers = {
        f"model.layers.{i}.self_attn.{name}_proj": scheme
        for i, name, scheme in ((0, "q", "int8wo"), (0, "o", "fp6"), (1, "q", "fp6"), (1, "o", "int8wo"))
    }
    apply(model, Plan(layers=layers))
    with torch.no_grad():
        found = breakdown.calls_in_order(Eager(model), TOKENS[:, :1])
    assert [one.partition("(")[0] for one in found[64, 64]] == ["int8wo", "fp6", "fp6", "int8wo"]
    assert breakdown.head_shape(model) == (64, 160)


def test_parts_are_sums_of_the_outermost_kernels():
    calls = [
        Call("Torch-Compiled Region: 0/0", 0, 100_000_000),
        Call("autoq::linear", 1_000_000, 4_000_000, (64, 64)),
        Call("aten::empty", 2_000_000, 1_000_000),
        Call("autoq::linear", 6_000_000, 2_000_000, (64, 64)),
        Call("autoq::attention", 10_000_000, 3_000_000),
        Call("graph_0_cpp_fused_mul_rsqrt_1", 20_000_000, 500_000),
        Call("aten::_weight_int8pack_mm", 21_000_000, 250_000),
        Call("autoq::linear", 30_000_000, 7_000_000, (64, 160)),
        Call("autoq::linear", 40_000_000, 5_000_000, (64, 96)),
        Call("graph_0_cpp_fused_argmax_9", 50_000_000, 125_000),
    ]
    order = {(64, 64): ["int8wo", "fp6"], (64, 160): ["int4wo-hqq"]}
    found = breakdown.parts_ms(calls, order=order, head=(64, 160))
    assert found == {
        "linear int8wo": 4.0,
        "linear fp6": 2.0,
        "attention": 3.0,
        "norms, rotary and other kernels": 0.5,
        "linear": 5.25,
        "lm_head int4wo-hqq": 7.0,
        "sampling": 0.125,
    }


def test_the_rest_is_pythons_and_never_negative():
    found = breakdown.whole({"attention": 3.0, "linear": 1.0}, 10.0)
    assert found == {"attention": 3.0, "linear": 1.0, breakdown.REST: 6.0}
    slower = breakdown.whole({"attention": 30.0, "linear": 10.0}, 10.0)
    assert slower == pytest.approx({"attention": 7.5, "linear": 2.5, breakdown.REST: 0.0})


def test_own_attention_is_switched_on_by_its_name(tmp_path, monkeypatch, model):
    monkeypatch.setattr(loading, "load_model", lambda _: types.SimpleNamespace(model=model))
    engine = loading.engine_of(model="any", kind="eager", attention="autoq", scheme="int8wo")
    assert engine.model.config._attn_implementation == "autoq"
    assert engine.model.model.layers[1].mlp.down_proj.scheme == "int8wo"
