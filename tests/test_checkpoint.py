import json
import os

import pytest
import safetensors
import torch
from torch import nn

from autoq.applying import apply, plan_of
from autoq.checkpoint import load_quantized, save_quantized
from autoq.errors import AutoqError, CheckpointError
from autoq.modules import QuantLinear, quantized_layers
from autoq.plan import Plan


class Net(nn.Module):
    """An embedding tied to the head, a layer under two names, buffers of both kinds."""

    def __init__(self, width=96):
        super().__init__()
        self.embed = nn.Embedding(80, 64)
        self.up = nn.Linear(64, width)
        self.again = self.up
        self.down = nn.Linear(width, 64)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(64, 80, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.linspace(0, 1, 64), persistent=False)

    def forward(self, tokens):
        x = self.norm(self.embed(tokens)) * self.table
        return self.head(x + self.down(self.again(x).relu()))


TOKENS = torch.arange(12).view(2, 6)
PLANS = {
    "mixed": Plan(layers={"up": "int8wo", "down": "sinq(bits=5,group_size=32)"}, provenance={"seed": 7}),
    "head": Plan(layers={"up": "int8dq", "head": "fp6(format=e2m3)"}),
    "none": Plan(layers={"up": "none"}),
    "all none": Plan(layers={"up": "none", "down": "none", "head": "none"}),
    "no layers": Plan(layers={}),
}


def make(plan=PLANS["mixed"], dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = Net().eval().to(dtype)
    model.table.mul_(3)
    apply(model, plan)
    return model


@pytest.fixture
def saved(tmp_path):
    model = make()
    save_quantized(model, tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("into", ["factory", "model", "meta model", "compiled model"])
def test_a_round_trip_is_bit_equal(tmp_path, name, into):
    model = make(PLANS[name])
    save_quantized(torch.compile(model), tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    target = {"factory": lambda: Net, "model": Net, "compiled model": lambda: torch.compile(Net())}
    if into == "meta model":
        with torch.device("meta"):
            given = Net()
    else:
        given = target[into]()
    loaded = load_quantized(given, tmp_path / "model")
    loaded = getattr(loaded, "_orig_mod", loaded).eval()
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert all(state[key].dtype == expected[key].dtype for key in expected)
    assert torch.equal(loaded.table, model.table)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert plan_of(loaded) == plan_of(model)
    assert loaded.again is loaded.up
    assert isinstance(loaded.head, QuantLinear) or loaded.head.weight is loaded.embed.weight
    assert [layer.dtype for layer in quantized_layers(loaded).values()] == [torch.bfloat16] * len(
        quantized_layers(model)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unquantized_weights_are_saved_as_they_are(tmp_path, dtype):
    model = make(PLANS["all none"], dtype)
    save_quantized(model, tmp_path / "model")
    loaded = load_quantized(Net, tmp_path / "model")
    assert type(loaded.up) is (nn.Linear if dtype == torch.float32 else QuantLinear)
    for name in ("up", "down", "head"):
        found, wanted = loaded.get_submodule(name).weight, model.get_submodule(name).weight
        assert found.dtype == dtype
        assert torch.equal(found, wanted)
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_tied_tensors_are_stored_once_and_sections_by_name(saved):
    _, folder = saved
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "embed.weight" in names
    assert "head.weight" not in names
    assert {name for name in names if name.startswith("down.")} == {
        "down.bias",
        "down.weight_header",
        "down.weight_scheme",
        "down.weight_codes_4",
        "down.weight_codes_1",
        "down.weight_scale",
        "down.weight_minimum",
        "down.weight_row_scale",
        "down.weight_column_scale",
    }
    assert not any(name.startswith("again") for name in names)
    assert json.loads((folder / "autoq.json").read_text())["tied"] == {"head.weight": "embed.weight"}
    assert Plan.load(folder / "plan.json") == PLANS["mixed"]


def test_a_factory_is_built_without_weights_when_it_can_be(saved):
    _, folder = saved
    devices = []

    def factory():
        model = Net()
        devices.append(model.embed.weight.device.type)
        return model

    model = load_quantized(factory, folder)
    assert devices == ["meta"]
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert not model.training


def test_a_factory_that_needs_values_is_built_with_them(saved):
    model, folder = saved

    class Needy(Net):
        def __init__(self):
            super().__init__()
            self.count = int(self.embed.weight.abs().sum())

    class Plain(Net):
        def __init__(self):
            super().__init__()
            self.constant = torch.ones(3)

    for factory in (Needy, Plain):
        loaded = load_quantized(factory, folder)
        assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert torch.equal(loaded.constant, torch.ones(3))


def test_saving_again_replaces_a_checkpoint_and_nothing_else(saved, tmp_path):
    _, folder = saved
    model = make(PLANS["head"])
    save_quantized(model, folder)
    assert torch.equal(load_quantized(Net, folder)(TOKENS), model(TOKENS))
    other = tmp_path / "photos"
    other.mkdir()
    save_quantized(model, other)  # an empty folder is fine
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="a folder with other content"):
        save_quantized(model, tmp_path / "notes")
    with pytest.raises(CheckpointError, match="got a file"):
        save_quantized(model, folder / "plan.json")
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "notes", "photos"]


def test_a_failed_save_leaves_the_old_checkpoint(saved, monkeypatch, tmp_path):
    model, folder = saved

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_quantized(make(PLANS["head"]), folder)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(load_quantized(Net, folder)(TOKENS), model(TOKENS))


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "autoq.json"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [(os.remove, "No such file|are there"), (cut, "bytes|folder with"), (flip, "hash differs|folder with|manifest")],
    ids=["missing", "cut", "changed"],
)
def test_a_damaged_file_is_refused_and_the_model_unchanged(saved, name, damage, says):
    _, folder = saved
    damage(folder / name)
    model = Net()
    before = [(one, id(module)) for one, module in model.named_modules()]
    with pytest.raises(CheckpointError, match=says):
        load_quantized(model, folder)
    assert [(one, id(module)) for one, module in model.named_modules()] == before


def edit(folder, change):
    path = folder / "autoq.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format="zip"),
        lambda m: m.update(schema=2),
        lambda m: m.pop("layers"),
        lambda m: m.update(layers=[]),
        lambda m: m.update(tied={"head.weight": 3}),
        lambda m: m.update(tied={"head.weight": "gone"}),
        lambda m: m["files"].update({"../../etc/passwd": {}}),
        lambda m: m["files"].pop("plan.json"),
        lambda m: m["files"].update({"plan.json": 1}),
        lambda m: m["layers"].update({"gone": {}}),
        lambda m: m["layers"].update({"up": 5}),
        lambda m: m["layers"]["up"].update(in_features=63),
        lambda m: m["layers"]["up"].update(dtype="float8"),
        lambda m: m["layers"].pop("up"),
    ],
)
def test_a_forged_manifest_is_refused(saved, change):
    _, folder = saved
    edit(folder, change)
    with pytest.raises(AutoqError):
        load_quantized(Net(), folder)


def test_a_checkpoint_of_another_model_is_refused_by_name(saved):
    _, folder = saved
    with pytest.raises(CheckpointError, match="up: the layer is the model's"):
        load_quantized(lambda: Net(width=128), folder)
    with pytest.raises(CheckpointError, match=r"no nn\.Linear of that name"):
        load_quantized(nn.Sequential(nn.Linear(4, 4)), folder)

    class More(Net):
        def __init__(self):
            super().__init__()
            self.extra = nn.Parameter(torch.zeros(2))

    with pytest.raises(CheckpointError, match="not in the checkpoint: extra"):
        load_quantized(More, folder)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"a folder with autoq\.json"):
        load_quantized(Net, tmp_path)
    with pytest.raises(CheckpointError, match=r"a folder with autoq\.json"):
        load_quantized(Net, tmp_path / "nowhere")


def test_what_cannot_be_saved_is_an_error(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(CheckpointError, match="extra state"):
        save_quantized(nn.Sequential(Extra(2, 2)), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"0\.weight: every tensor has values"):
        save_quantized(nn.Sequential(nn.Linear(2, 2, device="meta")), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_transformers_model_keeps_its_configuration(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().bfloat16()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    apply(model, Plan(layers=dict.fromkeys(names, "int8wo")))
    save_quantized(model, tmp_path / "llama")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "llama")
    loaded = load_quantized(lambda: transformers.AutoModelForCausalLM.from_config(again), tmp_path / "llama")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    assert len(quantized_layers(loaded)) == len(names)
