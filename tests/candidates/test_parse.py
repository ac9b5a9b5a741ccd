import pytest

from autoq import candidates
from autoq.candidates import parse
from autoq.errors import CandidateError


@pytest.mark.parametrize("candidate", candidates.ALL, ids=str)
def test_every_form_reads_back(candidate):
    assert parse(str(candidate)) == candidate
    assert parse(candidate.scheme) == candidate
    assert parse(candidate.scheme.to_json()) == candidate


def test_display_shows_every_field():
    assert str(parse("sinq")) == "sinq(bits=4,group_size=64)"
    assert str(parse("int4wo-hqq")) == "int4wo-hqq(group_size=64)"
    assert str(parse("fp6")) == "fp6(format=e3m2)"
    assert str(parse("int4dq")) == "int4dq(group_size=64,method=hqq)"
    assert str(parse("int8mix")) == "int8mix(m_switch=32)"
    assert str(parse("int4mix")) == "int4mix(group_size=64,m_switch=32,method=hqq)"


def test_stored_forms_stay_readable():
    assert parse({"scheme": "sinq", "bits": 3}) == parse("sinq(bits=3,group_size=64)")
    assert parse({"scheme": "fp6", "format": "e2m3"}) == parse("fp6(format=e2m3)")
    stored = {"scheme": "int4mix", "method": "sinq", "m_switch": 8}
    assert parse(stored) == parse("int4mix(group_size=64,m_switch=8,method=sinq)")


def test_default_is_the_search_list():
    assert [str(c) for c in candidates.DEFAULT] == [
        "none",
        "int8wo",
        "int8dq",
        "int4wo-hqq(group_size=64)",
        "int4wo-hqq(group_size=128)",
        "sinq(bits=4,group_size=64)",
        "fp6(format=e3m2)",
        "fp6(format=e2m3)",
    ]
    assert set(candidates.DEFAULT) <= set(candidates.ALL)
    assert len({str(c) for c in candidates.ALL}) == len(candidates.ALL)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int5wo", "'int5wo'.*Choose from none, int8wo"),
        ("int8wo(bits=8)", "no fields; got 'bits'"),
        ("sinq(group=64)", "fields are group_size, bits.*got 'group'"),
        ("sinq(bits=4,bits=4)", "at most once"),
        ("sinq(bits=7)", "bits is one of 3, 4, 5, 6, 8; got 7"),
        ("int4wo-hqq(group_size=48)", "group_size is one of 32, 64, 128; got 48"),
        ("int4wo-hqq(group_size=64.0)", "got 64.0"),
        ("fp6(format=e4m1)", "format is one of e3m2, e2m3; got 'e4m1'"),
        ("int4dq(method=rtn)", "method is one of hqq, sinq; got 'rtn'"),
        ("int4dq(m_switch=8)", "fields are group_size, method.*got 'm_switch'"),
        ("int4mix(group_size=256)", "group_size is one of 32, 64, 128; got 256"),
        ("int4mix(m_switch=0)", "m_switch is one of 8, 16, 32, 64, 128; got 0"),
        ("int8mix(m_switch=48)", "m_switch is one of 8, 16, 32, 64, 128; got 48"),
    ],
)
def test_unknown_names_fields_and_values_are_refused(text, said):
    with pytest.raises(CandidateError, match=said):
        parse(text)
