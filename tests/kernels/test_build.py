"""Compiling, trying out, caching; and what happens where that fails."""

import json
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from autoq_kernels.cpu import build, probe, toolchain

CHILD = """
import sys, torch
from pathlib import Path
from autoq_kernels.cpu import build, probe
from autoq_kernels import layout
status = build.load({arguments}cache_dir=Path(sys.argv[1]))
data = probe.sample_weights()["int4"]
y = torch.ops.autoq.linear(torch.ones(2, probe.K), data[:128], None, probe.N)
print(repr((status.isa, status.reason, tuple(y.shape))))
"""


def child(folder, arguments=""):
    command = [sys.executable, "-c", CHILD.format(arguments=arguments), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def ready():
    """A good portable build."""
    return build.load("portable").path


@pytest.fixture
def copying(monkeypatch, ready):
    """Compiling, replaced by copying the good build; returns how often it happened."""
    calls = []

    def compile_library(isa, compiler, folder):
        calls.append(isa)
        return shutil.copy(ready, folder / "kernels.so")

    monkeypatch.setattr(toolchain, "compile_library", lambda *a: type(ready)(compile_library(*a)))
    return calls


# Stands in for g++: objects hold the instruction set, a library is a copy of TRAP or of the good build.
SCRIPT = """#!/bin/sh
if [ "$1" = --version ]; then echo script 1.0; exit; fi
first=$1 object=$2
while [ $# -gt 0 ]; do
  case "$1" in -o) output=$2;; -DAUTOQ_ISA=*) isa=${{1#*=}};; esac
  shift
done
if [ "$first" != -shared ]; then echo "$isa" > "$output"; exit; fi
echo link >> {log}
sleep 1
case "$(cat "$object")" in {trapping}) cp {trap} "$output";; *) cp {ready} "$output";; esac
"""


@pytest.fixture(scope="module")
def trap(tmp_path_factory):
    """A library that executes an illegal instruction when it is loaded."""
    folder = tmp_path_factory.mktemp("trap")
    source, library = folder / "trap.cpp", folder / "trap.so"
    source.write_text("__attribute__((constructor)) static void trap() { __builtin_trap(); }\n")
    subprocess.run([toolchain.find_compiler(None).path, "-shared", "-fPIC", source, "-o", library], check=True)
    return library


@pytest.fixture
def scripted(tmp_path, ready, trap):
    """Writes a compiler whose libraries of some instruction sets trap; it notes each linking in links.log."""

    def write(trapping):
        path = tmp_path / "script"
        path.write_text(SCRIPT.format(log=tmp_path / "links.log", trapping=trapping, trap=trap, ready=ready))
        path.chmod(0o755)
        return str(path)

    return write


def ensure(folder):
    return build._ensure_built("portable", folder, toolchain.find_compiler(None))


def test_without_a_compiler_the_definition_runs_and_the_reason_is_told(tmp_path):
    out, err = child(tmp_path, 'compiler="no-such-compiler", ').communicate()
    isa, reason, shape = eval(out)
    assert isa is None
    assert "no-such-compiler" in reason
    assert shape == (2, probe.N)
    assert "not available" in err  # the warning


def test_an_instruction_set_asked_for_is_refused_not_replaced(tmp_path):
    with pytest.raises(build.KernelBuildError, match="no C\\+\\+ compiler"):
        build.load("portable", cache_dir=tmp_path, compiler="no-such-compiler")


def test_a_processor_without_the_instructions_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "_cpu_features", lambda: frozenset({"avx2", "f16c"}))
    assert toolchain.best_isa() == "portable"
    with pytest.raises(build.KernelBuildError, match="lacks fma"):
        build.load("avx2", cache_dir=tmp_path)


def test_a_compiler_that_fails_is_quoted(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo broken 1.0; else echo "no luck"; exit 3; fi\n')
    broken.chmod(0o755)
    with pytest.raises(build.KernelBuildError, match="no luck"):
        build.load("portable", cache_dir=tmp_path / "cache", compiler=str(broken))


def test_a_build_is_compiled_once(tmp_path, copying):
    first = ensure(tmp_path)
    assert ensure(tmp_path) == first
    assert copying == ["portable"]
    record = json.loads(first.with_suffix(".json").read_text())
    assert record["key"]["torch"] == torch.__version__
    assert not list(tmp_path.glob(".build-*"))


@pytest.mark.parametrize("damage", ["library", "record", "lost record"])
def test_a_damaged_build_is_made_anew(tmp_path, copying, caplog, damage):
    library = ensure(tmp_path)
    if damage == "library":
        library.write_bytes(library.read_bytes()[:-100])
    elif damage == "record":
        library.with_suffix(".json").write_text("{")
    else:
        library.with_suffix(".json").unlink()
    with caplog.at_level(logging.WARNING):
        ensure(tmp_path)
    assert len(copying) == 2
    assert ("damaged" in caplog.text) == (damage != "lost record")


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(build.KernelBuildError, match="cannot be used"):
        ensure(tmp_path / "file")


def test_an_illegal_instruction_kills_the_probe_only(trap):
    assert probe.failure(trap, "autoq_trap") == ("the probe was killed by SIGILL", True)


def test_an_illegal_instruction_is_an_error_where_the_instruction_set_was_asked_for(tmp_path, scripted):
    cache, compiler = tmp_path / "cache", scripted("portable")
    with pytest.raises(build.KernelBuildError, match="SIGILL"):
        build.load("portable", cache_dir=cache, compiler=compiler)
    assert not list(cache.glob("*.so"))
    assert (tmp_path / "links.log").read_text() == "link\n"
    with pytest.raises(build.KernelBuildError, match=r"SIGILL \(found out before; delete .*\.failed to try again\)"):
        build.load("portable", cache_dir=cache, compiler=compiler)
    assert (tmp_path / "links.log").read_text() == "link\n"  # not compiled again


@pytest.mark.parametrize("trapping", ["avx*", "*"])
def test_after_an_illegal_instruction_the_next_best_runs_and_the_reason_is_told(tmp_path, scripted, trapping):
    best = toolchain.best_isa()
    if best == "portable" and trapping == "avx*":
        pytest.skip("this processor has no better instruction set to fall back from")
    out, err = child(tmp_path / "cache", f'compiler="{scripted(trapping)}", ').communicate()
    isa, reason, shape = eval(out)
    assert isa == ("portable" if trapping == "avx*" else None)
    assert f"{best}: the {best} kernels compiled but do not work: the probe was killed by SIGILL" in reason
    assert shape == (2, probe.N)
    assert "SIGILL" in err  # the warning


def test_a_build_with_wrong_results_is_not_used(monkeypatch, tmp_path, copying):
    monkeypatch.setattr(probe, "failure", lambda library, namespace: probe.Failure("linear of int4: wrong", False))
    with pytest.raises(build.KernelBuildError, match="do not work: linear of int4: wrong"):
        ensure(tmp_path)
    assert not list(tmp_path.glob("*.so"))
    assert not list(tmp_path.glob("*.failed"))  # what may go by is not kept


def test_the_probe_sees_a_wrong_result(monkeypatch, ready):
    assert probe.wrong_results("autoq_portable") == []
    monkeypatch.setattr(probe.ops, "dequantize", lambda head, n, k: torch.ones(n, k))
    assert any("dequantize of int4" in line for line in probe.wrong_results("autoq_portable"))


def test_two_processes_at_once_compile_once(tmp_path, scripted):
    cache, compiler = tmp_path / "cache", scripted("none")
    children = [child(cache, f'isa="portable", compiler="{compiler}", ') for _ in range(2)]
    results = [process.communicate() for process in children]
    assert [eval(out)[0] for out, _ in results] == ["portable", "portable"], results
    assert (tmp_path / "links.log").read_text() == "link\n"
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".lock", ".so"]


def test_a_compilation_that_ends_early_leaves_no_compilers_behind(tmp_path):
    """As after Ctrl-C: the first source fails when the others have started, each with a process of its own."""
    pids, script = tmp_path / "pids", tmp_path / "compiler"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *activation.cpp*) until [ "$(wc -l < {pids})" -ge 3 ]; do sleep 0.01; done; exit 1;; esac\n'
        f"sleep 1000 & echo $! >> {pids}; wait\n"
    )
    script.chmod(0o755)
    pids.touch()
    fake = toolchain.Compiler(path=str(script), version="0")
    with pytest.raises(build.KernelBuildError, match="failed with 1"):
        toolchain.compile_library("portable", fake, tmp_path)
    started = pids.read_text().split()
    assert len(started) >= 3
    until = time.monotonic() + 60
    while any(map(alive, started)):  # they were killed, which takes a moment
        assert time.monotonic() < until, [pid for pid in started if alive(pid)]
        time.sleep(0.01)


def alive(pid):
    """Whether a process still runs; one that is dead may stay listed until somebody asks for its exit code."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.slow
def test_two_processes_build_at_once(tmp_path):
    children = [child(tmp_path), child(tmp_path)]
    results = [process.communicate() for process in children]
    assert [process.returncode for process in children] == [0, 0], results
    assert results[0][0] == results[1][0] != ""
    assert len(list(tmp_path.glob("*.so"))) == 1
