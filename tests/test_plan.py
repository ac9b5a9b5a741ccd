"""The plan file: what it says, what it refuses and where, and that nothing in it is believed once it was changed."""

import itertools
import json
import logging
import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autoq import candidates
from autoq.applying import apply
from autoq.errors import CandidateError, PlanError
from autoq.modules import find_linears
from autoq.plan import Plan, plain_name
from autoq.plan_text import content_hash, finite, plain, text_of
from autoq.scheme import FIELDS, Scheme

# Files as schema 1 wrote them, by hand and by tune; they must stay readable.
SCHEMA_1 = """{
 "schema": 1,
 "layers": {
  "model.layers.0.mlp.up_proj": {"scheme": "int4wo-hqq", "group_size": 64},
  "lm_head": {"scheme": "none"}
 },
 "units": {"mlp": ["model.layers.0.mlp.up_proj"]},
 "phases": {"prefill": 1.0, "decode": 128.0},
 "kernels": {},
 "model": {},
 "provenance": {"seed": 0}
}"""
SCHEMA_1_TUNED = """{
 "schema": 1,
 "layers": {"0": {"scheme": "int8wo"}, "2": {"scheme": "none"}},
 "units": {},
 "phases": {"forward": 0.125},
 "kernels": {
  "8ce9b447b10a6ff8": {
   "none M=8 K=256 N=512 float32": "stock", "int8wo M=8 K=256 N=512 float32": "avx2.int8.gemm.int16"
  }
 },
 "model": {},
 "provenance": {
  "autoq": "0.1.0", "created": "2026-11-22T04:33:28+00:00", "seed": 0,
  "request": {
   "max_degradation": 0.05, "max_increase": null, "objective": "latency", "max_latency_us": null,
   "max_weight_bytes": null, "ties": null
  },
  "budget": {
   "metric": "relative_rms", "unit": "relative", "text": "relative RMS of the outputs at most 5.00%", "baseline": 0.0,
   "max_increase": 0.05, "objective": "latency", "max_latency_us": null, "max_weight_bytes": null
  },
  "device": {
   "device": "cpu", "name": "AuthenticAMD family 25 model 1 stepping 1 AMD EPYC", "isa": "avx2 fma f16c",
   "caches": "L1 32K, L2 512K, L3 32768K", "cores": 2, "threads": 2, "system": "Linux x86_64",
   "torch": "2.13.0+cpu", "kernels": "8ce9b447b10a6ff8"
  },
  "versions": {"torch": "2.13.0+cpu", "optuna": "5.0.0"},
  "model": {"class": "Sequential", "weights": "ad7c49ca2eb361f7", "shapes": "b5755df80f2f1ff1"},
  "notes": ["A note."],
  "study": "autoq-524259e0229e",
  "measured": {
   "loss_delta": 0.01, "loss_low": 0.009, "loss_high": 0.011, "samples": 64, "baseline_loss": 0.0,
   "latency_us": 30000.5, "baseline_latency_us": 54433.856875, "none_latency_us": 54000.0,
   "phases": {
    "forward": {
     "time_us": 240004.0, "low_us": 230305.5338, "high_us": 252241.25659999996, "baseline_us": 435470.855,
     "baseline_low_us": 430305.5338, "baseline_high_us": 452241.25659999996, "none_us": 432000.0, "calls": 0.125,
     "compiled": "whole", "loss_delta": 0.01, "loss_low": 0.009, "loss_high": 0.011
    }
   },
   "weight_bytes": 357664, "baseline_weight_bytes": 657664
  },
  "predicted": {
   "loss_delta": 0.009, "latency_us": 29295.9, "phases": {"forward": 234367.2}, "latency_error": {"forward": 0.02}
  },
  "certificate": {"value": 29295.9, "bound": 29290.0, "gap": 0.0002, "loss_error": 0.1}
 }
}"""
# The same by hand as schema 2 writes it, byte by byte.
SCHEMA_2 = """{
 "hash": "de1358fc883ee6d38cd066c18d8d971fdd3dc87bc1d5a3d2e4a06b90c7fb29d4",
 "kernels": {},
 "layers": {
  "lm_head": {"scheme": "none"},
  "model.layers.0.mlp.up_proj": {"group_size": 64, "scheme": "int4wo-hqq"}
 },
 "model": {},
 "phases": {"decode": 128, "prefill": 1},
 "provenance": {
  "measured": {"latency_us": 12345.678, "loss_delta": 1e-05},
  "model": {
   "layers": {
    "lm_head": {"dtype": "bfloat16", "k": 576, "n": 49152},
    "model.layers.0.mlp.up_proj": {"dtype": "bfloat16", "k": 576, "n": 1536}
   }
  },
  "seed": 0
 },
 "schema": 2,
 "units": {
  "mlp": ["model.layers.0.mlp.up_proj"]
 }
}
"""
HQQ = Scheme.parse("int4wo-hqq(group_size=64)")


def loaded(tmp_path, value):
    path = tmp_path / "plan.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return Plan.load(path)


# --- schemes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "fields"),
    [
        ("int8wo", "int8wo", {}),
        ("sinq(bits=4,group_size=64)", "sinq", {"bits": 4, "group_size": 64}),
        ("fp6( format=e2m3 )", "fp6", {"format": "e2m3"}),
    ],
)
def test_scheme_text_round_trips(text, name, fields):
    scheme = Scheme.parse(text)
    assert (scheme.name, dict(scheme.fields)) == (name, fields)
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.of(scheme.to_json()) == scheme


def test_scheme_fields_have_one_order():
    assert str(Scheme.parse("sinq(group_size=64,bits=4)")) == "sinq(bits=4,group_size=64)"


@pytest.mark.parametrize("text", ["", "Int8", "int8wo(", "int8wo(4)", "a b", "int8wo(x=1))"])
def test_scheme_text_that_is_not_one_is_refused(text):
    with pytest.raises(CandidateError):
        Scheme.parse(text)


def test_the_fields_that_plans_are_checked_by_are_those_of_the_candidates():
    kinds = {type(one).key: type(one) for one in candidates.ALL}
    assert set(FIELDS) == set(kinds)
    for name, known in FIELDS.items():
        assert set(known) == {one.name for one in fields(kinds[name])}
        for values in itertools.product(*known.values()):
            scheme = {"scheme": name, **dict(zip(known, values, strict=True))}
            assert candidates.parse(scheme).scheme.to_json() == scheme
        for field in known:
            with pytest.raises(CandidateError):
                candidates.parse({"scheme": name, field: 7})


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_plan_of_schema_1_reads_and_is_written_as_schema_2(tmp_path):
    plan = loaded(tmp_path, SCHEMA_1)
    assert plan.layers["model.layers.0.mlp.up_proj"] == HQQ
    assert plan.units == {"mlp": ("model.layers.0.mlp.up_proj",)}
    assert plan.phases == {"prefill": 1.0, "decode": 128.0}
    assert plan.provenance == {"seed": 0, "schema_1": {}}
    plan.save(tmp_path / "new.json")
    again = Plan.load(tmp_path / "new.json")
    assert again == plan
    assert json.loads((tmp_path / "new.json").read_text())["schema"] == 2


def test_a_tuned_plan_of_schema_1_keeps_all_it_says(tmp_path):
    plan = loaded(tmp_path, SCHEMA_1_TUNED)
    old = json.loads(SCHEMA_1_TUNED)
    assert plan.provenance == old["provenance"] | {"schema_1": {}}
    assert plan.kernels == old["kernels"]
    plan.save(tmp_path / "new.json")
    assert Plan.load(tmp_path / "new.json") == plan


def test_what_schema_1_let_stand_in_the_provenance_is_kept_aside(tmp_path):
    plan = loaded(tmp_path, json.loads(SCHEMA_1) | {"provenance": {"seed": 1, "author": {"name": "me"}}})
    assert plan.provenance == {"seed": 1, "schema_1": {"author": {"name": "me"}}}


@pytest.mark.parametrize(
    "provenance",
    [
        {"comment": 3},
        {"notes": "text"},
        {"seed": "x"},
        {"measured": {"x": 1}},
        {"model": {"foo": 1}},
        {"model": {"class": "Toy", "layers": {"other": {"n": 1, "k": 1}}}},
        {"versions": {"torch": None}},
        {"device": {"a": {"b": 1}}},
        {"schema_1": {"mine": 1}},
    ],
)
def test_what_schema_1_let_have_another_form_is_kept_aside(tmp_path, provenance):
    plan = loaded(tmp_path, json.loads(SCHEMA_1) | {"provenance": {"autoq": "0.1.0"} | provenance})
    assert plan.provenance == {"autoq": "0.1.0", "schema_1": provenance}
    plan.save(tmp_path / "new.json")
    assert Plan.load(tmp_path / "new.json") == plan


def test_what_schema_1_let_stand_in_the_kernels_is_kept_aside(tmp_path):
    plan = loaded(tmp_path, {"schema": 1, "layers": {"fc": {"scheme": "int8wo"}}, "kernels": {"x": {"y": 1}}})
    assert plan.kernels == {}
    assert plan.provenance == {"schema_1": {"$.kernels": {"x": {"y": 1}}}}


def test_schema_2_is_written_byte_by_byte(tmp_path):
    path = tmp_path / "plan.json"
    plan = loaded(tmp_path, SCHEMA_2)
    assert "edited" not in plan.provenance
    for _ in range(2):
        plan.save(path)
        assert path.read_text() == SCHEMA_2
        plan = Plan.load(path)
    assert plan.phases == {"decode": 128.0, "prefill": 1.0}
    assert all(isinstance(calls, float) for calls in plan.phases.values())


def test_the_order_in_which_a_plan_was_made_does_not_show(tmp_path):
    one = Plan(layers={"a": "int8wo", "b": "none"}, phases={"x": 1, "y": 2.5}, provenance={"seed": 1, "autoq": "0"})
    two = Plan(layers={"b": "none", "a": "int8wo"}, phases={"y": 2.5, "x": 1.0}, provenance={"autoq": "0", "seed": 1.0})
    one.save(tmp_path / "one.json")
    two.save(tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: json.dumps(json.loads(text)),
        lambda text: json.dumps(dict(reversed(json.loads(text).items())), indent=4),
        lambda text: text.replace('"decode": 128', '"decode": 128.0').replace("1e-05", "0.00001"),
        lambda text: text.replace("\n", "\r\n"),
    ],
)
def test_a_file_that_was_only_formatted_anew_is_not_edited(tmp_path, rewrite):
    assert rewrite(SCHEMA_2) != SCHEMA_2
    assert loaded(tmp_path, rewrite(SCHEMA_2)) == loaded(tmp_path, SCHEMA_2)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"group_size": 64', '"group_size": 128'),
        lambda text: text.replace("12345.678", "1"),
        lambda text: text.replace('"seed": 0', '"seed": 1'),
        lambda text: text.replace('"hash": "', '"hash": "0'),
        lambda text: "\n".join(line for line in text.splitlines() if "hash" not in line),
    ],
)
def test_an_edited_file_loses_its_figures_and_says_so(tmp_path, caplog, edit):
    assert edit(SCHEMA_2) != SCHEMA_2
    with caplog.at_level(logging.WARNING, logger="autoq"):
        plan = loaded(tmp_path, edit(SCHEMA_2))
    assert plan.provenance["edited"] is True
    assert "measured" not in plan.provenance
    assert plan.provenance["model"]["layers"]["lm_head"]["n"] == 49152
    assert "plan.json was edited after autoq wrote it" in caplog.text
    plan.save(tmp_path / "again.json")
    assert Plan.load(tmp_path / "again.json") == plan


def test_a_plan_written_by_hand_needs_neither_hash_nor_provenance(tmp_path, caplog):
    plan = loaded(tmp_path, {"schema": 2, "layers": {"fc": {"scheme": "int8wo"}}})
    assert plan == Plan(layers={"fc": "int8wo"})
    assert caplog.text == ""


def test_an_edited_file_without_provenance_says_so(tmp_path, caplog):
    Plan(layers={"fc": "int8wo"}).save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    with caplog.at_level(logging.WARNING, logger="autoq"):
        plan = loaded(tmp_path, text.replace("int8wo", "int8dq"))
    assert plan == Plan(layers={"fc": "int8dq"}, provenance={"edited": True})
    assert "plan.json was edited after autoq wrote it" in caplog.text
    assert loaded(tmp_path, text) == Plan(layers={"fc": "int8wo"})


def test_the_hash_of_the_assignment_does_not_depend_on_the_provenance():
    one = Plan(layers={"a": "int8wo", "b": "none"}, provenance={"seed": 1})
    two = Plan(layers={"b": "none", "a": "int8wo"}, provenance={"seed": 2})
    assert one.hash == two.hash
    assert one.hash != one.replace({"b": "int8wo"}).hash
    assert one.to_json()["hash"] != two.to_json()["hash"]


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]))
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**64 - 1)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner) | st.dictionaries(WORDS, inner),
    max_leaves=20,
)


@given(VALUES)
def test_the_text_of_any_value_reads_back_the_same(value):
    value = plain({"value": value})
    text = text_of(value)
    assert plain(json.loads(text)) == value
    assert text_of(plain(json.loads(text))) == text
    assert content_hash(plain(json.loads(text))) == content_hash(value)


def test_numbers_have_one_form():
    assert text_of(plain([1.0, -0.0, 2.0**53, 0.1, 1e-7, True, 3])) == "[1, 0, 9007199254740992.0, 0.1, 1e-07, true, 3]"


def test_figures_that_are_no_numbers_become_null():
    assert finite({"a": [math.inf, 1.5], "b": (math.nan,), "c": "inf"}) == {"a": [None, 1.5], "b": [None], "c": "inf"}


# --- values ----------------------------------------------------------------------------------------------------------


def test_replace_drops_what_held_before_and_keeps_the_rest():
    figures = {"measured": {"loss_delta": 1.0}, "predicted": {}, "certificate": None, "retargeted": True}
    plan = Plan(layers={"a": "none"}, provenance={"seed": 3, **figures})
    changed = plan.replace({"a": "int8dq"})
    assert str(changed.layers["a"]) == "int8dq"
    assert changed.provenance == {"seed": 3, "edited": True}
    with pytest.raises(PlanError, match="nowhere"):
        plan.replace({"nowhere": "int8wo"})


def test_units_have_plain_names_and_one_scheme_each():
    layers = {"module.a.q": "int8wo", "a.k": "int8wo", "a.v": "none"}
    plan = Plan(layers=layers, units={"a.q+k": ["_orig_mod.a.q", "a.k"], "empty": []})
    assert plan.units == {"a.q+k": ("a.q", "a.k"), "empty": ()}
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.hash == Plan(layers=layers).hash
    with pytest.raises(PlanError, match=r"one scheme; got int8wo, none\. Give them the same scheme"):
        Plan(layers=layers, units={"u": ["a.q", "a.v"]})


def test_replace_keeps_units_that_change_as_a_whole():
    units = {"q+k": ("q", "k"), "g+u": ("g", "u")}
    plan = Plan(layers=dict.fromkeys("qkgu", "int8wo"), units=units)
    assert plan.replace({"q": "none", "k": "none"}).units == units
    assert plan.replace({"q": "none"}).units == {"g+u": ("g", "u")}


def test_a_plan_is_a_copy_of_what_it_was_made_from():
    provenance = {"notes": ["one"]}
    plan = Plan(layers={"a": "none"}, provenance=provenance)
    provenance["notes"].append("two")
    assert plan.provenance == {"notes": ["one"]}


@pytest.mark.parametrize(
    ("section", "value", "says"),
    [
        ("phases", {"decode": math.nan}, r"\$\.phases\.decode is a finite number of at most 64 bits; got nan"),
        ("provenance", {"seed": 10**400}, r"\$\.provenance\.seed is a finite number of at most 64 bits"),
        ("provenance", {"notes": [{1: "x"}]}, r"\$\.provenance\.notes\[0\] has printable text as its keys; got 1"),
        ("units", {"a\x1b[2J": []}, r"\$\.units has printable text as its keys; got 'a\\x1b\[2J'"),
        (
            "provenance",
            {"comment": "\x9b2J"},
            r"\$\.provenance\.comment is text without control characters; got '\\x9b",
        ),
        ("model", {"kv": object()}, r"\$\.model\.kv is a JSON value; got <object"),
        ("model", {"kv": "\ud800"}, r"\$\.model\.kv is text without control characters"),
        ("provenance", {"author": "me"}, r"\$\.provenance\.author is not known there\. Known are autoq, created"),
    ],
)
def test_a_plan_is_never_made_of_what_its_file_could_not_hold(section, value, says):
    with pytest.raises(PlanError, match=says):
        Plan(layers={"a": "none"}, **{section: value})


def test_a_plan_with_an_unknown_scheme_is_not_saved(tmp_path):
    with pytest.raises(PlanError, match=r'\$\.layers\["a"\]\.scheme is one of none, int8wo, .*; got \'int2\''):
        Plan(layers={"a": "int2"}).save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


# --- refusals --------------------------------------------------------------------------------------------------------


def at(path, value):
    """A change of the plan that puts a value at a path, such as provenance.model.class."""

    def change(plan):
        *parents, last = path.split("/")
        place = plan
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
        return plan

    return change


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (at("schema", 3), "reads plans up to schema 2; got schema 3. Upgrade autoq"),
        (at("schema", "1"), r"\$\.schema is a positive integer; got '1'"),
        (at("schema", True), r"\$\.schema is a positive integer"),
        (at("schema", 0), r"\$\.schema is a positive integer"),
        (at("hash", 5), r"\$\.hash is text; got 5"),
        (at("surprise", 1), r"\$\.surprise is not a section of a plan\. They are layers, units"),
        (at("a b", 1), r'\$\["a b"\] is not a section'),
        (lambda p: {k: v for k, v in p.items() if k != "layers"}, r"\$\.layers is an object of layer name to scheme"),
        (at("layers", []), r"\$\.layers is an object of layer name to scheme; got \[\]"),
        (at("layers/lm_head", "int8wo"), r'\$\.layers\["lm_head"\] is an object such as .*; got \'int8wo\''),
        (at("layers/lm_head", {"group_size": 64}), r'\$\.layers\["lm_head"\]\.scheme is one of none, .*; got None'),
        (at("layers/lm_head", {"scheme": "int2"}), r"\.scheme is one of none, int8wo, .*; got 'int2'"),
        (at("layers/lm_head", {"scheme": ["none"]}), r"\.scheme is one of none"),
        (at("layers/lm_head", {"scheme": "int8wo", "x": [1]}), r'\["lm_head"\]\.x is no field of int8wo\. It has none'),
        (at("layers/lm_head", {"scheme": "fp6", "bits": 6}), r"\.bits is no field of fp6\. Its fields are format\."),
        (at(f"layers/{UP}/group_size", 48), r'_proj"\]\.group_size is one of 32, 64, 128; got 48'),
        (at(f"layers/{UP}/group_size", "64"), r"\.group_size is one of 32, 64, 128; got '64'"),
        (at(f"layers/{UP}/group_size", True), r"\.group_size is one of 32, 64, 128; got True"),
        (at(f"layers/{UP}/group_size", None), r"\.group_size is one of 32, 64, 128; got None"),
        (at("layers/module.lm_head", {"scheme": "none"}), r'"module\.lm_head"\]: a plan names each layer once; got'),
        (at("units/u", ["not there"]), r'\$\.units\["u"\] is a list of layers of the plan; got not there'),
        (at("units/u", "lm_head"), r'\$\.units\["u"\] is a list of layers of the plan; got \'lm_head\''),
        (at("units/u", [["lm_head"]]), r'\$\.units\["u"\]\[0\] is text; got \[\'lm_head\'\]'),
        (at("units/u", ["lm_head", UP]), r'\$\.units\["u"\]: its layers have one.*int4wo.*, none'),
        (at("units", {"a": ["lm_head"], "u": ["lm_head"]}), r'\$\.units\["u"\]: a layer is in one unit'),
        (at("phases/decode", 0), r'\$\.phases\["decode"\] is a positive number of calls; got 0'),
        (at("phases/decode", True), r'\$\.phases\["decode"\] is a positive number of calls; got True'),
        (at("phases/decode", {}), r'\$\.phases\["decode"\] is a positive number of calls; got {}'),
        (at("phases", [1]), r"\$\.phases is an object; got \[1\]"),
        (at("kernels/cpu", "avx2"), r'\$\.kernels\["cpu"\] is an object'),
        (at("kernels/cpu", {"M=1": 5}), r'\$\.kernels\["cpu"\]\["M=1"\] is text; got 5'),
        (at("model", []), r"\$\.model is an object"),
        (at("provenance", []), r"\$\.provenance is an object"),
        (at("provenance/author", "me"), r"\$\.provenance\.author is not known there"),
        (at("provenance/seed", 0.5), r"\$\.provenance\.seed is a whole number; got 0\.5"),
        (at("provenance/edited", 1), r"\$\.provenance\.edited is true or false; got 1"),
        (at("provenance/notes", "x"), r"\$\.provenance\.notes is a list; got 'x'"),
        (at("provenance/notes", ["x", 1]), r"\$\.provenance\.notes\[1\] is text; got 1"),
        (at("provenance/versions/torch", 2), r'\$\.provenance\.versions\["torch"\] is text; got 2'),
        (at("provenance/device/cores", [2]), r'\$\.provenance\.device\["cores"\] is text or a number; got \[2\]'),
        (at("provenance/budget/max", 1), r"\$\.provenance\.budget\.max is not known there"),
        (at("provenance/request/ties", "siblings"), r"\$\.provenance\.request\.ties is a list"),
        (at("provenance/measured/samples", -1), r"\$\.provenance\.measured\.samples is a whole number, not negative"),
        (at("provenance/measured/loss_delta", "0"), r"\$\.provenance\.measured\.loss_delta is a number; got '0'"),
        (
            at("provenance/measured/phases/decode/time_us", "fast"),
            r'\$\.provenance\.measured\.phases\["decode"\]\.time_us is a number; got \'fast\'',
        ),
        (at("provenance/measured/phases/decode/speed", 1), r'\.phases\["decode"\]\.speed is not known there'),
        (at("provenance/predicted/latency_error/decode", "x"), r'\.latency_error\["decode"\] is a number'),
        (at("provenance/certificate", 1), r"\$\.provenance\.certificate is an object"),
        (at("provenance/model/layers/lm_head", [1, 2]), r'\$\.provenance\.model\.layers\["lm_head"\] is an object'),
        (at("provenance/model/layers/lm_head", {"n": 1}), r'\["lm_head"\] has n, k; got \[\'n\'\]'),
        (at("provenance/model/layers/lm_head/n", 0), r'\["lm_head"\]\.n is a positive whole number; got 0'),
        (
            at("layers/other", {"scheme": "none"}),
            r'\$\.layers\["other"\] is a layer of \$\.provenance\.model\.layers; got 1 that are not: other',
        ),
        (
            lambda p: p | {"layers": {UP: p["layers"][UP]}},
            r"\$\.layers has all layers of \$\.provenance\.model\.layers; got 1 missing: lm_head\. A layer that is to",
        ),
    ],
)
def test_a_wrong_plan_is_refused_with_its_path(tmp_path, change, says):
    value = change(json.loads(SCHEMA_2) | {"units": {}})
    with pytest.raises(PlanError, match=says) as problem:
        loaded(tmp_path, value)
    assert str(problem.value).startswith(f"{tmp_path / 'plan.json'}: ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"schema": 2, "layers": {"a": {"scheme": "none"}, "a": {"scheme": "int8wo"}}}', "once in an object; got 'a'"),
        ('{"schema": 2, "layers": {}, "phases": {"x": NaN}}', r"\$\.phases\.x is a finite number; got nan"),
        ('{"schema": 2, "layers": {}, "phases": {"x": 1e999}}', r"\$\.phases\.x is a finite number; got inf"),
        ('{"schema": 2, "layers": {}, "model": ' + "[" * 70 + "]" * 70 + "}", "nested at most"),
        ("[" * 100_000, "nested"),
        ("[]", "a plan is a JSON object; got list"),
        ("", "one complete JSON value"),
        (SCHEMA_2[: len(SCHEMA_2) // 2], "one complete JSON value"),
        (SCHEMA_2[:-3], "one complete JSON value"),
        (SCHEMA_2 + "{}", "one complete JSON value"),
    ],
)
def test_text_that_is_no_plan_is_refused(tmp_path, text, says):
    with pytest.raises(PlanError, match=says) as problem:
        loaded(tmp_path, text)
    assert "plan.json: " in str(problem.value)


def test_a_missing_and_a_binary_file_are_refused(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="a plan file must be readable; got FileNotFoundError"):
        Plan.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="a plan file is UTF-8 text"):
        Plan.load(path)
    with pytest.raises(PlanError, match="a plan file is a regular file; got a folder"):
        Plan.load(tmp_path)


def test_saving_where_a_file_stands_in_the_way_keeps_the_old_file(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    with pytest.raises(PlanError, match="writable"):
        Plan(layers={"a": "none"}).save(blocked / "plan.json")
    assert blocked.read_text() == "kept"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("_orig_mod.fc", "fc"),
        ("module.fc", "fc"),
        ("module._orig_mod.a.b", "a.b"),
        ("a._orig_mod.b", "a.b"),
        ("a.submodule.b", "a.submodule.b"),
        ("base_model.model.model.layers.0.q_proj.base_layer", "model.layers.0.q_proj"),
        ("_orig_mod.base_model.model.lm_head", "lm_head"),
        ("base_model.model.q.base_layer.weight", "q.weight"),
        ("base_model.model.q.lora_A.default", "q.lora_A.default"),
        ("a.base_model.model.fc", "a.base_model.model.fc"),
        ("base_layer", "base_layer"),
        ("base_model.fc", "base_model.fc"),
        ("a.module.module.fc", "a.fc"),
        ("a._orig_mod.module._orig_mod._orig_mod.fc", "a.fc"),
        ("module.base_model.model.module.base_model.model.fc", "fc"),
        ("q.base_layer.base_layer", "q"),
    ],
)
def test_wrapper_prefixes_are_not_part_of_a_name(name, plain):
    assert plain_name(name) == plain


PARTS = st.sampled_from(["a", "module", "_orig_mod", "base_model", "model", "base_layer", "submodule", ""])


@given(st.lists(PARTS, max_size=8).map(".".join))
def test_a_plain_name_is_its_own(name):
    assert plain_name(plain_name(name)) == plain_name(name)


def test_a_layer_in_a_wrapper_in_a_wrapper_has_one_name_in_model_and_plan(tmp_path):
    model = nn.ModuleDict({"a": under("module.module", nn.ModuleDict({"fc": nn.Linear(64, 32)}))})
    (site,) = find_linears(model)
    known = {"n": 32, "k": 64, "dtype": "float32"}
    plan = Plan(layers={site.name: "int8wo"}, provenance={"model": {"layers": {site.name: known}}})
    plan.save(tmp_path / "plan.json")
    assert (site.name, list(plan.layers)) == ("a.fc", ["a.fc"])
    assert Plan.load(tmp_path / "plan.json") == plan
    assert list(apply(model, plan).applied) == ["a.fc"]


class Adapted(nn.Module):
    """A layer as PEFT replaces it."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})


def under(path, module):
    """A module with another at a dotted path in it."""
    for part in reversed(path.split(".")):
        module = nn.ModuleDict({part: module})
    return module


def blocks(adapt=lambda layer: layer):
    return nn.ModuleDict(
        {"0": nn.ModuleDict({"q": adapt(nn.Linear(4, 6)), "k": nn.Linear(4, 2)}), "head": nn.Linear(4, 8)}
    )


def plan_for(*names):
    shapes = ((6, 4), (2, 4), (8, 4))
    layers = {name: {"n": n, "k": k} for name, (n, k) in zip(names, shapes, strict=True)}
    schemes = dict(zip(names, ("int8wo", "int8wo", "none"), strict=True))
    return Plan(
        layers=schemes,
        units={"qk": names[:2]},
        provenance={"measured": {"loss_delta": 0.5}, "model": {"class": "Toy", "layers": layers}},
    )


PLAIN = plan_for("0.q", "0.k", "head")


@pytest.mark.parametrize(
    ("plan", "model", "names"),
    [
        (PLAIN, blocks(), ("0.q", "0.k", "head")),
        (PLAIN, under("_orig_mod.module", blocks()), ("0.q", "0.k", "head")),
        (PLAIN, under("base_model.model", blocks(Adapted)), ("0.q", "0.k", "head")),
        (PLAIN, under("model", blocks()), ("model.0.q", "model.0.k", "model.head")),
        (PLAIN, under("module.a.b", blocks()), ("a.b.0.q", "a.b.0.k", "a.b.head")),
        (plan_for("model.0.q", "model.0.k", "model.head"), blocks(), ("0.q", "0.k", "head")),
        (plan_for("a.b.0.q", "a.b.0.k", "a.b.head"), under("b", blocks()), ("b.0.q", "b.0.k", "b.head")),
        (
            plan_for("model.0.q", "model.0.k", "head"),  # the user's own base_model, beside whose model is a head
            under("base_model", nn.ModuleDict({"model": blocks(), "head": nn.Linear(4, 8)})),
            ("0.q", "0.k", "base_model.head"),
        ),
    ],
)
def test_rebase_finds_the_layers_under_one_prefix_more_or_less(plan, model, names):
    found = plan.rebase(model)
    assert found.layers == dict(zip(names, plan.layers.values(), strict=True))
    assert found.units == {"qk": names[:2]}  # a name that someone chose
    shapes = plan.provenance["model"]["layers"].values()
    assert found.provenance["model"] == {"class": "Toy", "layers": dict(zip(names, shapes, strict=True))}
    assert found.provenance["measured"] == {"loss_delta": 0.5}
    assert Plan.from_json(found.to_json()) == found


def test_rebase_renames_units_that_are_named_after_their_layers():
    twins = {"0.k+q": ("0.k", "0.q"), "0.q+k+": ("0.q", "0.k"), "attention": ("0.q", "0.k")}
    for unit, group in twins.items():
        plan = replace(PLAIN, units={unit: group})
        found = plan.rebase(under("model", blocks())).units
        assert list(found) == ["attention" if unit == "attention" else f"model.{unit}"]
        assert list(found.values()) == [tuple(f"model.{name}" for name in group)]
        (there,) = replace(plan_for("model.0.q", "model.0.k", "model.head"), units=found).rebase(blocks()).units
        assert there == unit


def test_rebase_of_the_same_names_is_the_same_plan():
    assert PLAIN.rebase(blocks()) == PLAIN
    assert Plan(layers={}).rebase(blocks()) == Plan(layers={})


@pytest.mark.parametrize(
    ("plan", "model", "says"),
    [
        (
            PLAIN,
            nn.ModuleDict({"encoder": blocks(), "decoder": blocks()}),
            r"one prefix; got several that fit: 0\.q may be decoder\.0\.q or encoder\.0\.q",
        ),
        (
            plan_for("0.q", "0.k", "out"),
            under("model", blocks()),
            r"one prefix more or less; got 1 of 3 that it lacks: out\. The plan is for another model",
        ),
        (plan_for("x", "y", "z"), blocks(), r"got 3 of 3 that it lacks: x, y, z"),
        (
            plan_for("0.k", "0.q", "head"),
            under("model", blocks()),
            r"got 2 others: 0\.k is \[2, 4\] in the model, \[6, 4\] in the plan; 0\.q is \[6, 4\]",
        ),
    ],
)
def test_rebase_refuses_what_is_ambiguous_incomplete_or_of_another_shape(plan, model, says):
    with pytest.raises(PlanError, match=says):
        plan.rebase(model)


def test_rebase_without_known_shapes_goes_by_names():
    plan = replace(plan_for("0.k", "0.q", "head"), provenance={})
    assert list(plan.rebase(under("model", blocks())).layers) == ["model.0.k", "model.0.q", "model.head"]


def test_a_unit_has_each_of_its_layers_once():
    with pytest.raises(PlanError, match=r'\$\.units\["u"\] is a list of layers, each once; got fc, fc'):
        Plan(layers={"fc": "int8wo"}, units={"u": ["fc", "fc"]})
