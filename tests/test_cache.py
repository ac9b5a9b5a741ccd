"""What was measured before: which rows hold after a change, several processes at once, what scores depend on."""

import fcntl
import importlib.util
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from autoq import calibration, tables
from autoq.cache import Fingerprint, ProfileCache, SensitivityCache, parts
from autoq.cache.fingerprint import CONDITIONS
from autoq.cache.store import read_calibration
from autoq.errors import CacheError, InputError
from autoq.results import Settings
from autoq.tuning import Tuning
from autoq.workload import Phase

WORKER = Path(__file__).with_name("cache_worker.py")
_SPEC = importlib.util.spec_from_file_location("cache_worker", WORKER)
cache_worker = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cache_worker)

CPU = Fingerprint(
    device="cpu",
    name="AuthenticAMD family 25 model 17 stepping 1 AMD EPYC",
    isa="avx2 fma",
    caches="L2 1024K, L3 32768K",
    cores=8,
    system="Linux x86_64",
    threads=2,
    torch="2.13.0",
    triton="",
    runtime="",
    kernels="c1",
)
GPU = Fingerprint(
    device="cuda",
    name="NVIDIA H100 sm_90",
    isa="",
    caches="L2 51200K",
    cores=16,
    system="Linux x86_64",
    threads=8,
    torch="2.13.0",
    triton="3.7.1",
    runtime="cuda 13.0, driver 580.65",
    kernels="t1",
)


def row(fingerprint, kernel, m=1, scheme="int8wo", time_us=10.0):
    return {
        "m": m, "k": 64, "n": 32, "dtype": "bfloat16", "bias": False, "scheme": scheme, "kernel": kernel,
        "status": "ok", "reason": "", "time_us": time_us, "baseline_us": 20.0, "ratio": time_us / 20, "origin": "",
        "device": fingerprint.device_key, **fingerprint.conditions(kernel),
    }  # fmt: skip


def kernels_seen(folder, fingerprint):
    """The kernels of the rows that hold."""
    return {one["kernel"] for one in ProfileCache(folder, fingerprint).rows()}


@pytest.fixture
def both(tmp_path):
    """A cache with one row each of our kernel and of PyTorch's, on a CPU and on a GPU."""
    for fingerprint, kernels in ((CPU, ("avx2.gemv", "stock")), (GPU, ("triton.gemv", "stock"))):
        rows = [row(fingerprint, kernel, scheme="none" if kernel == "stock" else "int8wo") for kernel in kernels]
        ProfileCache(tmp_path, fingerprint).append(rows)
    return tmp_path


CHANGES = {
    "threads": (4, set(), {"triton.gemv", "stock"}),  # a GPU's times do not depend on the host's
    "torch": ("2.14.0", set(), set()),
    "kernels": ("new", {"stock"}, {"stock"}),
    "name": ("another", set(), set()),
    "caches": ("L2 1K", set(), set()),
    "system": ("Linux aarch64", set(), set()),
}


@pytest.mark.parametrize("component", CHANGES)
def test_a_change_hides_exactly_the_rows_that_depend_on_it(both, component):
    value, on_cpu, on_gpu = CHANGES[component]
    before = {CPU: {"avx2.gemv", "stock"}, GPU: {"triton.gemv", "stock"}}
    for fingerprint, expected in ((CPU, on_cpu), (GPU, on_gpu)):
        later = replace(fingerprint, **{component: value})
        assert later.key != fingerprint.key
        assert kernels_seen(both, later) == expected
        assert kernels_seen(both, fingerprint) == before[fingerprint]  # nothing was thrown away


def test_triton_and_the_driver_concern_the_gpu_only(both):
    assert kernels_seen(both, replace(GPU, triton="3.8.0")) == {"stock"}
    assert kernels_seen(both, replace(GPU, runtime="cuda 13.0, driver 590.1")) == set()
    assert kernels_seen(both, replace(GPU, cores=64, isa="avx2")) == {"triton.gemv", "stock"}
    on_cpu = CPU.conditions("avx2.gemv")
    assert (on_cpu["triton"], on_cpu["runtime"]) == ("", "")


def test_instruction_sets_and_cores_are_the_cpu(both):
    assert kernels_seen(both, replace(CPU, isa="avx2")) == set()
    assert kernels_seen(both, replace(CPU, cores=4)) == set()


def test_every_row_says_in_clear_what_its_time_depends_on(both):
    (stock,) = [one for one in ProfileCache(both, GPU).rows() if one["kernel"] == "stock"]
    assert {name: stock[name] for name in CONDITIONS} == {
        **{"threads": 0, "torch": "2.13.0", "triton": "", "kernels": "", "compile": "eager"},
        "runtime": "cuda 13.0, driver 580.65",
    }
    note = json.loads((both / "profiles" / CPU.device_key / "key.json").read_text())
    assert note == {"schema": 2, **CPU.hardware()}
    assert note["name"] == "AuthenticAMD family 25 model 17 stepping 1 AMD EPYC"


def test_a_kernels_sources_count_for_their_own_device(tmp_path, monkeypatch):
    import autoq_kernels
    from autoq.cache.fingerprint import _hash_of

    for name in ("cpu/gemv.h", "triton/gemv.py", "layout.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(autoq_kernels, "__path__", [str(tmp_path)])
    cpu, gpu = _hash_of("cpu"), _hash_of("triton")
    (tmp_path / "triton/gemv.py").write_text("new")
    assert _hash_of("cpu") == cpu
    assert _hash_of("triton") != gpu
    (tmp_path / "layout.py").write_text("new")
    assert _hash_of("cpu") != cpu


def test_the_latest_row_of_each_shape_and_scheme_counts(tmp_path):
    cache = ProfileCache(tmp_path, CPU)
    cache.append([row(CPU, "avx2.gemv", time_us=10.0), row(CPU, "avx2.gemv", m=2)])
    cache.append([row(CPU, "avx2.gemv", time_us=12.0)])
    cache.append([row(CPU, "stock", m=2, time_us=5.0)])  # the compiler went: another key on disk, the same to a reader
    again = ProfileCache(tmp_path, CPU).rows()
    assert sorted((one["m"], one["time_us"]) for one in again) == [(1, 12.0), (2, 5.0)]


def test_some_shapes_are_looked_up_alone(tmp_path):
    cache = ProfileCache(tmp_path, CPU)
    cache.append([row(CPU, "avx2.gemv", m=m) | {"bias": bias} for m in (1, 2, 3) for bias in (False, True)])
    wanted = {(1, 64, 32, "bfloat16", True), (3, 64, 32, "bfloat16", False), (3, 64, 32, "float32", True)}
    assert {(one["m"], one["bias"]) for one in cache.rows(wanted)} == {(1, True), (3, False)}
    assert cache.rows(set()) == []


def test_rows_of_elsewhere_are_not_kept(tmp_path):
    cache = ProfileCache(tmp_path, CPU)
    for other in (row(GPU, "stock"), row(replace(CPU, threads=4), "stock"), row(CPU, "stock") | {"origin": "f00"}):
        with pytest.raises(CacheError, match="measured on this device"):
            cache.append([other])
    assert cache.rows() == []


def test_compaction_keeps_every_row_and_few_files(tmp_path):
    cache = ProfileCache(tmp_path, CPU)
    for m in range(1, 41):
        cache.append([row(CPU, "avx2.gemv", m=m), row(CPU, "avx2.gemv", m=99, time_us=float(m))])
    rows = cache.rows()
    assert {one["m"] for one in rows} == {*range(1, 41), 99}
    assert [one["time_us"] for one in rows if one["m"] == 99] == [40.0]
    files = list((tmp_path / "profiles" / CPU.device_key).glob("part-*.parquet"))
    assert len(files) <= parts._COMPACT_AT
    assert sum(tables.read(path, tables.MEASUREMENTS).num_rows for path in files) < 41 + 2 * len(files)


def test_four_processes_share_a_cache_without_losing_or_doubling_rows(tmp_path):
    """Each appends 240 rows of its own and 48 that all have, with compactions going on and a reader looking."""
    writers, batches = 4, 48
    argument = json.dumps(CPU.to_json())
    run = [sys.executable, str(WORKER), str(tmp_path), argument]
    jobs = [subprocess.Popen([*run, str(i), str(batches)], stderr=subprocess.PIPE) for i in range(writers)]
    reader = subprocess.Popen([*run, "reader", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while len(list(tmp_path.glob("ready-*"))) < writers + 1:
        assert all(job.poll() is None for job in (*jobs, reader)), [job.stderr.read() for job in jobs if job.poll()]
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert [(job.communicate()[1].decode(), job.returncode) for job in jobs] == [("", 0)] * writers
    (tmp_path / "done").touch()
    looks, problem = reader.communicate()
    assert (problem.decode(), reader.returncode) == ("", 0)
    assert int(looks) > 10
    rows = ProfileCache(tmp_path, CPU).rows()
    own = {(f"int8wo(a={i})", m) for i in range(writers) for m in range(1, 1 + batches * cache_worker.BATCH)}
    shared = {("shared", m) for m in range(1, 1 + batches)}
    assert {(one["scheme"], one["m"]) for one in rows} == own | shared
    assert len(rows) == len(own) + len(shared)
    place = tmp_path / "profiles" / CPU.device_key
    assert len(list(place.glob("part-*"))) <= parts._COMPACT_AT
    assert list(place.glob(".*.tmp")) == []


def test_a_part_that_vanishes_while_the_folder_is_read_is_no_error(tmp_path, monkeypatch):
    """Removed by hand, say, without the lock: what is there on the next look counts."""
    cache = ProfileCache(tmp_path, CPU)
    for m in (1, 2, 3):
        cache.append([row(CPU, "avx2.gemv", m=m)])
    gone = sorted((tmp_path / "profiles" / CPU.device_key).glob("part-*"))[1]
    read = tables.read

    def read_slowly(path, schema):
        gone.unlink(missing_ok=True)
        return read(path, schema)

    monkeypatch.setattr(tables, "read", read_slowly)
    assert [one["m"] for one in cache.rows()] == [1, 3]


def test_a_lock_whose_folder_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    waited, wait = [], parts._wait

    def removing(handle, kind, place):
        wait(handle, kind, place)
        if not waited:
            place.unlink()
        waited.append(place)

    monkeypatch.setattr(parts, "_wait", removing)
    with parts.locked(tmp_path, alone=True):
        assert waited == [tmp_path / ".lock"] * 2
        with (tmp_path / ".lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_that_is_never_given_back_is_an_error_that_names_it(tmp_path, monkeypatch):
    cache = ProfileCache(tmp_path, CPU)
    cache.append([row(CPU, "stock")])
    monkeypatch.setattr(parts, "_PATIENCE_S", 0.05)
    place = tmp_path / "profiles" / CPU.device_key
    with parts.locked(place, alone=False):
        assert len(cache.rows()) == 1  # readers do not wait for each other
        with pytest.raises(CacheError, match=r"\.lock: another process gives the cache's lock back"):
            cache.append([row(CPU, "stock", m=2)])
    cache.append([row(CPU, "stock", m=2)])
    assert len(cache.rows()) == 2


def test_threads_of_a_process_share_a_cache_too(tmp_path):
    cache = ProfileCache(tmp_path, CPU)
    jobs = [
        threading.Thread(target=lambda i=i: [cache.append([row(CPU, "stock", m=100 * i + j)]) for j in range(1, 21)])
        for i in range(4)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(cache.rows()) == 80


def test_a_damaged_part_is_named(tmp_path):
    for cache, line, place in (
        (ProfileCache(tmp_path, CPU), row(CPU, "stock"), "profiles"),
        (
            SensitivityCache(tmp_path, {"weights": "a"}),
            {"layer": "fc", "scheme": "int8wo", "score": 1.0},
            "sensitivity",
        ),
    ):
        cache.append([line])
        (part,) = (tmp_path / place).glob("*/part-*.parquet")
        part.write_bytes(part.read_bytes()[:-30])
        with pytest.raises(CacheError, match=rf"{part.name}: a table is Parquet.*autoq cache prune"):
            cache.rows()


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2', '{"schema": 2, "device": "cpu"}', '{"schema": 1}'])
def test_a_damaged_key_is_named(tmp_path, text):
    ProfileCache(tmp_path, CPU)
    note = tmp_path / "profiles" / CPU.device_key / "key.json"
    note.write_text(text)
    with pytest.raises(CacheError, match=r"key\.json.*autoq cache prune"):
        ProfileCache(tmp_path, CPU)


def test_a_cache_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="writable"):
        ProfileCache(tmp_path / "file", CPU)


def line(scheme="int8wo", **values):
    return {"layer": "fc", "scheme": scheme, "score": 0.5, "first_order": 0.0, "weight_error": 0.1} | values


def test_sensitivities_are_kept_per_identity_layer_and_scheme(tmp_path):
    identity = {"weights": "a", "batches": "b", "metric": "kl", "autoq": "1.0"}
    SensitivityCache(tmp_path, identity).append([line(), line("int4wo-hqq(group_size=64)", score=0.7)])
    SensitivityCache(tmp_path, identity).append([line(score=0.6)])
    found = {one["scheme"]: one["score"] for one in SensitivityCache(tmp_path, identity).rows()}
    assert found == {"int8wo": 0.6, "int4wo-hqq(group_size=64)": 0.7}
    for part in identity:
        assert SensitivityCache(tmp_path, identity | {part: "other"}).rows() == []
    notes = [json.loads(path.read_text()) for path in (tmp_path / "sensitivity").glob("*/key.json")]
    assert identity | {"schema": 2} in notes


def test_two_processes_that_score_the_same_layers_lose_nothing_of_each_other(tmp_path):
    """One has measured a loss while the other's scores, begun before, arrive later."""
    first, second = SensitivityCache(tmp_path, {"weights": "a"}), SensitivityCache(tmp_path, {"weights": "a"})
    first.append([line(measured=0.4, measured_low=0.3, measured_high=0.5)])
    second.append([line(score=0.5)])
    for _ in range(2):
        (found,) = first.rows()
        assert (found["score"], found["measured"], found["measured_low"]) == (0.5, 0.4, 0.3)
        for _ in range(parts._COMPACT_AT + 1):
            second.append([line(score=0.5)])


@pytest.mark.parametrize("text", ["{}", "[1, true]", '["1"]', "[NaN]", "[1", "[1e999]", ""])
def test_damaged_losses_are_named(tmp_path, text):
    cache = SensitivityCache(tmp_path, {"weights": "a"})
    assert cache.baseline() is None
    cache.keep_baseline([0.5, 1])
    assert cache.baseline() == cache.baseline(samples=2) == [0.5, 1.0]
    with pytest.raises(CacheError, match=r"baseline\.json: .* each of 3 samples; got 2\. Run `autoq cache prune`"):
        cache.baseline(samples=3)
    (path,) = (tmp_path / "sensitivity").glob("*/baseline.json")
    path.write_text(text)
    with pytest.raises(CacheError, match=r"baseline\.json"):
        cache.baseline()


def test_losses_that_cannot_be_read_back_are_not_kept(tmp_path):
    cache = SensitivityCache(tmp_path, {"weights": "a"})
    cache.keep_baseline([float("inf")])
    assert cache.baseline() is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"key": {}}',
        '{"times_us": {"none": {"forward": 1}}}',
        '{"key": {}, "times_us": {}}',
        '{"key": {}, "times_us": {"none": 1}}',
        '{"key": {}, "times_us": {"none": {"forward": 0}}}',
        '{"key": {}, "times_us": {"none": {"forward": "1"}}}',
        '{"key": {}, "times_us": {"none": {"forward": NaN}}}',
        '{"key": {}, "times_us": {"none": {"forward": 1e308}}}',
        '{"key": {}, "times_us": {"none": {}}}',
        '{"key": {}, "times_us": {"none": {"forward": 1}, "int8wo": {}}}',
        '{"key": {}, "times_us": {"none": {"forward": 1}, "int8wo": {"other": 1}}}',
    ],
)
def test_damaged_whole_model_times_are_named(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(CacheError, match=r"t\.json"):
        read_calibration(tmp_path / "t.json")


def test_whole_model_times_of_something_else_are_not_taken(tmp_path, caplog):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"key": {"phases": [["a", 1]]}, "times_us": {"none": {"forward": 3}}}))
    right, plan = {"phases": [("a", 1)]}, {"none": {}}
    assert calibration._known_times(path, right, plan, {"forward"}) == {"none": {"forward": 3.0}}
    assert caplog.text == ""
    for key, plans, phases in (
        ({"phases": [("a", 2)]}, plan, {"forward"}),
        (right, {"none": {}, "int8wo": {}}, {"forward"}),
        (right, plan, {"forward", "decode"}),
        (right, plan, {"other"}),
    ):
        assert calibration._known_times(path, key, plans, phases) is None
        assert "times of something else; the plans are timed again" in caplog.text
        caplog.clear()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).eval()


BATCHES = [torch.arange(32.0).reshape(2, 16)]


def test_a_phase_that_cannot_be_printed_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(InputError, match=r"a phase's name is printable text; got 'a\\nb'"):
        Tuning(model(), BATCHES, {"a\nb": Phase(BATCHES)}, Settings(cache_dir=tmp_path), None)
    assert not any(tmp_path.iterdir())


def identity(one, folder, batches=BATCHES):
    return Tuning(one, batches, None, Settings(cache_dir=folder), None).identity()


def test_scores_are_found_again_by_content_not_by_file_or_object(tmp_path):
    known = identity(model(), tmp_path)
    assert identity(model(), tmp_path) == known
    assert identity(model(), tmp_path, [BATCHES[0].clone()]) == known
    for name in ("a.safetensors", "renamed.safetensors"):
        save_file(model().state_dict(), tmp_path / name)
        loaded = model()
        for tensor in loaded.state_dict().values():
            tensor.zero_()
        assert identity(loaded, tmp_path) != known
        loaded.load_state_dict(load_file(tmp_path / name))
        assert identity(loaded, tmp_path) == known


def test_any_changed_weight_buffer_or_token_misses(tmp_path):
    known = identity(model(), tmp_path)
    for name in model().state_dict():
        changed = model()
        changed.state_dict()[name].view(-1)[-1] += 1
        assert identity(changed, tmp_path)["weights"] != known["weights"], name
    assert identity(model().half(), tmp_path)["weights"] != known["weights"]
    other = BATCHES[0].clone()
    other[1, 15] += 1
    assert identity(model(), tmp_path, [other])["batches"] != known["batches"]
