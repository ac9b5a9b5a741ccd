"""An embedding that reads the output layer's packed table."""

import copy
import io

import pytest
import torch
from torch import nn

import autoq
from autoq.errors import CheckpointError, ModelError
from autoq.quant_embedding import QuantEmbedding

N, K = 203, 64
SCHEMES = ["int8wo", "int4wo-hqq(group_size=32)", "int4dq(group_size=64)", "fp6", "sinq(bits=5,group_size=64)"]


class Net(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.tokens, self.places = nn.Embedding(N, K), nn.Embedding(16, K)
        self.fc, self.head = nn.Linear(K, K), nn.Linear(K, N, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[-1]))
        return self.head(x + self.fc(x))


def tuned(scheme="int8wo", dtype=torch.float32, tied=True, **options):
    torch.manual_seed(0)
    model = Net(tied).eval().to(dtype)
    autoq.apply(model, autoq.Plan(layers={"fc": "int8wo", "head": scheme}), **options)
    return model


def ids(*shape):
    return torch.randint(N, shape or (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_embedding_is_the_heads_weight(scheme, dtype):
    model = tuned(scheme, dtype)
    float_bytes = model.tokens.weight.nbytes
    shared = autoq.share_embedding(model)
    assert (shared.embedding, shared.layer, shared.freed_bytes) == ("tokens", "head", float_bytes)
    assert 0 < shared.error < 0.2
    assert f"{float_bytes} bytes" in str(shared)
    assert not list(model.tokens.parameters())
    assert not list(model.tokens.buffers())
    rows = model.tokens(ids())
    assert rows.dtype == dtype
    assert torch.equal(rows, model.head.weight[ids()])
    assert torch.equal(rows, model.tokens.weight[ids()])


def test_all_else_computes_as_before():
    model, other = tuned(), tuned()
    autoq.share_embedding(model)
    other.tokens.weight.data.copy_(model.head.weight)
    with torch.no_grad():
        assert torch.equal(model(ids()), other(ids()))


def test_compiled():
    model = tuned("int4wo-hqq(group_size=32)")
    autoq.share_embedding(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(ids()), model(ids()))
        plan = autoq.plan_of(model)
        assert plan.layers["head"].name == "int4wo-hqq"


def test_gradients_of_the_rest():
    model = tuned()
    autoq.share_embedding(model)
    model(ids()).square().mean().backward()
    assert model.places.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: torch.load(saved(one), weights_only=False)])
def test_copies_read_their_own_layer(copied):
    model = tuned()
    autoq.share_embedding(model)
    other = copied(model)
    assert other.tokens.source is other.head
    assert torch.equal(other(ids()), model(ids()))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_conversions_of_dtype():
    model = tuned()
    autoq.share_embedding(model)
    assert model.bfloat16().tokens(ids()).dtype == torch.bfloat16


def test_the_state_has_the_table_once():
    model = tuned()
    autoq.share_embedding(model)
    state = model.state_dict()
    assert not [name for name in state if name.startswith("tokens.")]
    other = tuned()
    autoq.share_embedding(other)
    other.load_state_dict(state)


def test_the_layer_may_change_its_scheme():
    model = tuned(keep_float=True)
    autoq.share_embedding(model)
    autoq.apply(model, autoq.Plan(layers={"head": "fp6"}))
    assert torch.equal(model.tokens(ids()), model.head.weight[ids()])


def test_the_layer_stays_quantized():
    model = tuned(keep_float=True)
    autoq.share_embedding(model)
    with pytest.raises(ModelError, match="share_embedding"):
        autoq.restore(model)
    with pytest.raises(ModelError, match="share_embedding"):
        autoq.apply(model, autoq.Plan(layers={"head": "none"}))
    assert isinstance(model.tokens, QuantEmbedding)


def test_checkpoints_are_written_before(tmp_path):
    model = tuned()
    autoq.save_quantized(model, tmp_path / "model")
    autoq.share_embedding(model)
    with pytest.raises(CheckpointError, match="tokens"):
        autoq.save_quantized(model, tmp_path / "shared")
    assert not (tmp_path / "shared").exists()
    loaded = autoq.load_quantized(Net, tmp_path / "model")
    autoq.share_embedding(loaded)
    assert torch.equal(loaded(ids()), model(ids()))


def test_a_shared_layer_is_not_fused():
    torch.manual_seed(0)
    model = Net()
    model.fc = nn.Linear(K, K, bias=False)
    autoq.apply(model, autoq.Plan(layers={"fc": "int8wo", "head": "int8wo"}))
    autoq.share_embedding(model)
    with pytest.raises(ModelError, match="an embedding reads"):
        autoq.fuse(model, groups=[["fc", "head"]])


def test_refusals():
    with pytest.raises(ModelError, match="no such pair"):
        autoq.share_embedding(tuned(tied=False))
    with pytest.raises(ModelError, match="no such pair"):
        autoq.share_embedding(Net())
    model = tuned()
    autoq.share_embedding(model)
    with pytest.raises(ModelError, match="no such pair"):
        autoq.share_embedding(model)
    model = tuned()
    model.tokens.max_norm = 1.0
    with pytest.raises(ModelError, match="max_norm"):
        autoq.share_embedding(model)

    class Scaled(nn.Embedding):
        def forward(self, input):
            return super().forward(input) * 8

    model = tuned()
    scaled = Scaled(N, K)
    scaled.weight = model.tokens.weight
    model.tokens = scaled
    with pytest.raises(ModelError, match="Scaled"):
        autoq.share_embedding(model)


def test_tokens_outside_the_table_are_refused():
    model = tuned()
    autoq.share_embedding(model)
    with pytest.raises(IndexError):
        model(torch.tensor([[N]]))


def test_in_a_transformers_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=K, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=N, pad_token_id=0, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    layers = {name: "int8wo" for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    autoq.apply(model, autoq.Plan(layers=layers))
    options = {"max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(ids(2, 5), **options)
    report = autoq.fuse(model)
    assert len(report.fused) == 4
    assert not report.left
    assert torch.equal(model.generate(ids(2, 5), **options), wanted)
    autoq.share_embedding(model)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert model.generate(ids(2, 5), **options).shape == wanted.shape
    with pytest.raises(TypeError, match="QuantEmbedding"):
        model.resize_token_embeddings(N + 8)
    with pytest.raises(CheckpointError, match="share_embedding"):
        model.save_pretrained(tmp_path)
