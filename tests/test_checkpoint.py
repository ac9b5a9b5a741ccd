import base64
import errno
import gc
import hashlib
import json
import os
import zlib

import pytest
import safetensors
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autoq import candidates
from autoq.applying import apply, plan_of
from autoq.checkpoint import load_quantized, save_quantized
from autoq.errors import AutoqError, CheckpointError
from autoq.modules import QuantLinear, quantized_layers
from autoq.plan import Plan
from autoq_kernels.cpu import build, toolchain
from autoq_kernels.tolerance import TOLERANCE


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


class TorchCalls(TorchFunctionMode):
    """Which functions of torch reach torch itself."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


SCHEMA_1_TENSORS = (
    "c-obeeNdED6vn|pkbqJAC~F|;RcyjVmj$<V<2?ru2*ts%i9j7%mt}#)C5T-@)P)sLkda^%95r0P!~w%VfdyxH?;$Y-DJLOyn5YK&P)uvUVyemN"
    "UB3o_YC8X%d+*%mcg}O~%$YUA?tbjxRH{_1QJtVRs#PjZxr0kg%ScrlIVG2F<V+GSQL{Wtt4m5Ystg*nUTeFNV9ZVz7hJf%jFWJNWVLO#SrI4U"
    "?o-kd6AfCUK|GR5{AF<>Lz^0}O?Zfz2nY%HlTReru1|sZ%OooU0^%OD60cJm{*5qIE@~w!<x-p8sE&Wqz$Eo_)kUd9E_+n|;Y(=J60}dWu}1Nq"
    "HbjU-p^!caO4h0qv>6jg(Gy92vS|#75Q(2us)(EPImy~o?LU%a(y1UDL?nqdOeU|E=4NF@dAZWs+N!jzZTWOlld`p?MOj~0r!1p#GPAGPM)bpD"
    "%&D^$j!`pM;1}M4rD$TOXn@=?5}(D3)X45&5I#*Z76@ms7c(%HJjtH_gXO>we9tezVdxVgv7E*5jyNx<gL+9qDl9}f=vfbQ!AtC02H1t0g3gnL"
    "M$nDsk{;j1S`=tW&=_lgE96Gw%#QX_Db8V0NP-k&C`B2IpR(Q920Pijpix>U?4e9@=H=LrA5s&{#1}gUD20`R36AooU<7W#n-qbmw1s(eRtPS_"
    "JJ<|*N)#5+9X5`a*`Is`>hTQ5(=`?)I`qJw;CCz{i|`}AkgDj4P(ameC+ucp{C23oa<~9dY)lA)aJoy55I{BX0(=bHFo%x7pkT(o*lK(pYhV+M"
    "3umE*6;l>8Q=!nty2;9l(FuAm0*h%CbzliB!(2K<hiNuB<7aRQq_71KuzWlu?4ur7h(36PJkXU6VmF_KF<4C|yvL4HCLTv0vEKvWEELf#p^5ci"
    "D0IPmwiwIUNpfe-<VbO-p%^U3ArfeaD*0k+$6;YU`m%gsHzwm<rlR@qGj_uop-_<XX8yEb4(#L0I_&Hm_yYa{?*QHq4oOe|6;KOS(fxI}0l$I+"
    "y5a)#L~ry(IRb`bl-QjLlQ0dpp&8A}b0@89Lp3X|4lYeu+|{+mqrK$qhEZ>a`a?+zwq9L2_*>0Nzk6R+>-PnH((2K;WKqd;A#i)wP5H%Fk{f3P"
    "ySmJ&d@9xu=^l9Q;QrhVbux8sn&z8+-K)(82y620*Nn)XdHHiZ;aP7!oEV;+R8sdt!$!+T`E4n>xCF!3s|-H5A?y43*~9H;EpKcdwQ62-KA#y-"
    "wO!p8(RN!u^TgG`8*bT7jZPR`bkowk;(fn#=lUz2mBD-S%-_Wpr1ma#EJ+E=4gO%O6My)NyvrW%y%aY0<k0~|?%FZmy#0Y~P}NZyF{X=N=WuO!"
    "ZfLb(w8Wa7vr8Se!DwBkxW0TKI(U8b>$dr8|6mM1&a)<EFT3f({3zSo{l9oT_a99RFHZNCQIVC#nf?aT-cUm"
)
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
        "down.weight",
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


def test_values_are_drawn_for_no_meta_tensor_and_for_every_other(saved):
    model, folder = saved

    class Drawing(Net):
        def __init__(self):
            super().__init__()
            nn.init.orthogonal_(self.up.weight)
            self.embed.weight.data.normal_()
            self.drawn = nn.init.constant_(torch.empty(3, device="cpu"), 2.0).sum().item()

    with TorchCalls() as calls:
        loaded = load_quantized(Drawing, folder)
    assert loaded.drawn == 6.0
    assert not calls.seen & {torch.Tensor.uniform_, torch.Tensor.normal_, torch.linalg.qr}
    assert torch.equal(loaded(TOKENS), model(TOKENS))


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_after_loading_as_before(saved, enabled):
    _, folder = saved
    seen = []

    def factory():
        seen.append(gc.isenabled())
        return Net()

    (gc.enable if enabled else gc.disable)()
    try:
        load_quantized(factory, folder)
        with pytest.raises(CheckpointError):
            load_quantized(nn.Sequential, folder)
        assert seen == [False]
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


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
    [(os.remove, "No such file|are there"), (cut, "bytes|one complete JSON"), (flip, "hash differs")],
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
    del manifest["sha256"]
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps(manifest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format="zip"),
        lambda m: m.update(schema=4),
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
    with pytest.raises(CheckpointError, match="no linear layer of that name"):
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


def test_a_refusal_names_the_folder_and_what_to_do(saved):
    _, folder = saved
    misfit = r"Pass a float model of the same structure as the one that was saved\.$"
    for other, says in (
        (lambda: nn.Sequential(nn.Linear(4, 4)), "up: the model has the checkpoint's layers"),
        (lambda: Net(width=128), "up: the layer is the model's"),
    ):
        with pytest.raises(CheckpointError, match=rf"^{folder}: {says}.+\.$"):
            load_quantized(other, folder)

    class More(Net):
        def __init__(self):
            super().__init__()
            self.extra = nn.Parameter(torch.zeros(2))

    with pytest.raises(CheckpointError, match=rf"^{folder}: checkpoint and model have the same tensors.+{misfit}"):
        load_quantized(More, folder)
    edit(folder, lambda manifest: manifest.update(format="zip"))
    with pytest.raises(CheckpointError, match=r"autoq\.json: \"format\" is .+Copy the folder again, or save"):
        load_quantized(Net, folder)
    with (folder / "autoq.json").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"autoq\.json has at most 67,108,864 bytes; got 1099511627776"):
        load_quantized(Net, folder)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_names_that_no_folder_can_have_are_refused(saved, tmp_path, name):
    model, _ = saved
    says = "got OSError: a name that no folder can have"
    with pytest.raises(CheckpointError, match=says) as caught:
        save_quantized(model, f"{tmp_path}/{name}")
    str(caught.value).encode()
    with pytest.raises(CheckpointError, match=says) as caught:
        load_quantized(Net, f"{tmp_path}/{name}")
    str(caught.value).encode()


def test_a_target_without_permission_is_a_checkpoint_error(saved, tmp_path, monkeypatch):
    model, _ = saved
    real = os.stat

    def denied(path, *arguments, **options):
        if str(path).startswith(str(tmp_path / "locked")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", denied)
    for target in ("locked", "locked/x"):
        with pytest.raises(CheckpointError, match="must be writable; got PermissionError: Permission denied"):
            save_quantized(model, tmp_path / target)


def test_a_link_to_itself_and_the_working_directory_are_not_replaced(saved, tmp_path, monkeypatch):
    model, folder = saved
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError, match="got a symbolic link that leads nowhere"):
        save_quantized(model, tmp_path / "loop")
    assert (tmp_path / "loop").readlink() == tmp_path / "loop"
    (folder / "mine").mkdir()
    for inside in (folder, folder / "mine"):
        monkeypatch.chdir(inside)
        with pytest.raises(CheckpointError, match="the working directory is not replaced"):
            save_quantized(model, folder)
    assert torch.equal(load_quantized(Net, "..")(TOKENS), model(TOKENS))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["loop", folder.name])


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


class Small(nn.Module):
    """The model of the checkpoint below."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 32)
        self.fc = nn.Linear(32, 8)
        self.head = nn.Linear(32, 8, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.zeros(32), persistent=False)

    def forward(self, tokens):
        return self.fc(self.embed(tokens) * self.table)


# A folder of schema 1, as autoq 0.1.0 wrote it: one hash of each whole file.
SCHEMA_1 = {
    "autoq.json": b"""{
 "format": "autoq-checkpoint",
 "schema": 1,
 "autoq": "0.1.0",
 "layers": {
  "fc": {
   "in_features": 32,
   "out_features": 8,
   "bias": true,
   "dtype": "bfloat16"
  }
 },
 "tied": {
  "head.weight": "embed.weight"
 },
 "files": {
  "model.safetensors": {
   "bytes": 1556,
   "sha256": "bdbe987e3e6e684d17cbe3c642c656dca1bd8a642ca80df16cf7dd2ebe3c05d9"
  },
  "plan.json": {
   "bytes": 162,
   "sha256": "07297368821de047473fbcc87121dac12eed3a4ec1d3211943a3841768e3db64"
  }
 }
}
""",
    "plan.json": b"""{
 "schema": 1,
 "layers": {
  "fc": {
   "scheme": "int8wo"
  }
 },
 "units": {},
 "phases": {},
 "kernels": {},
 "model": {},
 "provenance": {
  "seed": 7
 }
}
""",
    "model.safetensors": zlib.decompress(base64.b85decode(SCHEMA_1_TENSORS)),
}


@pytest.fixture
def schema_1(tmp_path):
    for name, data in SCHEMA_1.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_checkpoint_of_schema_1_is_read(schema_1):
    model = load_quantized(Small, schema_1)
    expected = torch.tensor([0.396484375, 0.224609375, -0.298828125, 0.447265625])
    assert model.table[-1] == 1
    assert model.head.weight is model.embed.weight
    # The output as it was then, to the last bit but one of bfloat16.
    assert torch.allclose(model(torch.arange(2))[0, :4].float(), expected, rtol=2**-7, atol=0)
    assert str(model.fc.candidate) == "int8wo"
    assert plan_of(model).provenance["seed"] == 7
    again = schema_1 / "again"
    save_quantized(model, again)
    assert json.loads((again / "autoq.json").read_text())["schema"] == 3
    assert torch.equal(load_quantized(Small, again)(torch.arange(8)), model(torch.arange(8)))


@pytest.mark.parametrize("name", SCHEMA_1)
def test_a_changed_file_of_schema_1_is_refused(schema_1, name):
    data = bytearray(SCHEMA_1[name])
    data[-8] ^= 1
    (schema_1 / name).write_bytes(data)
    with pytest.raises(CheckpointError):
        load_quantized(Small, schema_1)


def test_a_checkpoint_left_under_another_name_by_a_killed_save_is_brought_back(saved, tmp_path):
    model, folder = saved
    folder.rename(tmp_path / ".model.abcd1234.old")
    assert torch.equal(load_quantized(Net, folder)(TOKENS), model(TOKENS))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    folder.rename(tmp_path / ".model.abcd1234.old")
    (tmp_path / ".model.efgh5678.new").mkdir()
    save_quantized(make(PLANS["head"]), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_link_in_the_place_of_the_folder_stays_a_link(saved, tmp_path):
    _, folder = saved
    (tmp_path / "link").symlink_to(folder)
    model = make(PLANS["head"])
    save_quantized(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(load_quantized(Net, folder)(TOKENS), model(TOKENS))


def test_other_files_in_the_folder_stay_and_old_shards_do_not(tmp_path):
    folder = tmp_path / "model"
    save_quantized(make(), folder, max_shard_bytes=8000)
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("mine")
    (folder / "link").symlink_to("nowhere")
    save_quantized(make(PLANS["head"]), folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "autoq.json",
        "link",
        "model.safetensors",
        "notes",
        "plan.json",
    ]
    assert (folder / "notes" / "a.txt").read_text() == "mine"


def test_what_is_tied_shares_memory_and_what_overlaps_is_stored_by_itself(tmp_path):
    model = nn.Module()
    base = torch.randn(6, 4)
    model.register_buffer("whole", base)
    model.register_buffer("rows", base[2:])
    model.weight = nn.Parameter(base)
    save_quantized(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "autoq.json").read_text())["tied"] == {"whole": "weight"}

    def build():
        made = nn.Module()
        made.register_buffer("whole", torch.zeros(6, 4))
        made.register_buffer("rows", torch.zeros(4, 4))
        made.weight = nn.Parameter(torch.zeros(6, 4))
        return made

    loaded = load_quantized(build, tmp_path / "model")
    assert torch.equal(loaded.whole, base)
    assert torch.equal(loaded.rows, base[2:])
    assert loaded.whole.data_ptr() == loaded.weight.data_ptr()


@pytest.mark.parametrize("key", ["portable", "avx2"])
def test_another_instruction_set_runs_the_same_checkpoint(saved, key):
    if toolchain.missing_features(key):
        pytest.skip(f"this processor lacks {toolchain.missing_features(key)}")
    build.load(key)
    operators = getattr(torch.ops, f"autoq_{key}")
    model, folder = saved
    loaded = load_quantized(Net, folder)
    for name, layer in quantized_layers(loaded).items():
        assert torch.equal(layer.packed, quantized_layers(model)[name].packed)
        for rows in (1, 7):
            x = torch.randn(rows, layer.in_features).bfloat16()
            found = operators.linear(x, layer.head, None, layer.out_features).double()
            wanted = layer.candidate.reference(x, candidates.Packed(layer.packed))
            assert (found - wanted).norm() / wanted.norm() < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("candidate", candidates.ALL, ids=str)
def test_every_scheme_comes_back_bit_equal(tmp_path, candidate):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(160, 48)).eval().bfloat16()
    model[0] = QuantLinear(candidate, candidate.pack(model[0].weight), model[0].bias, 160, 48, dtype=torch.bfloat16)
    save_quantized(model, tmp_path / "model")
    loaded = load_quantized(lambda: nn.Sequential(nn.Linear(160, 48)), tmp_path / "model")
    assert loaded[0].candidate == candidate
    assert torch.equal(loaded[0].packed, model[0].packed)
    for rows in (1, 40):
        x = torch.randn(rows, 160).bfloat16()
        assert torch.equal(loaded(x), model(x))
