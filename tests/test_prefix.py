"""Running a model from a block on gives bit for bit what running all of it gives, or says why it cannot."""

import pytest
import torch
from torch import nn

from autoq.losses import as_batches
from autoq.prefix import Prefix
from autoq.scheme import Scheme
from autoq.shadow import PackedStore, Shadow


class Block(nn.Module):
    """A residual block that returns a tuple, and changes its input in place as some models' do."""

    def __init__(self, width=32):
        super().__init__()
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x, bias):
        x += self.down(torch.relu(self.up(x)))
        return x, bias


class Net(nn.Module):
    def __init__(self, blocks=5, block=Block):
        super().__init__()
        self.into = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(block() for _ in range(blocks))
        self.head = nn.Linear(32, 10)

    def start(self, x):
        return self.into(x), torch.ones(())

    def forward(self, x):
        hidden, bias = self.start(x)
        for block in self.blocks:
            hidden, bias = block(hidden, bias)
        return {"logits": self.head(hidden) + bias}


def made(kind=Net, **arguments):
    torch.manual_seed(0)
    return kind(**arguments).eval()


BATCHES = as_batches(list(torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))))


@torch.no_grad()
def logits(model, batch):
    return batch.call(model)["logits"]


def test_every_block_and_batch_gives_what_the_whole_model_gives():
    model, seen = made(), {}
    prefix = Prefix(model, model.blocks, BATCHES, seen=lambda index, outputs: seen.update({index: outputs["logits"]}))
    assert prefix.reason == ""
    for index, batch in enumerate(BATCHES):
        whole = logits(model, batch)
        assert torch.equal(seen[index], whole)
        for block in (5, 0, 3, 1, 4, 2, 5):  # twice the same: what is stored is not changed by what runs on it
            with prefix.from_block(block, index):
                assert torch.equal(logits(model, batch), whole)
    assert prefix.blocks_run == 3 * (0 + 5 + 2 + 4 + 1 + 3 + 0)
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_a_changed_layer_is_seen_from_its_block_on():
    model = made()
    shadow = Shadow(model, PackedStore(model, ["into", "blocks.3.up", "head"]))
    prefix = Prefix(shadow.model, shadow.model.blocks, BATCHES)
    assert [prefix.start(layer) for layer in ("into", "blocks.0.up", "blocks.3.up", "head")] == [0, 0, 3, 5]
    plain = logits(shadow.model, BATCHES[0])
    for layer in ("into", "blocks.3.up", "head"):
        shadow.assign({layer: Scheme.parse("int8dq")})
        whole = logits(shadow.model, BATCHES[0])
        assert not torch.equal(whole, plain)
        with prefix.from_block(prefix.start(layer), 0):
            assert torch.equal(logits(shadow.model, BATCHES[0]), whole)


def test_little_memory_keeps_every_second_or_fourth_block_or_none():
    model = made()
    size = 4 * 32 * 4 + 4  # the hidden state, and the bias
    whole = logits(model, BATCHES[2])
    for limit, stride in ((15 * size, 1), (15 * size - 1, 2), (5 * size, 4), (2 * size, 8), (0, 8)):
        prefix = Prefix(model, model.blocks, BATCHES, limit_bytes=limit)
        assert (prefix.reason, prefix.stride) == ("", stride)
        assert [prefix.skipped(block) for block in range(6)] == [block // stride * stride for block in range(6)]
        with prefix.from_block(5, 2):
            assert torch.equal(logits(model, BATCHES[2]), whole)
        assert prefix.blocks_run == 5 - 5 // stride * stride


def test_an_error_leaves_the_model_as_it_was():
    model = made()
    prefix = Prefix(model, model.blocks, BATCHES)
    with pytest.raises(RuntimeError), prefix.from_block(3, 0):
        model(torch.zeros(1, 3))
    assert all("forward" not in block.__dict__ for block in model.blocks)
    with pytest.raises(RuntimeError):
        Prefix(model, model.blocks, as_batches(torch.zeros(1, 3)))
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


class Skip(Net):
    """The first block's output is added at the end."""

    def forward(self, x):
        hidden, bias = self.start(x)
        first = None
        for block in self.blocks:
            hidden, bias = block(hidden.clone(), bias)
            first = hidden if first is None else first
        return {"logits": self.head(hidden + first) + bias}


class Memory(Block):
    """What the first block computes reaches the third on a side way."""

    kept = None

    def forward(self, x, bias):
        x = x + self.up(x).mean()
        calls, value = Memory.kept if Memory.kept is not None else (0, None)
        value = x.sum() if calls == 0 else value
        Memory.kept = None if calls == 4 else (calls + 1, value)
        return (x + value if calls == 2 else x), bias


class Twice(Net):
    def forward(self, x):
        hidden, bias = self.start(x)
        for block in (*self.blocks, self.blocks[0]):
            hidden, bias = block(hidden, bias)
        return {"logits": self.head(hidden) + bias}


class Early(Net):
    def forward(self, x):
        hidden, bias = self.start(x)
        for block in self.blocks[:3]:
            hidden, bias = block(hidden, bias)
        return {"logits": self.head(hidden) + bias}


class Counting(Net):
    """Something no tensor shows: the answer depends on how many blocks have run."""

    def forward(self, x):
        ran = []
        handles = [block.up.register_forward_hook(lambda *_: ran.append(1)) for block in self.blocks]
        hidden, bias = self.start(x)
        for block in self.blocks:
            hidden, bias = block(hidden, bias)
        for handle in handles:
            handle.remove()
        return self.answer(hidden, bias, len(ran))

    def answer(self, hidden, bias, ran):
        return {"logits": self.head(hidden) + bias * ran}


class Dividing(Counting):
    def answer(self, hidden, bias, ran):
        return {"logits": self.head(hidden) + bias * (1 / ran)}


class Opaque(Block):
    def forward(self, x, bias):
        return super().forward(x, bias)[0], object()


class Blind(Net):
    def forward(self, x):
        hidden, bias = self.start(x)
        for block in self.blocks:
            hidden, _ = block(hidden, bias)
        return {"logits": self.head(hidden) + bias}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (made(Skip), "what block 0 computes is read after block 4"),
        (made(block=Memory), "what block 0 computes is read after block 1"),
        (made(Twice), "block 0 runs after 5 blocks"),
        (made(Early), "3 of 5 blocks run"),
        (made(Counting), "the model computes something else without its first blocks"),
        (made(Dividing), "the model fails without its first blocks: ZeroDivisionError"),
        (made(Blind, block=Opaque), "a block returns a object"),
        (made(blocks=1), "the model has no repeated blocks"),
    ],
    ids=["skip", "memory", "twice", "early", "counting", "dividing", "opaque", "single"],
)
def test_a_model_that_needs_its_first_blocks_runs_whole(model, reason):
    seen = {}
    prefix = Prefix(model, model.blocks, BATCHES, seen=lambda index, outputs: seen.update({index: outputs["logits"]}))
    assert prefix.reason == reason
    assert prefix.start("head") == prefix.skipped(5) == 0
    for index, batch in enumerate(BATCHES):
        with prefix.from_block(5, index):
            assert torch.equal(logits(model, batch), seen[index])


def test_a_transformers_language_model_starts_in_the_middle():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    batches = as_batches([{"input_ids": torch.randint(64, (2, 16))} for _ in range(2)])
    prefix = Prefix(model, model.model.layers, batches)
    assert prefix.reason == ""
    assert prefix.start("lm_head") == 4
    assert prefix.start("model.layers.2.mlp.down_proj") == 2
    for index, batch in enumerate(batches):
        whole = logits(model, batch)
        for block in range(5):
            with prefix.from_block(block, index):
                assert torch.equal(logits(model, batch), whole)
