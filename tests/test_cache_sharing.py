"""Profiles of other devices: taken along, believed as predictions only, verified; and the command line of the cache."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from autoq import candidates, cli, tables
from autoq.cache import Fingerprint, ProfileCache, SensitivityCache, housekeeping, sharing
from autoq.errors import CacheError
from autoq.plan import Plan
from autoq.profiler import Remeasured, isolated_times, profile, remeasure
from autoq.profiler import isolated as isolated_module
from autoq.results import Settings
from autoq.tuning import Tuning
from autoq.workload import LayerInfo, LinearCall, PhaseInfo, Workload

NONE, INT8, INT4 = (candidates.parse(name) for name in ("none", "int8wo", "int4wo-hqq(group_size=64)"))
HERE = Fingerprint.current()
THERE = replace(HERE, name="Another CPU", torch="2.11.0", threads=16, kernels="other")
SHAPE = (4, 64, 64, "float32", False)


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    monkeypatch.setattr(isolated_module, "_SECONDS_PER_SHAPE", 0.0)
    monkeypatch.setattr(isolated_module, "_MAX_COPIES", 2)


def workload(*rows_of_x):
    layer = LayerInfo(name="fc", k=64, n=64, dtype="float32", device="cpu", bias=False)
    calls = tuple(LinearCall(layer="fc", phase="forward", m=m, dtype="float32", count=1) for m in rows_of_x)
    return Workload(layers=(layer,), calls=calls, phases=(PhaseInfo(name="forward"),))


def row(fingerprint, scheme="int8wo", ratio=0.25, m=4, kernel="avx2.int8.gemv", **values):
    return {
        "m": m, "k": 64, "n": 64, "dtype": "float32", "bias": False, "scheme": scheme, "kernel": kernel,
        "status": "ok", "reason": "", "time_us": 8.0 * ratio, "baseline_us": 8.0, "ratio": ratio, "origin": "",
        "device": fingerprint.device_key, "error": 1e-4, "weight_bytes": 4352, **fingerprint.conditions(kernel),
    } | values  # fmt: skip


def shared(folder, *rows, device=THERE):
    """A file with another device's profile."""
    made = folder / "elsewhere"
    ProfileCache(made, device).append(rows)
    sharing.export_profile(sharing.find(made, device.device_key), folder / "profile.parquet")
    return folder / "profile.parquet"


@pytest.fixture
def file(tmp_path):
    return shared(tmp_path, row(THERE), row(THERE, "none", 1.0, kernel="stock"), row(THERE, ratio=0.5, m=7))


def test_a_profile_travels_as_one_file_with_its_device_in_clear(tmp_path, file):
    assert json.loads(pq.read_metadata(file).metadata[b"autoq"]) == {"schema": 2, "device": THERE.hardware()}
    profile_, count = sharing.import_profile(tmp_path / "cache", file)
    assert (profile_.key, profile_.foreign, count) == (THERE.device_key, True, 3)
    assert profile_.hardware == THERE.hardware()
    before = ProfileCache(tmp_path / "elsewhere", THERE).rows()
    assert sorted(profile_.rows(), key=str) == sorted(before, key=str)
    sharing.import_profile(tmp_path / "cache", file)
    assert len(profile_.rows()) == 3  # the same rows twice are the same rows


def test_a_foreign_profile_is_not_seen_even_by_the_same_kind_of_device(tmp_path):
    file = shared(tmp_path, row(HERE), device=HERE)
    profile_, _ = sharing.import_profile(tmp_path / "cache", file)
    assert profile_.key == HERE.device_key
    assert ProfileCache(tmp_path / "cache", HERE).rows() == []


FORGERIES = {
    "rows of another device": ({"device": "0" * 16}, "device = '0000000000000000'"),
    "a predicted row": ({"origin": "f00"}, "origin = 'f00'"),
    "no rows of x": ({"m": 0}, "m = 0"),
    "a shape beyond memory": ({"k": 1 << 40}, "k = 1099511627776"),
    "no bias": ({"bias": None}, "bias = None"),
    "a status": ({"status": "fine"}, "status = 'fine'"),
    "no threads": ({"threads": None}, "threads = None"),
    "an unprintable kernel": ({"kernel": "\x1b[2J"}, "kernel = "),
    "a type that is code": ({"dtype": "__import__('os')"}, "dtype"),
    "a scheme that is none": ({"scheme": "int8wo; rm -rf"}, "scheme"),
    "a ratio of nothing": ({"ratio": math.nan}, "ratio"),
    "a ratio below zero": ({"ratio": -0.25, "time_us": -2.0}, "ratio"),
    "a ratio that is none": ({"ratio": 0.01}, "ratio"),
    "no ratio": ({"ratio": None}, "ratio"),
    "no baseline": ({"baseline_us": None}, "baseline_us, ratio = 2.0, None, 0.25"),
    "a time of ages": ({"time_us": 4e300, "baseline_us": 1.6e301}, "time_us"),
    "no kernel": ({"kernel": None}, "kernel = None"),
    "no reason": ({"reason": None}, "reason = None"),
}


@pytest.mark.parametrize("forged", FORGERIES)
def test_rows_that_autoq_would_not_have_written_are_refused(tmp_path, forged):
    values, reason = FORGERIES[forged]
    path = tmp_path / "f.parquet"
    rows = [row(THERE), row(THERE, m=2) | values]
    note = {"schema": 2, "device": THERE.hardware()}
    tables.write(path, tables.table(tables.MEASUREMENTS, rows), note=note)
    with pytest.raises(CacheError, match=rf"f\.parquet row 1: an exported profile has.*{reason}"):
        sharing.import_profile(tmp_path / "cache", path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("forged", FORGERIES)
def test_such_rows_in_the_cache_itself_are_refused_by_whoever_reads_them(tmp_path, forged):
    """A cache may be shared: its files are believed no more than imported ones."""
    cache = ProfileCache(tmp_path, THERE)
    cache.append([row(THERE)])
    values, reason = FORGERIES[forged]
    part = tmp_path / "profiles" / THERE.device_key / "part-000001-00000000.parquet"
    tables.write(part, tables.table(tables.MEASUREMENTS, [row(THERE, m=3), row(THERE, m=2) | values]))
    profile_ = sharing.find(tmp_path, THERE.device_key)
    for read in (cache.rows, profile_.rows, lambda: sharing.prediction(profile_, [SHAPE], HERE)):
        with pytest.raises(CacheError, match=rf"{part.name} row 1: a row says what autoq measured; got .*{reason}"):
            read()
    (found,) = housekeeping.check(tmp_path)[1]
    assert (found.path, found.removable) == (part, True)
    housekeeping.prune(tmp_path, [HERE])
    assert len(cache.rows()) == 1


SCORE = {"layer": "fc", "scheme": "int8wo", "score": 0.5, "measured": 0.4, "measured_low": 0.3, "measured_high": 0.5}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"scheme": None}, "scheme = None"),
        ({"scheme": "?("}, "scheme = "),
        ({"layer": None}, "layer = None"),
        ({"score": -1.0}, "score"),
        ({"score": None}, "score"),
        ({"measured_low": None}, "measured_low"),
        ({"measured": math.nan}, "measured"),
        ({"measured": -0.1}, "measured"),
        ({"measured_high": math.inf}, "measured"),
        ({"measured_low": 5.0, "measured_high": -5.0}, "measured"),
    ],
)
def test_scores_that_cannot_be_are_refused_by_name(tmp_path, values, reason):
    cache = SensitivityCache(tmp_path, {"weights": "a"})
    cache.append([SCORE, SCORE | {"layer": "never called", "score": None} | dict.fromkeys(UNMEASURED)])
    (folder,) = (tmp_path / "sensitivity").iterdir()
    part = folder / "part-000001-00000000.parquet"
    tables.write(part, tables.table(tables.SENSITIVITY, [SCORE | values]))
    with pytest.raises(CacheError, match=rf"{part.name} row 0: a row says what autoq measured; got .*{reason}"):
        cache.rows()
    assert [one.path for one in housekeeping.check(tmp_path)[1]] == [part]
    with pytest.raises(CacheError, match="a row says what autoq measured"):
        SensitivityCache(tmp_path / "new", {}).append([SCORE | values])


UNMEASURED = ("measured", "measured_low", "measured_high")


@pytest.mark.parametrize(
    "note",
    [
        None,
        {"schema": 3, "device": THERE.hardware()},
        {"schema": 2, "device": THERE.hardware() | {"name": "x\x1b[31m"}},
        {"schema": 2, "device": THERE.hardware() | {"name": "x" * 2000}},
        {"schema": 2, "device": THERE.hardware() | {"cores": "8"}},
        {"schema": 2, "device": THERE.hardware() | {"device": "../../etc"}},
        {"schema": 2, "device": {"device": "cpu"}},
        {"schema": 2, "device": "cpu"},
    ],
)
def test_a_device_that_is_none_is_refused(tmp_path, note):
    tables.write(tmp_path / "f.parquet", tables.table(tables.MEASUREMENTS, [row(THERE)]), note=note)
    with pytest.raises(CacheError, match=r"f\.parquet"):
        sharing.import_profile(tmp_path / "cache", tmp_path / "f.parquet")
    assert not (tmp_path / "cache").exists()


def test_shapes_that_were_not_measured_take_the_ratios_of_elsewhere_and_say_so(tmp_path, file):
    foreign, _ = sharing.import_profile(tmp_path, file)
    told = sharing.prediction(foreign, [SHAPE], HERE)
    assert set(told.ratios) == {(SHAPE, "int8wo"), (SHAPE, "none")}
    kept = []
    rows = profile(workload(4), [NONE, INT8, INT4], fingerprint=HERE, ratios=told.ratios, keep=kept.extend)
    none, int8, int4 = rows
    assert [one["origin"] for one in rows] == ["", THERE.device_key, ""]
    assert (int8["status"], int8["ratio"], int8["time_us"]) == ("ok", 0.25, 0.25 * int8["baseline_us"])
    assert int8["baseline_us"] == none["baseline_us"]  # measured here, in one window
    assert (int8["torch"], int8["threads"], int8["device"]) == ("2.11.0", 16, HERE.device_key)
    assert 0 < int8["error"] < 1e-3  # checked here
    assert int8["kernel"] != "avx2.int8.gemv" or HERE.isa  # the kernel's name is of here
    assert kept == [none, int4]  # what was measured here, and nothing else
    times = isolated_times(workload(4), rows, [NONE.scheme, INT8.scheme])
    assert times["fc", INT8.scheme, "forward"] == 0.25 * times["fc", NONE.scheme, "forward"]
    # Once measured here, nothing is predicted.
    cache = ProfileCache(tmp_path, HERE)
    cache.append(kept)
    again = profile(workload(4), [NONE, INT4], fingerprint=HERE, known=cache.rows(), ratios=told.ratios)
    assert [one["ratio"] for one in again] == [one["ratio"] for one in kept]


def test_a_kernel_that_is_wrong_here_is_not_predicted():
    class Wrong(type(INT8)):
        def linear(self, x, p, bias=None):
            return 2 * super().linear(x, p, bias)

    rows = profile(workload(4), [Wrong()], fingerprint=HERE, ratios={(SHAPE, "int8wo"): row(THERE)})
    assert [(one["status"], one["origin"]) for one in rows] == [("wrong", "")]


def test_a_kernel_that_came_or_went_is_measured_again(monkeypatch):
    """Without a compiler the same products run in plain PyTorch: neither time says anything of the other."""
    rows = profile(workload(4), [NONE, INT8], fingerprint=HERE)
    plain = [one | {"kernel": "torch.reference"} if one["scheme"] == "int8wo" else one for one in rows]
    kept = []
    again = profile(workload(4), [NONE, INT8], fingerprint=HERE, known=plain, keep=kept.extend)
    assert [one["scheme"] for one in kept] == ["int8wo"]
    assert again[1]["kernel"] == rows[1]["kernel"] != "torch.reference"
    kept.clear()
    stock = [one | {"kernel": "stock"} for one in rows]
    profile(workload(4), [INT8], fingerprint=HERE, known=stock, keep=kept.extend)
    assert len(kept) == 1


def test_ratios_come_from_one_set_of_software(tmp_path):
    """Of three sets of threads the one with the most rows counts; rows that failed there predict nothing."""
    for threads, ms in ((1, (1,)), (8, (1, 2, 3)), (16, (1, 2))):
        device = replace(THERE, threads=threads)
        rows = [row(device, m=m, ratio=threads / 100) for m in ms]
        ProfileCache(tmp_path, device).append([*rows, row(device, "none", 1.0, m=1, kernel="stock")])
    ProfileCache(tmp_path, THERE).append([row(THERE, m=9) | {"status": "error", "ratio": None}])
    shapes = [(m, 64, 64, "float32", False) for m in (1, 2, 3, 9)]
    told = sharing.prediction(sharing.find(tmp_path, THERE.device_key), shapes, HERE)
    assert {one["ratio"] for (_, scheme), one in told.ratios.items() if scheme == "int8wo"} == {0.08}
    assert len(told.ratios) == 4
    assert told.device == "Another CPU (8 threads, torch 2.11.0)"


def tuning(cache, key):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).eval()
    settings = Settings(cache_dir=cache, profile_from=key, candidates=(NONE, INT8))
    made = Tuning(model, [torch.randn(4, 64)], None, settings, None)
    made.prepare()
    return made


def test_a_tuning_tells_in_its_notes_and_its_plan_what_was_predicted(tmp_path, file):
    sharing.import_profile(tmp_path, file)
    without = tuning(tmp_path / "empty", None)
    assert {one["origin"] for one in without.profile()} == {""}
    assert without.predicted_from == {}
    assert without.notes == []
    run = tuning(tmp_path, THERE.device_key[:5])
    origins = {one["scheme"]: one["origin"] for one in run.profile()}
    assert origins == {"none": "", "int8wo": THERE.device_key}
    name = "Another CPU (16 threads, torch 2.11.0)"
    unverified = "that device's profile is not verified here"
    assert run.notes == [f"Times of 1 shapes are predicted from {name}, not measured here; {unverified}."]
    facts = {"profile": THERE.device_key, "device": name, "shapes": 1, "verified": False}
    assert run.predicted_from == {"profile_from": facts}
    assert [one["scheme"] for one in ProfileCache(tmp_path, HERE).rows()] == ["none"]
    plan = Plan(layers={"0": "int8wo"}, provenance=run.predicted_from)
    assert Plan.from_json(plan.to_json()).provenance["profile_from"] == facts
    with pytest.raises(CacheError, match=r"'fff', which is of none\. There are: "):
        tuning(tmp_path, "fff")


def test_rows_measured_again_stand_beside_what_was_kept():
    rows = profile(workload(4, 8), [NONE, INT8, INT4], fingerprint=HERE)
    huge = row(HERE, m=1 << 20, k=1 << 20)
    found = remeasure([*rows, huge, row(HERE, "newer-scheme"), row(HERE, dtype="int7")], 100, fingerprint=HERE)
    assert sorted(one["scheme"] for one in found.now) == sorted([str(INT8.scheme), str(INT4.scheme)] * 2)
    assert [(a["m"], a["scheme"]) for a in found.kept] == [(b["m"], b["scheme"]) for b in found.now]
    assert found.failed == 0
    again = remeasure(rows, 2, fingerprint=HERE, seed=1)
    assert len(again.now) == 2


def test_the_deviation_is_the_median_and_failures_are_far_off():
    def found(*ratios):
        now = [{"status": "ok" if one else "error", "ratio": one} for one in ratios]
        return Remeasured(kept=[{"ratio": 0.5}] * len(ratios), now=now)

    assert found(0.5, 0.55, 1.0).deviation == pytest.approx(0.1)
    assert found(0.5, 0.45, 0.1).quotients == [1.0, 0.9, 0.2]
    assert found(0.5, None, None).deviation == math.inf
    assert found().deviation == 0.0


def run(*arguments, cache):
    return cli.run(["cache", *map(str, arguments), "--cache-dir", str(cache)])


def output(capsys, *arguments, cache, code=0):
    assert run(*arguments, "--json", cache=cache) == code
    return json.loads(capsys.readouterr().out)


def times(monkeypatch, quotient, rows=12):
    """Let measuring again find the kept ratios times a quotient."""

    def again(kept, count, **_):
        kept = (list(kept) * rows)[: min(rows, count)]
        return Remeasured(kept=kept, now=[one | {"ratio": one["ratio"] * quotient} for one in kept])

    monkeypatch.setattr("autoq.profiler.remeasure", again)


def test_a_profile_that_agrees_is_verified_until_something_changes(tmp_path, file, monkeypatch, capsys):
    cache = tmp_path / "cache"
    foreign, _ = sharing.import_profile(cache, file)
    verify = ("verify", foreign.key, "--measure", 20)
    times(monkeypatch, 1.2)
    found = output(capsys, *verify, cache=cache)
    assert (found["verified"], found["median_quotient"]) == (False, pytest.approx(1.2))
    assert not sharing.is_verified(foreign, HERE)
    times(monkeypatch, 0.95, rows=1)
    assert output(capsys, *verify, cache=cache)["verified"] is False  # two rows can be measured, one was
    times(monkeypatch, 0.95, rows=2)
    assert output(capsys, *verify, cache=cache)["verified"] is True  # the third is of PyTorch's own layer
    times(monkeypatch, 0.95)
    assert output(capsys, *verify, cache=cache)["verified"] is True
    assert sharing.is_verified(foreign, HERE)
    assert not sharing.is_verified(foreign, replace(HERE, torch="another"))
    told = sharing.prediction(foreign, [SHAPE], HERE)
    assert told.sentence(1).endswith("not measured here; a sample measured here agreed.")
    (listed,) = output(capsys, "ls", cache=cache)["profiles"]
    assert listed["kind"] == "foreign, verified"
    more = shared(tmp_path / "more", row(THERE, m=8))
    sharing.import_profile(cache, more)
    assert not sharing.is_verified(foreign, HERE)


def test_a_sample_of_one_set_of_software_says_nothing_of_another(tmp_path):
    """Rows of 64 threads agreed; those of 8 threads, which are the only ones of these shapes, were not looked at."""
    few = replace(THERE, threads=8)
    ProfileCache(tmp_path, THERE).append([row(THERE, m=m) for m in range(1, 101)])
    ProfileCache(tmp_path, few).append([row(few, m=m) for m in range(1000, 1005)])
    profile_ = sharing.find(tmp_path, THERE.device_key)
    sample = sharing.coherent(profile_.rows())
    assert {one["threads"] for one in sample} == {16}
    sharing.mark_verified(profile_, HERE, profile_.parts.files(), sample=sample, deviation=0.05)
    assert sharing.prediction(profile_, [SHAPE], HERE).verified
    told = sharing.prediction(profile_, [(m, 64, 64, "float32", False) for m in range(1000, 1005)], HERE)
    assert (len(told.ratios), told.verified) == (5, False)
    assert sharing.prediction(profile_, [], HERE).verified is False


def test_a_profile_of_another_kind_of_device_is_refused(tmp_path, capsys):
    values = {"device": "cuda", "name": "H100", "isa": "", "triton": "3.7", "runtime": "cuda 13"}
    gpu = replace(THERE, **values)
    ProfileCache(tmp_path, gpu).append([row(gpu)])
    with pytest.raises(CacheError, match=r"of the same kind of device, cpu; got cuda, H100"):
        sharing.prediction(sharing.find(tmp_path, gpu.device_key), [SHAPE], HERE)
    if not torch.cuda.is_available():
        assert run("verify", gpu.device_key, "--measure", 1, cache=tmp_path) == 1
        assert "of the same kind of device, cpu; got cuda, H100" in capsys.readouterr().err


def test_a_compiled_kernel_does_not_predict_plain_code(monkeypatch):
    """Nor the other way: such a shape is timed here."""
    for kernel, origin in (("torch.reference", ""), ("avx2.int8.gemv", THERE.device_key)):
        ratios = {(SHAPE, "int8wo"): row(THERE, kernel=kernel)}
        (found,) = profile(workload(4), [INT8], fingerprint=HERE, ratios=ratios)
        assert (found["status"], found["origin"]) == ("ok", origin)


def test_the_own_and_the_imported_profile_of_a_device_can_both_be_named(tmp_path, capsys):
    file = shared(tmp_path, row(HERE), device=HERE)
    cache = tmp_path / "cache"
    ProfileCache(cache, HERE).append([row(HERE), row(HERE, m=8)])
    sharing.import_profile(cache, file)
    own = HERE.device_key
    for key, foreign in ((own, False), (f"profiles/{own[:6]}", False), (f"foreign/{own}", True)):
        assert output(capsys, "show", key, cache=cache)["foreign"] is foreign
        assert sharing.find(cache, key, foreign=foreign).foreign is foreign
    assert sharing.find(cache, f"profiles/{HERE.device_key}", foreign=True).foreign is False
    with pytest.raises(CacheError, match="which is of none"):
        sharing.find(cache, f"elsewhere/{HERE.device_key}")


def test_this_devices_times_are_held_against_new_ones(tmp_path, monkeypatch, capsys):
    ProfileCache(tmp_path, HERE).append([row(HERE), row(HERE, m=8)])
    times(monkeypatch, 1.05)
    found = output(capsys, "verify", "--measure", 20, cache=tmp_path)
    assert "verified" not in found
    assert (found["files"], found["faults"], found["failed"]) == (2, [], 0)
    assert found["median_deviation"] == pytest.approx(0.05)
    assert run("verify", "--measure", 20, cache=tmp_path) == 0
    assert "median 1.050, from 1.050 to 1.050" in capsys.readouterr().out


def test_ls_and_show_tell_what_there_is_and_what_holds(tmp_path, file, capsys):
    ProfileCache(tmp_path, HERE).append([row(HERE), row(HERE, "none", 1.0, kernel="stock")])
    older = replace(HERE, torch="1.0")
    ProfileCache(tmp_path, older).append([row(older)])
    SensitivityCache(tmp_path, {"weights": "a"})
    sharing.import_profile(tmp_path, file)
    found = output(capsys, "ls", cache=tmp_path)
    assert [(one["kind"], one["rows"], one["current"], one["fault"]) for one in found["profiles"]] == [
        ("this machine", 3, 2, ""),
        ("foreign", 3, 0, ""),
    ]
    assert found["models"] == 1
    shown = output(capsys, "show", HERE.device_key[:8], cache=tmp_path)
    assert shown["device"] == HERE.hardware()
    groups = {(one["torch"], one["kernels"]): (one["rows"], one["hold_now"]) for one in shown["rows"]}
    assert groups == {
        (HERE.torch, HERE.kernels): (1, True),
        (HERE.torch, ""): (1, True),
        ("1.0", HERE.kernels): (1, False),
    }
    for verb in (["ls"], ["show", THERE.device_key]):
        assert run(*verb, cache=tmp_path) == 0
        assert "Another CPU" in capsys.readouterr().out


def test_export_and_import_by_command(tmp_path, capsys):
    ProfileCache(tmp_path / "a", HERE).append([row(HERE)])
    file = tmp_path / "mine.parquet"
    assert output(capsys, "export", HERE.device_key, file, cache=tmp_path / "a")["rows"] == 1
    found = output(capsys, "import", file, cache=tmp_path / "b")
    assert (found["rows"], found["device"]) == (1, HERE.hardware())
    assert run("import", file, cache=tmp_path / "b") == 0
    assert f"--profile-from {HERE.device_key}" in capsys.readouterr().out
    assert run("export", "nothing", file, cache=tmp_path / "a") == 1
    assert "'nothing', which is of none" in capsys.readouterr().err


def untidy(cache):
    """A cache with one of each thing that serves nobody; the paths of what is sound."""
    older, other = replace(HERE, torch="1.0"), replace(HERE, threads=HERE.threads + 1)
    for device in (HERE, older, other, THERE):
        ProfileCache(cache, device).append([row(device)])
    own = cache / "profiles" / HERE.device_key
    (own / "part-000000-00000000.parquet").write_bytes(b"PAR1")
    (own / ".part-000007-00000000.parquet.a1b2c3d4.autoq.tmp").write_bytes(b"half")
    early = cache / "profiles" / "0123456789abcdef"
    early.mkdir()
    (early / "key.json").write_text('{"device": "cpu", "name": "old"}\n')
    (early / "part-000000-11111111.parquet").write_bytes(b"of an earlier form")
    SensitivityCache(cache, {"weights": "a", "autoq": "0.0.1"}).keep_baseline([1.0])
    SensitivityCache(cache, {"weights": "b"}).keep_baseline([1.0])
    (cache / "calibration").mkdir()
    (cache / "calibration" / "bad.json").write_text("{}")
    (cache / "calibration" / "good.json").write_text('{"key": {}, "times_us": {"none": {"forward": 1.5}}}')


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_prune_says_what_goes_and_keeps_what_is_sound(tmp_path, capsys):
    untidy(tmp_path)
    faults = output(capsys, "verify", cache=tmp_path, code=1)["faults"]
    assert sorted(Path(one["path"]).name for one in faults) == ["bad.json", "part-000000-00000000.parquet"]
    before = everything(tmp_path)
    planned = output(capsys, "prune", "--dry-run", cache=tmp_path)["findings"]
    assert {name: data for name, data in everything(tmp_path).items() if not name.endswith(".lock")} == {
        name: data for name, data in before.items() if not name.endswith(".lock")
    }
    done = output(capsys, "prune", cache=tmp_path)["findings"]
    assert done == planned
    reasons = {Path(one["path"]).name: one["reason"] for one in done}
    early = reasons.pop("0123456789abcdef")
    assert early == "written by an earlier version of autoq"
    assert reasons.pop(HERE.device_key) == "1 rows of torch 1.0"
    assert reasons.pop(".part-000007-00000000.parquet.a1b2c3d4.autoq.tmp") == "left by a process that was killed"
    assert "written by version 0.0.1 of autoq" in reasons.values()
    assert len(reasons) == 3
    assert len(ProfileCache(tmp_path, HERE).rows()) == 1
    assert len(ProfileCache(tmp_path, replace(HERE, threads=HERE.threads + 1)).rows()) == 1
    assert len(ProfileCache(tmp_path, THERE).rows()) == 1
    assert SensitivityCache(tmp_path, {"weights": "b"}).baseline() == [1.0]
    assert [path.name for path in (tmp_path / "calibration").iterdir()] == ["good.json"]
    assert not (tmp_path / "profiles" / "0123456789abcdef").exists()
    assert output(capsys, "prune", cache=tmp_path)["findings"] == []
    assert output(capsys, "verify", cache=tmp_path)["faults"] == []


def test_prune_leaves_what_it_cannot_read_and_files_of_others(tmp_path, monkeypatch):
    ProfileCache(tmp_path, THERE).append([row(THERE)])
    early = tmp_path / "profiles" / "0123456789abcdef"
    early.mkdir()
    (early / "key.json").write_text("{}")
    (early / "notes.txt").write_text("mine")
    note = tmp_path / "profiles" / THERE.device_key / "key.json"
    opened = os.open

    def refusing(path, *arguments, **named):
        if str(path) == str(note):
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", refusing)
    found = {one.path: one.removable for one in housekeeping.prune(tmp_path, [HERE])}
    assert found == {early: True, note: False}
    assert note.exists()
    assert [path.name for path in early.iterdir()] == ["notes.txt"]


def test_an_earlier_cache_is_refused_with_a_clear_word(tmp_path, capsys):
    early = tmp_path / "profiles" / "0123456789abcdef"
    early.mkdir(parents=True)
    (early / "key.json").write_text('{"device": "cpu"}')
    (listed,) = output(capsys, "ls", cache=tmp_path)["profiles"]
    assert "schema 1, of an earlier version of autoq, which is not read" in listed["fault"]
    with pytest.raises(CacheError, match="autoq cache prune"):
        sharing.find(tmp_path, "0123")
    assert tuning(tmp_path, None).notes == [
        f"Times that an earlier version of autoq kept in {tmp_path} are not read; `autoq cache prune`."
    ]


def test_a_later_cache_is_left_alone(tmp_path, capsys):
    ProfileCache(tmp_path, HERE).append([row(HERE)])
    folder = tmp_path / "profiles" / HERE.device_key
    (folder / "key.json").write_text(json.dumps({"schema": 3, "of": "another form"}))
    (folder / "part-000009-00000000.parquet").write_bytes(b"of a later form")
    (folder / ".part-000010-00000000.parquet.a1b2c3d4.autoq.tmp").write_bytes(b"half")
    before = everything(tmp_path)
    (found,) = output(capsys, "prune", cache=tmp_path)["findings"]
    assert (found["path"], found["removable"]) == (str(folder), False)
    assert found["reason"] == "written by a later version of autoq"
    assert everything(tmp_path) == before
    assert output(capsys, "verify", cache=tmp_path) == {"files": 0, "faults": []}
    with pytest.raises(CacheError, match=r"schema 3, of a later version of autoq.*Use that version"):
        ProfileCache(tmp_path, HERE)
    with pytest.raises(CacheError, match=r"schema 3, of a later version of autoq.*Use that version"):
        sharing.open_profile(folder)


def test_scores_whose_key_says_something_else_are_found_and_mended(tmp_path, capsys):
    SensitivityCache(tmp_path, {"weights": "a"}).append([SCORE])
    (note,) = (tmp_path / "sensitivity").glob("*/key.json")
    note.write_text(note.read_text().replace('"a"', '"b"'))
    with pytest.raises(CacheError, match="autoq cache prune"):
        SensitivityCache(tmp_path, {"weights": "a"})
    (fault,) = output(capsys, "verify", cache=tmp_path, code=1)["faults"]
    assert fault["path"] == str(note)
    assert [one["path"] for one in output(capsys, "prune", cache=tmp_path)["findings"]] == [str(note)]
    assert len(SensitivityCache(tmp_path, {"weights": "a"}).rows()) == 1


def test_a_folder_whose_process_was_killed_before_it_wrote_is_no_fault(tmp_path):
    for place in ("profiles", "sensitivity"):
        folder = tmp_path / place / "0123456789abcdef"
        folder.mkdir(parents=True)
        (folder / ".key.json.a1b2c3d4.autoq.tmp").write_text("")
    assert housekeeping.check(tmp_path) == (0, [])
    (folder / "part-000000-00000000.parquet").write_text("")
    assert [one.path.name for one in housekeeping.check(tmp_path)[1]] == ["key.json", "part-000000-00000000.parquet"]


def test_parts_that_are_merged_while_they_are_checked_are_no_fault(tmp_path, monkeypatch):
    cache = ProfileCache(tmp_path, HERE)
    for m in (1, 2, 3):
        cache.append([row(HERE, m=m)])
    gone = sorted((tmp_path / "profiles" / HERE.device_key).glob("part-*"))[1]
    read = tables.read

    def read_slowly(path, schema):
        gone.unlink(missing_ok=True)
        return read(path, schema)

    monkeypatch.setattr(tables, "read", read_slowly)
    assert housekeeping.check(tmp_path) == (3, [])  # the key and two parts


def test_a_profile_in_a_folder_of_another_name_is_refused(tmp_path, file):
    foreign, _ = sharing.import_profile(tmp_path, file)
    moved = foreign.folder.rename(foreign.folder.with_name("0" * 16))
    with pytest.raises(CacheError, match="named after its device"):
        sharing.open_profile(moved)


@pytest.mark.parametrize("verb", ["ls", "show", "verify", "prune", "export", "import"])
def test_help_of_each_verb_has_an_example_and_json(verb, capsys):
    assert cli.run(["cache", verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"autoq cache {verb}" in text.partition("Example:")[2]
    assert "--json" in text


def test_help_of_the_cache_does_not_import_torch():
    code = "import sys; from autoq.cli import run; run(['cache', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
