import json

import pytest

from autoq import tables
from autoq.cache import Fingerprint, ProfileCache, SensitivityCache
from autoq.errors import AutoqError, CacheError, InputError
from autoq.workload import LayerInfo, LinearCall, PhaseInfo, Workload


def row(m=1, scheme="int8wo", time=10.0, device="d"):
    return {
        "m": m, "k": 64, "n": 32, "dtype": "bfloat16", "bias": False, "scheme": scheme, "kernel": "x",
        "status": "ok", "reason": "", "time_us": time, "baseline_us": 20.0, "ratio": time / 20, "threads": 2,
        "device": device,
    }  # fmt: skip


def workload():
    return Workload(
        layers=(LayerInfo(name="fc", k=64, n=32, dtype="bfloat16", device="cpu", bias=False),),
        calls=(LinearCall(layer="fc", phase="forward", m=4, dtype="bfloat16", count=2),),
        phases=(PhaseInfo(name="forward"),),
    )


def test_a_table_has_exactly_its_columns(tmp_path):
    content = tables.table(tables.MEASUREMENTS, [row()])
    assert content.column_names == tables.MEASUREMENTS.names
    tables.write(tmp_path / "t.parquet", content)
    assert tables.read(tmp_path / "t.parquet", tables.MEASUREMENTS).to_pylist() == content.to_pylist()
    with pytest.raises(CacheError, match="surprise"):
        tables.table(tables.MEASUREMENTS, [row() | {"surprise": 1}])
    with pytest.raises(CacheError, match="types"):
        tables.table(tables.MEASUREMENTS, [row() | {"m": "one"}])


def test_a_table_of_another_kind_or_cut_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    tables.write(path, tables.table(tables.SENSITIVITY, []))
    with pytest.raises(CacheError, match="all columns"):
        tables.read(path, tables.MEASUREMENTS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CacheError, match="Parquet"):
        tables.read(path, tables.SENSITIVITY)


def test_the_profile_cache_keeps_the_latest_row_of_each_key(tmp_path):
    fingerprint = Fingerprint.current()
    cache = ProfileCache(tmp_path, fingerprint)
    cache.append([row(time=10.0), row(m=2)])
    cache.append([row(time=12.0)])
    again = ProfileCache(tmp_path, fingerprint).rows()
    assert sorted((one["m"], one["time_us"]) for one in again) == [(1, 12.0), (2, 10.0)]


def test_compaction_loses_nothing(tmp_path):
    cache = ProfileCache(tmp_path, Fingerprint.current())
    for m in range(1, 41):
        cache.append([row(m=m)])
    assert {one["m"] for one in cache.rows()} == set(range(1, 41))
    parts = list((tmp_path / "profiles" / cache.fingerprint.key).glob("part-*.parquet"))
    assert len(parts) <= 33


def test_another_device_sees_no_rows_and_the_key_lies_in_clear(tmp_path):
    here = Fingerprint.current()
    ProfileCache(tmp_path, here).append([row()])
    parts = here.to_json() | {"threads": here.threads + 1}
    elsewhere = Fingerprint(**parts)
    assert elsewhere.key != here.key
    assert ProfileCache(tmp_path, elsewhere).rows() == []
    note = json.loads((tmp_path / "profiles" / here.key / "key.json").read_text())
    assert note == here.to_json()


def test_sensitivities_are_kept_per_identity(tmp_path):
    line = {"layer": "fc", "scheme": "int8wo", "score": 0.5, "first_order": 0.0, "weight_error": 0.1}
    SensitivityCache(tmp_path, {"weights": "a"}).append([line])
    assert SensitivityCache(tmp_path, {"weights": "b"}).rows() == []
    assert SensitivityCache(tmp_path, {"weights": "a"}).rows()[0]["score"] == 0.5


def test_a_cache_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="writable"):
        ProfileCache(tmp_path / "file", Fingerprint.current())


def test_a_workload_round_trips_and_refuses_what_it_does_not_know(tmp_path):
    one = workload()
    one.save(tmp_path / "w.json")
    assert Workload.load(tmp_path / "w.json") == one
    value = one.to_json()
    with pytest.raises(InputError, match="schema"):
        Workload.from_json(value | {"schema": 99})
    value["layers"][0]["surprise"] = 1
    with pytest.raises(InputError, match="surprise"):
        Workload.from_json(value)
    (tmp_path / "w.json").write_text((tmp_path / "w.json").read_text()[:50])
    with pytest.raises(InputError, match="JSON"):
        Workload.load(tmp_path / "w.json")


def test_an_error_says_where_what_and_what_to_do_and_pickles():
    import pickle

    error = CacheError("the rule", where="file.x", got=3, fix="Do this.")
    assert str(error) == "file.x: the rule; got 3. Do this."
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (CacheError, str(error))
    assert issubclass(CacheError, AutoqError)
