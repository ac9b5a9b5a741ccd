import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from autoq import checkpoint_files, shards
from autoq.applying import apply
from autoq.checkpoint import load_quantized, save_quantized
from autoq.checkpoint_files import opened
from autoq.errors import AutoqError, CheckpointError
from autoq.plan import Plan
from autoq.shard_writing import write_files

_SPEC = importlib.util.spec_from_file_location("checkpoint_forging", Path(__file__).with_name("checkpoint_forging.py"))
forging = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(forging)

DTYPES = list(shards.DTYPE_NAMES)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.LayerNorm(64)).eval()


def make():
    model = build()
    apply(model, Plan(layers={"0": "int8wo", "2": "sinq(bits=5,group_size=32)"}))
    return model


@pytest.fixture
def saved(tmp_path):
    model = make()
    save_quantized(model, tmp_path / "model")
    return model, tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    model = make()
    save_quantized(model, tmp_path / "model", max_shard_bytes=4000)
    return model, tmp_path / "model"


def read_all(folder):
    """Every tensor file of a folder, read by safetensors itself."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def test_every_dtype_shape_and_stride_is_written_as_safetensors_reads_it(tmp_path):
    base = torch.arange(24).reshape(4, 6)
    tensors = {str(dtype): (base % 2).to(dtype) for dtype in DTYPES}
    tensors |= {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 5),
        "transposed": base.t(),
        "strided": base[:, ::2],
        "overlapping": base[1:],
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "größe": torch.ones(1, dtype=torch.bool),
    }
    files = write_files(tmp_path, tensors, 1 << 30)
    assert list(files) == ["model.safetensors"]
    found = read_all(tmp_path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_shards_have_the_standard_names_an_index_and_the_same_tensors(sharded, tmp_path):
    model, folder = sharded
    save_quantized(model, tmp_path / "single")
    count = len(list(folder.glob("*.safetensors")))
    assert count == 4
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    assert sorted(path.name for path in folder.iterdir()) == [
        "autoq.json",
        *names,
        "model.safetensors.index.json",
        "plan.json",
    ]
    for name in names:
        held = safetensors.torch.load_file(folder / name)
        assert len(held) == 1 or sum(one.nbytes for one in held.values()) <= 4000
    whole, single = read_all(folder), read_all(tmp_path / "single")
    assert whole.keys() == single.keys()
    assert all(torch.equal(whole[name], single[name]) for name in single)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in single.values())
    assert set(index["weight_map"].values()) == set(names)
    x = torch.randn(3, 64)
    assert torch.equal(load_quantized(build, folder)(x), model(x))


def test_so_many_files_that_they_cannot_be_open_at_once_are_refused(tmp_path):
    model = nn.Sequential(*(nn.Linear(51, 1, bias=False) for _ in range(1000)))
    says = r"max_shard_bytes: a checkpoint has at most 512 files; got 400\. Pass at least 805\."
    with pytest.raises(CheckpointError, match=says):
        save_quantized(model, tmp_path / "model", max_shard_bytes=400)
    assert list(tmp_path.iterdir()) == []
    save_quantized(model, tmp_path / "model", max_shard_bytes=805)
    load_quantized(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match="at most 512 files; got 0"):
        save_quantized(model, tmp_path / "model", max_shard_bytes=0)


def test_what_could_not_be_loaded_is_not_saved(saved, monkeypatch):
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    odd = build()
    odd.register_buffer("nine", torch.zeros([1] * 9))
    with pytest.raises(CheckpointError, match="so: a tensor has a dtype, a shape") as caught:
        save_quantized(odd, folder)
    assert caught.value.where == f"{folder}/model.safetensors: 'nine'"
    monkeypatch.setitem(checkpoint_files._TEXT_LIMITS, "plan.json", 10)
    with pytest.raises(CheckpointError, match=r"so: plan\.json has at most 10 bytes"):
        save_quantized(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("position", [0, 3, 8, 20, 700, 3000, 9000, -1])
def test_a_changed_bit_anywhere_is_found(saved, position):
    _, folder = saved
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        load_quantized(build, folder)


def test_a_changed_bit_of_the_values_is_named_with_its_place(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    rule = rf"model\.safetensors: the file is as it was saved; got other content in bytes 0 to {len(data)}"
    with pytest.raises(CheckpointError, match=rule):
        load_quantized(build, folder)


def test_hashes_are_of_every_16_mib(tmp_path, monkeypatch):
    monkeypatch.setattr("autoq.shards.PIECE_BYTES", 1000)
    monkeypatch.setattr("autoq.shard_writing.PIECE_BYTES", 1000)
    monkeypatch.setattr("autoq.shards.Hashes.__new__.__defaults__", (1000,))
    model = make()
    save_quantized(model, tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    manifest = json.loads((tmp_path / "model" / "autoq.json").read_text())
    identity = manifest["files"]["model.safetensors"]
    assert identity["bytes"] == size
    assert len(identity["sha256"]) == -(-size // 1000)
    x = torch.randn(3, 64)
    assert torch.equal(load_quantized(build, tmp_path / "model")(x), model(x))
    for piece in range(len(identity["sha256"])):
        data = (tmp_path / "model" / "model.safetensors").read_bytes()
        one = bytearray(data)
        one[min(1000 * piece + 999, size - 1)] ^= 1
        (tmp_path / "model" / "model.safetensors").write_bytes(one)
        with pytest.raises(CheckpointError):
            load_quantized(build, tmp_path / "model")
        (tmp_path / "model" / "model.safetensors").write_bytes(data)


def test_a_file_that_changes_after_it_was_opened_does_not_get_through(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    good = path.read_bytes()
    for change in (lambda: path.write_bytes(good[:-4] + b"evil"), lambda: os.truncate(path, len(good) - 64)):
        path.write_bytes(good)
        with opened(folder) as checkpoint:
            targets = {name: torch.empty(form.shape, dtype=form.dtype) for name, form in checkpoint.forms.items()}
            change()
            with pytest.raises(CheckpointError, match="the file is as it was saved"):
                checkpoint.read(targets)


def test_a_checkpoint_that_is_replaced_while_it_is_read_stays_the_one_that_was_opened(saved):
    model, folder = saved
    before = read_all(folder)
    with opened(folder) as checkpoint:
        targets = {name: torch.empty(form.shape, dtype=form.dtype) for name, form in checkpoint.forms.items()}
        other = build()
        apply(other, Plan(layers={"0": "fp6"}))
        save_quantized(other, folder)
        checkpoint.read(targets)
    assert targets.keys() == before.keys()
    assert all(torch.equal(targets[name], before[name]) for name in before)
    x = torch.randn(3, 64)
    assert torch.equal(load_quantized(build, folder)(x), other(x))
    assert not torch.equal(other(x), model(x))


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "no header": (b"", b"", 0, "starts with the length"),
    "empty object, trailing bytes": ({}, b"1234", None, "end where the file ends"),
    "length beyond the file": ({}, b"", 1 << 20, "at most 2 here; got 1048576"),
    "length of eight exabytes": ({}, b"", 1 << 63, "at most 2 here; got 9223372036854775808"),
    "no JSON": (b"{]", b"", None, "one complete JSON value"),
    "no object": (b"[]", b"", None, "is a JSON object"),
    "nested": (b"[" * 5000, b"", None, "nested at most 64 deep"),
    "a key twice": (b'{"a":1,"a":2}', b"", None, "a"),
    "no UTF-8": (b'{"\xff":1}', b"", None, "UTF-8"),
    "metadata that is no text": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
    "metadata that is a list": ({"__metadata__": []}, b"", None, "__metadata__"),
    "no entry": ({"a": 1}, b"", None, "a dtype, a shape"),
    "a field more": ({"a": entry("U8", [1], 0, 1) | {"x": 1}}, b"1", None, "a dtype, a shape"),
    "unknown dtype": ({"a": entry("Q9", [1], 0, 1)}, b"1", None, "a dtype, a shape"),
    "dtype that is a list": ({"a": entry(["U8"], [1], 0, 1)}, b"1", None, "a dtype, a shape"),
    "negative size": ({"a": entry("U8", [-1], 0, 1)}, b"1", None, "a dtype, a shape"),
    "fractional size": ({"a": entry("U8", [1.0], 0, 1)}, b"1", None, "a dtype, a shape"),
    "boolean size": ({"a": entry("U8", [True], 0, 1)}, b"1", None, "a dtype, a shape"),
    "nine dimensions": ({"a": entry("U8", [1] * 9, 0, 1)}, b"1", None, "a dtype, a shape"),
    "three offsets": ({"a": entry("U8", [1], 0, 1) | {"data_offsets": [0, 1, 1]}}, b"1", None, "a dtype, a shape"),
    "shape of a terabyte": ({"a": entry("U8", [1 << 40], 0, 1)}, b"1", None, "without gaps or overlaps"),
    "shape that overflows": ({"a": entry("I64", [1 << 62, 1 << 62], 0, 1)}, b"1", None, "without gaps or overlaps"),
    "shape of too little": ({"a": entry("U8", [1], 0, 2)}, b"12", None, "without gaps or overlaps"),
    "another dtype": ({"a": entry("F32", [2], 0, 2)}, b"12", None, "without gaps or overlaps"),
    "offsets beyond the file": ({"a": entry("U8", [9], 0, 9)}, b"1", None, "end where the file ends"),
    "offsets backwards": ({"a": entry("U8", [0], 1, 0)}, b"1", None, "without gaps or overlaps"),
    "overlap": ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123", None, "without gaps or overlaps"),
    "the same bytes": ({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 0, 1)}, b"1", None, "without gaps"),
    "gap": ({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"123", None, "without gaps or overlaps"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_forged_header_is_refused(saved, name):
    _, folder = saved
    header, data, length, says = HEADERS[name]
    forging.replaced(folder, "model.safetensors", forging.safetensors_bytes(header, data, length))
    with pytest.raises(CheckpointError, match=says):
        load_quantized(build, folder)


def test_a_file_of_a_few_bytes_is_refused(saved):
    _, folder = saved
    for data in (b"x", b"1234567", struct.pack("<Q", 2), struct.pack("<Q", 2) + b"{"):
        forging.replaced(folder, "model.safetensors", data)
        with pytest.raises(CheckpointError, match="starts with the length of its header"):
            load_quantized(build, folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("0.weight_scale"),
        lambda t: t.pop("0.weight"),
        lambda t: t.pop("0.weight_scheme"),
        lambda t: t.update({"0.weight_more": torch.zeros(3)}),
        lambda t: t.update({"0.weight_minimum": torch.zeros(96, 2, dtype=torch.float16)}),
        lambda t: t.update({"0.weight_scale": torch.zeros(95)}),
        lambda t: t.update({"0.weight_scale": torch.zeros(0, 1 << 62)}),
        lambda t: t.update({"0.weight_scale": torch.tensor(1.0)}),
        lambda t: t.update({"0.weight_scale": torch.zeros(96, 1, 1)}),
        lambda t: t.update({"3.weight": torch.zeros(0, 1 << 62)}),
        lambda t: t.update({"0.weight_scale": torch.zeros(96, dtype=torch.int32)}),
        lambda t: t.update({"0.weight_codes": torch.zeros(96, 65, dtype=torch.int8)}),
        lambda t: t.update({"0.weight_codes": torch.zeros(96, 64, dtype=torch.uint8)}),
        lambda t: t.update({"0.weight": t["2.weight"]}),
        lambda t: t.update({"0.weight": torch.zeros(128, dtype=torch.uint8)}),
        lambda t: t.update({"0.weight": torch.zeros(127, dtype=torch.uint8)}),
        lambda t: t.update({"0.weight": torch.zeros(1, 128, dtype=torch.uint8)}),
        lambda t: t.update({"0.weight_scheme": t["2.weight_scheme"]}),
        lambda t: t.update({"0.weight_scheme": torch.zeros(4, dtype=torch.uint8)}),
        lambda t: t.update({"0.weight_scheme": torch.full((5000,), 32, dtype=torch.uint8)}),
        lambda t: t.update({"0.weight_scheme": torch.tensor(list(b"[1]"), dtype=torch.uint8)}),
        lambda t: t.update({"0.weight_scheme": torch.tensor(list(b'{"scheme":"int9wo"}'), dtype=torch.uint8)}),
        lambda t: t.update({"0.weight_scheme": torch.tensor(list(b'{"scheme":"int8dq"}'), dtype=torch.uint8)}),
        lambda t: t.update({"2.weight_codes_1": t["2.weight_codes_4"]}),
        lambda t: t.update({"2.weight_codes_4": t["2.weight_codes_4"].view(torch.float16)}),
        lambda t: t.update({"3.weight": torch.zeros(65)}),
        lambda t: t.update({"more": torch.zeros(1)}),
        lambda t: t.pop("3.bias"),
    ],
)
def test_forged_tensors_are_refused_and_the_model_unchanged(saved, change):
    _, folder = saved
    tensors = read_all(folder)
    change(tensors)
    forging.replaced(
        folder, "model.safetensors", safetensors.torch.save({name: one.clone() for name, one in tensors.items()})
    )
    model = build()
    before = {name: (id(one), one.clone()) for name, one in model.named_parameters()}
    with pytest.raises(AutoqError):
        load_quantized(model, folder)
    assert {name: id(one) for name, one in model.named_parameters()} == {name: one for name, (one, _) in before.items()}
    assert all(torch.equal(one, before[name][1]) for name, one in model.named_parameters())


@pytest.mark.parametrize("field", range(16))
@pytest.mark.parametrize("value", [-1, 0, 1, 7, 2**31, 2**62])
def test_forged_numbers_of_a_packed_weight_are_refused(saved, field, value):
    _, folder = saved
    tensors = read_all(folder)
    numbers = tensors["2.weight"].view(torch.int64)
    if numbers[field] == value:
        return
    numbers[field] = value
    forging.replaced(
        folder, "model.safetensors", safetensors.torch.save({name: one.clone() for name, one in tensors.items()})
    )
    with pytest.raises(CheckpointError):
        load_quantized(build, folder)


NAMES = {
    "another folder": "../model.safetensors",
    "an absolute path": "/etc/passwd",
    "a folder below": "a/model.safetensors",
    "a shard elsewhere": "../model-00001-of-00001.safetensors",
    "a number too many": "model-00005-of-00004.safetensors",
    "a pickle": "pytorch_model.bin",
    "a trailing newline": "model.safetensors\n",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("more", [True, False], ids=["added", "instead"])
def test_names_that_no_checkpoint_has_are_refused(sharded, name, more):
    _, folder = sharded

    def change(manifest):
        files = manifest["files"]
        files[name] = files["model-00004-of-00004.safetensors"]
        if not more:
            del files["model-00004-of-00004.safetensors"]

    forging.sealed(folder, change)
    with pytest.raises(CheckpointError, match=r"\$\.files has"):
        load_quantized(build, folder)


def test_an_index_that_says_otherwise_is_refused(sharded):
    _, folder = sharded

    def moved(index):
        name = next(iter(index["weight_map"]))
        index["weight_map"][name] = "../" + index["weight_map"][name]

    for change in (moved, lambda index: [], lambda index: {"metadata": {}}):
        forging.changed_json(folder, "model.safetensors.index.json", change)
        with pytest.raises(CheckpointError, match='"weight_map" names the file of every tensor'):
            load_quantized(build, folder)
        save_quantized(make(), folder, max_shard_bytes=4000)


def test_a_tensor_in_two_files_is_refused(sharded):
    _, folder = sharded
    data = (folder / "model-00001-of-00004.safetensors").read_bytes()
    forging.replaced(folder, "model-00002-of-00004.safetensors", data)
    with pytest.raises(CheckpointError, match="a tensor is in one file"):
        load_quantized(build, folder)


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "autoq.json"])
def test_links_pipes_and_folders_in_the_place_of_files_are_refused(saved, tmp_path, name):
    _, folder = saved
    path = folder / name
    path.rename(tmp_path / "real")
    for put, says in (
        (lambda: path.symlink_to(tmp_path / "real"), "symbolic link"),
        (lambda: os.mkfifo(path), "0o10"),
        (path.mkdir, "0o4"),
    ):
        put()
        with pytest.raises(CheckpointError, match=says):
            load_quantized(build, folder)
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "real").rename(path)
    (tmp_path / "link").symlink_to(folder)  # the folder's own name is the user's choice
    load_quantized(build, tmp_path / "link")


def test_a_file_over_its_limit_is_not_read(saved):
    _, folder = saved
    (folder / "config.json").write_bytes(b" " * ((1 << 24) + 1))
    forged = {"config.json": {"bytes": (1 << 24) + 1, "sha256": ["0" * 64] * 2}}
    forging.sealed(folder, lambda manifest: manifest["files"].update(forged))
    with pytest.raises(CheckpointError, match=r"config\.json has at most 16,777,216 bytes"):
        load_quantized(build, folder)


MEMORY = """
import sys
from pathlib import Path
import torch
from torch import nn
from autoq import load_quantized
from autoq.candidates.base import load_kernels
from autoq.checkpoint_files import opened
import autoq.applying, autoq.candidates

def build():
    return nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(24)))

def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])

def growth(work):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before

folder = Path(sys.argv[1])
if sys.argv[2] == "save":
    model = build()
    autoq.applying.apply(model, autoq.Plan(layers={str(i): "int8wo" for i in range(23)}))
    print(growth(lambda: autoq.save_quantized(model, folder, max_shard_bytes=30_000_000)))
else:
    load_kernels(torch.device("cpu"))
    with opened(folder) as checkpoint:
        size = sum(form.nbytes for form in checkpoint.forms.values())
    print(size, growth(lambda: load_quantized(build, folder)))
"""


def test_saving_copies_nothing_and_loading_takes_the_memory_of_the_tensors(tmp_path):
    printed = []
    for step in ("save", "load"):
        child = [sys.executable, "-c", MEMORY, str(tmp_path / "model"), step]
        done = subprocess.run(child, capture_output=True, text=True, check=True)
        printed += map(int, done.stdout.split())
    saving, size, loading = printed
    assert size == 23 * (2048 * 2048 + 2 * 4 * 2048 + 128 + len('{"scheme": "int8wo"}')) + 4 * (2048 * 2048 + 2048)
    assert saving < size / 10  # a shard is more than a fifth
    assert loading <= 1.3 * size  # float32 weights of the quantized layers alone would be 3.4 times as much


@pytest.mark.parametrize("way", ["checkpoint", "safetensors, read"])
def test_the_benchmark_s_processes_load_what_was_saved(tmp_path, way):
    script = Path(__file__).parents[1] / "benchmarks" / "replay.py"
    child = [sys.executable, str(script), "--folder", str(tmp_path / "model"), "--layers", "1", "--child"]
    subprocess.run([*child, "save"], check=True)
    done = subprocess.run([*child, way], capture_output=True, text=True, check=True)
    _, peak, parts, size = json.loads(done.stdout)
    assert size == 4096 * 4096 + 4 * 4096 + 128 + len('{"scheme": "int8wo"}')
    assert 0.9 * size < peak < 3 * size
    assert parts == {}
