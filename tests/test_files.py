"""Reads that trust nothing, and whole-file writes: exact refusals, and nothing left behind."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest

from autoq import _files
from autoq.errors import CacheError, PlanError

LIMIT = 1 << 16


def read(path, **changes):
    return _files.read_json(
        path, PlanError, **({"what": "a note", "limit_bytes": LIMIT, "fix": "Do it again."} | changes)
    )


def refusal(path, **changes):
    with pytest.raises(PlanError) as caught:
        read(path, **changes)
    assert caught.value.where == str(path)
    return caught.value


@pytest.fixture
def note(tmp_path):
    def write(text):
        path = tmp_path / "note.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# -- JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [None, True, 0, 2**64 - 1, -(2**63), 1e-300, -0.5, "é", [], {}, {"a": [1, {"b": "\U0001f600"}]}, [[[[]]]]],
)
def test_what_json_writes_is_read(note, value):
    assert read(note(json.dumps(value))) == value
    assert read(note(json.dumps(value, ensure_ascii=False))) == value


@pytest.mark.parametrize(
    ("text", "rule", "got"),
    [
        ('{"a": 1, "a": 2}', "$: a key appears once in an object", "'a'"),
        ('{"x y": [0, {"b": 1, "c": 2, "b": 1}]}', '$["x y"][1]: a key appears once in an object', "'b'"),
        ('{"a": NaN}', "$.a is a finite number", "nan"),
        ('{"a": [1, -Infinity]}', "$.a[1] is a finite number", "-inf"),
        ("1e999", "$ is a finite number", "inf"),
        ('{"seed": 18446744073709551616}', "$.seed is an integer of at most 64 bits", "more"),
        ('{"seed": -9223372036854775809}', "$.seed is an integer of at most 64 bits", "more"),
        ('{"seed": ' + "7" * 60_000 + "}", "$.seed is an integer of at most 64 bits", "more"),
        ('["\\ud800"]', "$[0] is valid Unicode", "'\\ud800'"),
        ('{"a": {"\\udfff": 1}}', "$.a: keys are valid Unicode", "'\\udfff'"),
        ("[" * 65 + "]" * 65, "$" + "[0]" * 64 + " is nested at most 64 deep", "more"),
        ('{"a":' * 65 + "1" + "}" * 65, "$" + ".a" * 64 + " is nested at most 64 deep", "more"),
        ("[" * 30_000 + "]" * 30_000, "a note is nested at most 64 deep", "more"),
        (b"\xff\xfe", "a note is UTF-8 text", None),
        ("\ufeff{}", "a note holds one complete JSON value", None),
        ("", "a note holds one complete JSON value", None),
        ('{"a": 1', "a note holds one complete JSON value", None),
        ('{"a": 1}{}', "a note holds one complete JSON value", None),
        ("{'a': 1}", "a note holds one complete JSON value", None),
        ('{"a": 0x10}', "a note holds one complete JSON value", None),
        ('"\x00"', "a note holds one complete JSON value", None),
        ("[01]", "a note holds one complete JSON value", None),
    ],
)
def test_json_that_is_refused(note, text, rule, got):
    problem = refusal(note(text))
    assert problem.rule == rule
    assert problem.fix == "Do it again."
    if got is not None:
        assert problem.got == got


def test_sixty_four_levels_are_read(note):
    assert read(note("[" * 64 + "]" * 64))


def test_a_message_never_repeats_a_whole_file(note):
    problem = refusal(note(json.dumps({"k" * 30_000: {"m" * 30_000: float("nan")}})))
    assert len(str(problem)) < 600


def test_small_values_cannot_fill_the_memory(note):
    text = "[" + "{}," * (_files.MAX_VALUES // 2) + "{}]"  # 3 MB that would take 64 bytes an object
    problem = refusal(note(text), limit_bytes=1 << 23)
    assert problem.rule == "a note has at most 2,000,000 values"


# -- which files -------------------------------------------------------------------------------------------------------


def test_size_is_limited_before_anything_is_read(note):
    path = note(" " * (LIMIT - 1) + "1")
    assert read(path) == 1
    with path.open("r+b") as stream:
        stream.truncate(1 << 40)  # a hole of a terabyte
    problem = refusal(path)
    assert problem.rule == "a note has at most 65,536 bytes"
    assert problem.got == "1,099,511,627,776"


def test_only_regular_files_are_read(tmp_path):
    assert refusal(tmp_path).got == "a folder"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert refusal(pipe).got == "a pipe"  # and it returns, though nobody writes
    assert refusal("/dev/zero").got == "a device"
    assert "FileNotFoundError" in refusal(tmp_path / "none").got
    assert refusal(f"{tmp_path}/a\0b").rule == "a note must be readable"


def test_links_are_followed_only_when_asked(note, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(note("1"))
    assert read(link) == 1
    assert refusal(link, follow=False).got == "a symbolic link"
    link.unlink()
    link.symlink_to(link)
    assert refusal(link).rule == "a note must be readable"


# -- writes ------------------------------------------------------------------------------------------------------------


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "plan.json"

    def write(temporary):
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
        raise OSError(errno.ENOSPC, "No space left on device")

    path.write_text("old")
    with pytest.raises(CacheError, match=r"the file must be writable; got OSError: No space left on device"):
        _files.write_atomic(path, write, CacheError)
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["plan.json"]
    _files.write_atomic(path, lambda temporary: temporary.write_text("new"), CacheError)
    assert path.read_text() == "new"
    assert [one.name for one in tmp_path.iterdir()] == ["plan.json"]


def test_what_a_killed_writer_leaves_is_removed_by_the_next_write(tmp_path):
    program = (
        "import os, pathlib, signal, sys\nfrom autoq import _files\nfrom autoq.errors import CacheError\n"
        "def write(temporary):\n    temporary.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "_files.write_atomic(pathlib.Path(sys.argv[1]), write, CacheError)\n"
    )
    path = tmp_path / "plan.json"
    path.write_text("old")
    (tmp_path / ".plan.json.not-ours").write_text("kept")
    (tmp_path / ".other.json.1234.tmp").write_text("of another file")
    for _ in range(2):
        child = subprocess.run([sys.executable, "-c", program, str(path)], timeout=60, check=False)
        assert child.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = _files.leftovers(tmp_path)  # the second run removed the first one's
    assert _files.leftovers(tmp_path, "plan.json") == [left]
    assert _files.leftovers(tmp_path, "plan") == []
    assert left.read_text() == "half"
    _files.write_atomic(tmp_path / "another", lambda temporary: temporary.write_text("new"), CacheError)
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        ".other.json.1234.tmp",
        ".plan.json.not-ours",
        "another",
        "plan.json",
    ]


def test_a_living_writer_keeps_its_temporary_file(tmp_path):
    path, seen = tmp_path / "plan.json", []

    def slow(temporary):
        temporary.write_text("first")
        seen.append(_files.leftovers(tmp_path))
        _files.write_atomic(path, lambda other: other.write_text("second"), CacheError)

    _files.write_atomic(path, slow, CacheError)
    assert seen == [[]]
    assert path.read_text() == "first"


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path):
    path = tmp_path / "plan.json"
    texts = [str(number) * 20_000 for number in range(8)]

    def work(text):
        for _ in range(20):
            _files.write_atomic(path, lambda temporary: temporary.write_text(text), CacheError)

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert [one.name for one in tmp_path.iterdir()] == ["plan.json"]


def test_a_temporary_file_that_was_removed_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    real, calls = _files.fcntl.flock, []

    def flock(handle, how):
        calls.append(how)
        if len(calls) == 1:
            (taken,) = tmp_path.glob(".plan.json.*.tmp")
            taken.unlink()
        real(handle, how)

    monkeypatch.setattr(_files.fcntl, "flock", flock)
    _files.write_atomic(tmp_path / "plan.json", lambda temporary: temporary.write_text("new"), CacheError)
    assert (tmp_path / "plan.json").read_text() == "new"
    assert len(calls) == 2


def test_the_folder_is_put_on_disk_after_the_rename(tmp_path, monkeypatch):
    synced = []
    real = os.fsync

    def fsync(handle):
        synced.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")  # noqa: PTH112
        assert (tmp_path / "plan.json").exists() == (synced[-1] == "folder")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    _files.write_atomic(tmp_path / "plan.json", lambda temporary: temporary.write_text("x"), CacheError)
    assert synced == ["file", "folder"]


def test_a_read_takes_no_more_memory_than_the_limit(tmp_path):
    path = tmp_path / "zeros"
    with path.open("wb") as stream:
        stream.truncate(1 << 33)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path):
    path = tmp_path / "plan.json"
    _files.write_atomic(path, lambda temporary: temporary.write_text("old"), PlanError)
    assert path.stat().st_mode & 0o777 == 0o644
    path.chmod(0o600)
    _files.write_atomic(path, lambda temporary: temporary.write_text("new"), PlanError)
    assert path.stat().st_mode & 0o777 == 0o600
