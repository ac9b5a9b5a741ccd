"""Readers under random input: success or an AutoqError, whatever comes. The long mode is `make fuzz-files`."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq import _files, candidates
from autoq.errors import AutoqError, CandidateError, InputError, PlanError
from autoq.plan import Plan
from autoq.scheme import Scheme
from autoq.workload import Workload

CASES = 80  # of each reader

NUMBERS = st.integers() | st.floats() | st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**30])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)
SCHEME = st.fixed_dictionaries(
    {"scheme": st.sampled_from(["int8wo", "int4wo-hqq", "sinq", "fp6", "none", "fp6 ", ""]) | VALUES},
    optional={"group_size": NUMBERS | VALUES, "bits": VALUES, "format": VALUES, "m_switch": VALUES},
)
PLAN = st.fixed_dictionaries(
    {"schema": st.sampled_from([1, 2]) | VALUES, "layers": st.dictionaries(st.text(max_size=5), SCHEME) | VALUES},
    optional={
        "units": st.dictionaries(st.text(max_size=3), st.lists(st.text(max_size=5))) | VALUES,
        "phases": VALUES,
        "kernels": VALUES,
        "model": VALUES,
        "provenance": VALUES | st.dictionaries(st.sampled_from(["seed", "model", "device", "measured"]), VALUES),
        "hash": VALUES,
    },
)
LAYER = {"name": "a", "k": 4, "n": 4, "dtype": "float32", "device": "cpu", "bias": False}
CALL = {"layer": "a", "phase": "p", "m": 1, "dtype": "float32", "count": 1}


def changed(row):
    """The row with some of its values replaced, dropped or added."""
    return st.dictionaries(st.sampled_from([*row, "aliases", "tied_to", "x"]), VALUES, max_size=2).map(
        lambda other: row | other
    )


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_json_is_read_as_python_does_or_refused(data):
    try:
        found = _files.parse_json(data, PlanError, what="a note", where="here")
    except PlanError:
        return
    assert found == json.loads(data)
    again = json.dumps(found, allow_nan=False).encode()
    assert _files.parse_json(again, PlanError, what="a note", where="here") == found


@settings(max_examples=300, deadline=None)
@given(PLAN | VALUES)
def test_a_plan_of_any_values_is_read_or_refused(value):
    try:
        plan = Plan.from_json(value, where="plan.json")
    except (PlanError, CandidateError):
        return
    assert Plan.from_json(plan.to_json()).layers == plan.layers


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "schema": st.just(1) | VALUES,
            "layers": st.lists(changed(LAYER), max_size=2) | VALUES,
            "calls": st.lists(changed(CALL), max_size=2) | VALUES,
            "phases": st.lists(changed({"name": "p", "calls": 1.0}), max_size=2) | VALUES,
        },
        optional={"siblings": VALUES | st.lists(st.lists(st.sampled_from(["a", "b"]))), "x": VALUES},
    )
    | VALUES
)
def test_a_workload_of_any_values_is_read_or_refused(value):
    try:
        workload = Workload.from_json(value, where="workload.json")
    except InputError:
        return
    assert Workload.from_json(workload.to_json()) == workload


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30) | SCHEME | st.from_regex(r"\A[a-z0-9-]{3,10}\([a-z_]+=[a-z0-9.]+\)\Z"))
def test_a_scheme_of_any_text_is_read_or_refused(value):
    try:
        scheme = Scheme.of(value)
        candidates.parse(scheme)
    except AutoqError:
        return
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"schema": 2}, "$.schema is 1"),
        ({"schema": True}, "$.schema is 1"),
        ({"more": 1}, "$ has exactly the fields autoq writes"),
        ({"layers": {}}, "$.layers is a list"),
        ({"layers": [7]}, "$.layers[0] is an object of name, k, n, dtype, device, bias, aliases, tied_to, reason"),
        ({"layers": [LAYER | {"x": 1}]}, None),
        ({"layers": [LAYER | {"k": "4"}]}, "$.layers[0].k is an integer"),
        ({"layers": [LAYER | {"k": True}]}, "$.layers[0].k is an integer"),
        ({"layers": [LAYER | {"k": 0}]}, "$.layers[0]: a layer has at least one input and one output"),
        ({"layers": [LAYER | {"aliases": "ab"}]}, "$.layers[0].aliases is a list of strings"),
        ({"layers": [LAYER | {"aliases": [1]}]}, "$.layers[0].aliases is a list of strings"),
        ({"layers": [LAYER | {"reason": 1}]}, "$.layers[0].reason is a string or null"),
        ({"calls": [CALL | {"count": 1.0}]}, "$.calls[0].count is an integer"),
        ({"calls": [{"layer": "a"}]}, "$.calls[0].phase is a string"),
        ({"phases": [{"name": "p", "calls": "1"}]}, "$.phases[0].calls is a number"),
        ({"phases": [{"name": "p", "calls": float("inf")}]}, None),
        ({"siblings": [["a", 1]]}, "$.siblings[0] is a list of strings"),
        ({"siblings": [["a"]]}, "siblings are groups of two known layers or more, a layer in one of them"),
    ],
)
def test_a_workload_says_where_it_is_wrong(change, rule):
    good = {"schema": 1, "layers": [LAYER], "calls": [CALL], "phases": [{"name": "p"}]}
    assert Workload.from_json(good).layers[0].k == 4
    with pytest.raises(InputError) as caught:
        Workload.from_json(good | change, where="workload.json")
    assert caught.value.where == "workload.json"
    assert caught.value.fix == "Record it again with this version of autoq."
    assert rule is None or caught.value.rule == rule


@pytest.fixture(scope="module")
def fuzzed(report_of):
    return report_of(Path(__file__).with_name("fuzz_files.py"), "--cases", str(CASES))


def test_no_change_of_bytes_or_values_gives_anything_but_success_or_an_error_of_ours(fuzzed):
    assert fuzzed.pop("faults") == []
    assert len(fuzzed) == 12
    assert all(one["cases"] == CASES for one in fuzzed.values())


def test_most_changes_are_noticed(fuzzed):
    # Calibration times that are damaged are measured again, and checking a cache lists what is damaged.
    for name, one in fuzzed.items():
        if name not in ("faults", "calibration", "cache check"):
            assert one["outcomes"].get("read", 0) <= CASES // 2, name
