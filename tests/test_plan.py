import json

import pytest

from autoq.errors import CandidateError, PlanError
from autoq.plan import Plan, plain_name
from autoq.scheme import Scheme

# A file as schema 1 wrote it; it must stay readable.
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


def test_plan_of_schema_1_reads_and_writes_back_the_same(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(SCHEMA_1)
    plan = Plan.load(path)
    assert plan.layers["model.layers.0.mlp.up_proj"] == Scheme.parse("int4wo-hqq(group_size=64)")
    assert plan.units == {"mlp": ("model.layers.0.mlp.up_proj",)}
    assert plan.phases == {"prefill": 1.0, "decode": 128.0}
    plan.save(path)
    assert json.loads(path.read_text()) == json.loads(SCHEMA_1)


def test_hash_names_the_assignment_only():
    one = Plan(layers={"a": "int8wo", "b": "none"}, provenance={"seed": 1})
    two = Plan(layers={"b": "none", "a": "int8wo"}, provenance={"seed": 2})
    assert one.hash == two.hash
    assert one.hash != one.replace({"b": "int8wo"}).hash


def test_replace_drops_measured_figures_and_keeps_the_rest():
    plan = Plan(layers={"a": "none"}, provenance={"seed": 3, "measured": {"loss_delta": 1.0}})
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


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("_orig_mod.fc", "fc"),
        ("module.fc", "fc"),
        ("module._orig_mod.a.b", "a.b"),
        ("a._orig_mod.b", "a.b"),
        ("a.submodule.b", "a.submodule.b"),
    ],
)
def test_wrapper_prefixes_are_not_part_of_a_name(name, plain):
    assert plain_name(name) == plain


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p | {"schema": 2}, "schema 2"),
        (lambda p: p | {"schema": "1"}, r"\$\.schema"),
        (lambda p: p | {"surprise": 1}, r"\$\.surprise"),
        (lambda p: p | {"layers": []}, r"\$\.layers"),
        (lambda p: p | {"layers": {"fc": "int8wo"}}, r'\$\.layers\["fc"\]'),
        (lambda p: p | {"layers": {"fc": {"group_size": 64}}}, r'\$\.layers\["fc"\]'),
        (lambda p: p | {"layers": {"fc": {"scheme": "int8wo", "x": [1]}}}, r'\$\.layers\["fc"\]'),
        (lambda p: p | {"units": {"u": ["not there"]}}, r'\$\.units\["u"\] is a list of layers of the plan; got not'),
        (lambda p: p | {"units": {"u": "lm_head"}}, r'\$\.units\["u"\] is a list'),
        (lambda p: p | {"units": {"u": [["lm_head"]]}}, r'\$\.units\["u"\] is a list'),
        (lambda p: p | {"units": {"u": list(p["layers"])}}, r'\$\.units\["u"\]: its layers have one.*int4wo.*, none'),
        (lambda p: p | {"units": {"a": ["lm_head"], "u": ["lm_head"]}}, r'\$\.units\["u"\]: a layer is in one unit'),
        (lambda p: p | {"phases": {"decode": 0}}, r'\$\.phases\["decode"\]'),
        (lambda p: p | {"provenance": []}, r"\$\.provenance"),
    ],
)
def test_a_wrong_plan_is_refused_with_its_path(tmp_path, change, says):
    path = tmp_path / "plan.json"
    value = json.loads(SCHEMA_1) | {"units": {}}
    path.write_text(json.dumps(change(value)))
    with pytest.raises(PlanError, match=says) as problem:
        Plan.load(path)
    assert str(path) in str(problem.value)


@pytest.mark.parametrize("length", [0, 1, 40, len(SCHEMA_1) // 2, len(SCHEMA_1) - 1])
def test_a_cut_plan_is_refused(tmp_path, length):
    path = tmp_path / "plan.json"
    path.write_text(SCHEMA_1[:length])
    with pytest.raises(PlanError, match="complete JSON"):
        Plan.load(path)


def test_a_missing_a_binary_a_doubled_and_a_deep_plan_are_refused(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="readable"):
        Plan.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError):
        Plan.load(path)
    path.write_text('{"schema": 1, "layers": {"a": {"scheme": "none"}, "a": {"scheme": "int8wo"}}}')
    with pytest.raises(PlanError, match="once"):
        Plan.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(PlanError):
        Plan.load(path)


def test_saving_where_a_file_stands_in_the_way_keeps_the_old_file(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    with pytest.raises(PlanError, match="writable"):
        Plan(layers={"a": "none"}).save(blocked / "plan.json")
    assert blocked.read_text() == "kept"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
