"""Studies' journals: a last line that was cut is dropped, and a file that is none is left alone."""

import json

import pytest

from autoq import studies
from autoq.errors import SearchError


@pytest.fixture
def journal(tmp_path):
    """A journal of three studies, the last line made last."""
    import optuna

    path = tmp_path / "study.journal"
    storage = studies.open_storage(path)
    with studies.quiet():
        for name in ("a", "b", "c"):
            optuna.create_study(storage=storage, study_name=name)
    return path


def names(path):
    import optuna

    return optuna.get_all_study_names(studies.open_storage(path))


def test_a_last_line_cut_anywhere_is_dropped_and_the_others_stay(journal):
    whole = journal.read_bytes()
    start = whole.rfind(b"\n", 0, -1) + 1
    for end in range(start + 1, len(whole)):
        journal.write_bytes(whole[:end])
        assert names(journal) == ["a", "b"]
        assert journal.read_bytes() == whole[:start]


def test_a_first_line_that_was_cut_leaves_an_empty_journal(journal):
    journal.write_bytes(journal.read_bytes()[:7])
    assert names(journal) == []
    assert journal.read_bytes() == b""


@pytest.mark.parametrize(
    "content",
    [b"my notes", b'{"a": 1}', b"\x80\x04\x95pickle", bytes(5000), b"a table\n1,2\n", b"{}}\n", b"a" * (1 << 27)],
)
def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(tmp_path, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(SearchError, match="the study's file must be a writable Optuna journal") as caught:
        studies.open_storage(path)
    assert caught.value.where == str(path)
    assert path.read_bytes() == content


def test_a_long_line_that_was_cut_is_found_from_the_end(journal):
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 2, "x": "'.replace(b": ", b":") + b"a" * (1 << 22))
    assert names(journal) == ["a", "b", "c"]
    assert journal.read_bytes() == whole


def test_a_definition_that_is_damaged_is_refused_by_the_study_s_name(journal):
    import optuna

    from autoq import definition

    storage = studies.open_storage(journal)
    study = optuna.load_study(study_name="a", storage=storage)
    study.set_user_attr("definition", {"part": "x", "chunks": 1})
    with pytest.raises(SearchError, match="a: a study's definition is complete"):
        definition.load(storage, "a")
    for text, rule in [
        ("[1", "a study's definition holds one complete JSON value"),
        ("[1]", "a study's definition has schema 1"),
        ('{"schema": 1, "schema": 1}', r"\$: a key appears once in an object"),
        (json.dumps({"schema": 1}), "a study's definition is as autoq wrote it"),
    ]:
        study.set_user_attr("definition:x:0", text)
        with pytest.raises(SearchError, match=rule) as caught:
            definition.load(storage, "a")
        assert caught.value.where == "a"
