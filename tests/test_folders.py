import subprocess
import sys

import pytest

from autoq import folders
from autoq.folders import new_folder, recover

# Each process is killed before its next step of a kind that touches files, and each such step has its turn.
KILLED = """
import os, signal, sys
from pathlib import Path
from autoq import folders

target, exchanges = Path(sys.argv[1]), sys.argv[2] == "exchange"
real = folders._exchange


def write(word):
    with folders.new_folder(target) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(word)


def counted(event, _):
    global left
    if event in STEPS:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def exchange(one, other):
    counted("exchange", None)
    result = real(one, other) if exchanges else False
    counted("exchange", None)
    return result


STEPS = {"open", "exchange", "os.rename", "os.rmdir", "os.remove", "os.mkdir", "os.chmod", "os.listdir", "fcntl.flock"}
folders._exchange = exchange
left = 10**9
write("old")
steps = 0
while True:
    child = os.fork()
    if child == 0:
        left = steps
        sys.addaudithook(counted)
        write("new")
        os._exit(0)
    finished = os.waitpid(child, 0)[1] == 0
    folders.recover(target)
    print(steps, sorted((target / name).read_text() for name in ("a", "b")), sorted(os.listdir(target)), finished)
    if finished:
        break
    write("old")
    assert sorted(os.listdir(target.parent)) == [target.name], os.listdir(target.parent)
    steps += 1
"""


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_a_process_killed_at_any_step_leaves_the_old_or_the_new_folder(tmp_path, way):
    child = [sys.executable, "-c", KILLED, str(tmp_path / "model"), way]
    done = subprocess.run(child, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()]
    allowed = {f"['{word}', '{word}'] ['a', 'b'] {end}" for word in ("old", "new") for end in (True, False)}
    assert set(lines) <= allowed
    assert lines[0] == "['old', 'old'] ['a', 'b'] False"
    assert lines[-1] == "['new', 'new'] ['a', 'b'] True"
    assert len(lines) > 15
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def write(target, word):
    with new_folder(target) as folder:
        (folder / "a").write_text(word)


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_and_an_error_leaves_it(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(folders, "_renameat2", lambda: None)
    target = tmp_path / "deep" / "model"
    write(target, "one")
    write(target, "two")
    with pytest.raises(UnicodeEncodeError):
        write(target, "\ud800")
    assert (target / "a").read_text() == "two"
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_what_could_not_be_put_into_place_brings_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "model"
    write(target, "one")
    monkeypatch.setattr(folders, "_renameat2", lambda: None)
    real = type(target).rename

    def fails(self, other):
        if self.suffix == ".new":
            raise OSError(30, "Read-only file system")
        return real(self, other)

    monkeypatch.setattr(type(target), "rename", fails)
    with pytest.raises(OSError, match="Read-only file system"):
        write(target, "two")
    assert (target / "a").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_recovery_finds_only_folders_of_that_name(tmp_path):
    for name in (".model.abcdefgh.old", ".model.v2.abcdefgh.old", ".model.abcdefgh.new", ".other.abcdefgh.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    recover(tmp_path / "model")
    assert (tmp_path / "model" / "a").read_text() == ".model.abcdefgh.old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".model.abcdefgh.new",
        ".model.v2.abcdefgh.old",
        ".other.abcdefgh.old",
        "model",
    ]
    recover(tmp_path / "nowhere" / "model")
    write(tmp_path / "model", "new")
    assert not (tmp_path / ".model.abcdefgh.new").exists()


def test_a_folder_that_a_living_process_fills_is_left_alone(tmp_path):
    target = tmp_path / "model"
    with new_folder(target) as slow:
        (slow / "a").write_text("slow")
        write(target, "fast")
        assert (slow / "a").read_text() == "slow"
        assert (target / "a").read_text() == "fast"
    assert (target / "a").read_text() == "slow"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
