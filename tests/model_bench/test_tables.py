"""What is shown of a report, and how engines are chosen."""

import io
import json

import pytest
from PIL import Image
from rich.console import Console

from autoq.errors import AutoqError, InputError
from autoq.model_bench import chosen, own_engines, picture, table
from autoq.model_bench.engine import Engine
from autoq.model_bench.peers import LLAMACPP_TYPES, peer_engines
from autoq.model_bench.preparing import check_plans
from tests.model_bench.sample import NAMES, report, row


def text(shown):
    stream = io.StringIO()
    Console(file=stream, width=120).print(shown)
    return stream.getvalue()


def test_the_table_has_every_engine_the_fastest_first():
    found = text(table.measured(report(), phase="decode", batch=1))
    names = [line.split()[1] for line in found.splitlines() if line.startswith("│")]
    assert names == sorted(NAMES, key=lambda name: NAMES[name][0])
    assert "8.46–9.79" in found
    assert "61%" in found
    assert "…" not in found


def test_what_is_unknown_is_shown_as_such():
    unknown = dict.fromkeys(("weight_bytes", "kv_bytes", "peak_mb", "bandwidth_share"))
    found = text(table.measured(report(rows=[row("x", 123.4, None, **unknown)]), phase="decode", batch=1))
    assert found.count(f" {table.UNKNOWN} ") == 5
    assert "123.4" in found


def test_the_breakdown_has_the_parts_and_their_sum():
    found = text(table.breakdown(report(), phase="decode", batch=1))
    rows = [line.strip("│ ").split("│") for line in found.splitlines() if line.startswith("│")]
    assert [(part.strip(), float(value)) for part, value in rows] == [
        ("linear int8wo", 4.0),
        ("attention", 2.0),
        ("lm_head int8wo", 1.5),
        ("Python and dispatch", 1.4),
        ("in all", 8.9),
    ]
    assert table.breakdown(report(), phase="prefill", batch=1) is None


def test_missing_and_failed_engines_are_listed_with_the_reason():
    found = text(table.absent(report()))
    assert "llamacpp-Q2_K │ no .venv/peers/bin/python: make peers" in found
    assert "openvino-int2 │ load: ValueError: 2 bits" in found
    assert table.absent(report(missing=(), failed=())) is None


def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path):
    report(rows=[row("x", 1.0, float("inf"))]).save(tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["rows"][0]["perplexity"] is None
    assert found["failed"] == [{"name": "openvino-int2", "reason": "load: ValueError: 2 bits"}]


def test_no_label_of_the_picture_lies_on_another_or_on_a_mark():
    figure = picture.drawn(report())
    (axes,) = figure.axes
    labels = [one.get_window_extent() for one in axes.texts]
    assert sorted(one.get_text() for one in axes.texts) == sorted(NAMES)
    for at, one in enumerate(labels):
        assert not any(one.overlaps(other) for other in labels[at + 1 :])
        for name, (x, y) in NAMES.items():
            mark = axes.transData.transform((x, y))
            assert not one.contains(*mark), (axes.texts[at].get_text(), name)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture_is_written(tmp_path, suffix):
    file = tmp_path / f"p{suffix}"
    picture.save(report(), file)
    if suffix == ".png":
        assert Image.open(file).size == (1200, 825)
    else:
        assert b"</svg>" in file.read_bytes()


def test_a_picture_without_points_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match="one engine at least"):
        picture.save(report(rows=[]), tmp_path / "p.png")
    with pytest.raises(InputError, match=r"\.png or \.svg; got \.pdf"):
        picture.save(report(), tmp_path / "p.pdf")
    assert list(tmp_path.iterdir()) == []


def test_engines_are_chosen_by_patterns():
    ready, missing = own_engines("m", plans={"mine": None}, kv_caches=("none", "int8"))
    names = [one.name for one in ready]
    assert names[-3:] == ["autoq-mine-stock", "autoq-mine", "autoq-mine-kv-int8"]
    assert [one.name for one in missing] == [
        "torchao-int8",
        "torchao-int8-attention",
        "torchao-int4",
        "torchao-int4-attention",
    ]
    kept, absent = chosen(ready, missing, ["autoq-*", "torchao-int4"])
    assert [one.name for one in kept] == names[-3:]
    assert [one.name for one in absent] == ["torchao-int4"]
    with pytest.raises(InputError, match="got llama"):
        chosen(ready, missing, ["llama*"])
    with pytest.raises(InputError, match="distinct names; got autoq-mine"):
        chosen([*ready, Engine(name="autoq-mine", plan="")], [], [])


def test_without_the_side_environment_every_peer_is_missing(tmp_path):
    file = tmp_path / "model-Q4_1.gguf"
    file.write_bytes(b"GGUF")
    room = {"source": tmp_path / "hf", "work": tmp_path, "tokens": 600, "batch": 1}
    ready, missing = peer_engines(peers=tmp_path / "none", gguf=file, **room)
    assert ready == []
    assert {one.name for one in missing} == {
        *(f"llamacpp-{kind}" for kind in LLAMACPP_TYPES),
        "openvino-int8",
        "openvino-int4",
    }
    assert {one.reason for one in missing} == {f"no {tmp_path}/none/bin/python: make peers"}


def test_peers_read_the_files_that_are_there_and_make_the_others(tmp_path):
    (tmp_path / "peers" / "bin").mkdir(parents=True)
    (tmp_path / "peers" / "bin" / "python").touch()
    file, more = tmp_path / "model-Q4_1.gguf", tmp_path / "model.imatrix.gguf"
    file.write_bytes(b"GGUF")
    room = {"source": tmp_path / "hf", "work": tmp_path / "w", "tokens": 600, "batch": 8}
    folders = {"mine": tmp_path / "ir"}
    ready, missing = peer_engines(peers=tmp_path / "peers", gguf=file, others=[more], folders=folders, **room)
    assert missing == []
    found = {one.name: one for one in ready}
    assert found["llamacpp-Q4_1"].load == {"file": str(file), "context": 600, "batch": 8}
    assert found["llamacpp-Q4_1"].convert is None
    assert found["llamacpp-model.imatrix"].load["file"] == str(more)
    assert found["llamacpp-Q8_0"].convert["source"] == str(file)
    assert found["llamacpp-Q8_0"].convert["target"] == found["llamacpp-Q8_0"].load["file"]
    assert found["openvino-int4"].convert == {
        "source": str(tmp_path / "hf"),
        "target": found["openvino-int4"].load["folder"],
        "bits": 4,
    }
    assert found["openvino-mine"].convert is None
    ready, missing = peer_engines(peers=tmp_path / "peers", gguf=None, **room)
    assert [one.name for one in missing] == [f"llamacpp-{kind}" for kind in LLAMACPP_TYPES]
    assert [one.name for one in ready] == ["openvino-int8", "openvino-int4"]


def test_a_plan_that_cannot_be_read_is_refused():
    with pytest.raises(AutoqError):
        check_plans({"no-such-scheme": ""})
    with pytest.raises(AutoqError):
        check_plans({"mine": "/nowhere/plan.json"})
