"""What doctor finds, what it advises, and its exit code."""

import json
from types import SimpleNamespace

import pytest

from autoq import cli, diagnosis, plugins
from autoq.diagnosis import Fact
from autoq.errors import CandidateError
from autoq_kernels.cpu import build, toolchain

NAMES = [
    "autoq",
    "packages",
    "processor",
    "instruction sets",
    "threads",
    "load",
    "memory",
    "GPU",
    "compiler",
    "kernels",
]
NAMES += ["plugins", "read bandwidth", "dot products", "cache"]


@pytest.fixture
def measured(monkeypatch):
    """Figures that need no measuring, on a machine without problems."""
    monkeypatch.setattr(diagnosis, "read_bandwidth_gb_s", lambda: 12.34)
    monkeypatch.setattr(diagnosis, "product_rates", lambda: {"float32": 50.0, "int8": 99.6})
    monkeypatch.setattr(diagnosis, "processors", lambda: 1e6)
    monkeypatch.setattr(diagnosis.os, "getloadavg", lambda: (0.0, 0.0, 0.0))


def test_doctor_tells_device_kernels_figures_and_cache(measured, tmp_path, capsys):
    assert cli.run(["doctor", "--json", "--cache-dir", str(tmp_path / "new")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    facts = found["facts"]
    assert list(facts) == NAMES
    assert facts["read bandwidth"]["value"] == "12.3 GB/s, measured now"
    assert facts["read bandwidth"]["figures"] == {"GB/s": 12.34}
    assert facts["dot products"]["value"] == "float32 50, int8 100 · 10⁹ multiply-adds/s, measured now"
    assert facts["kernels"]["value"] == f"{build.status().isa}, {build.status().path}"
    assert facts["cache"]["value"].startswith(f"{tmp_path / 'new'}, measurements of 0 devices, ")
    assert not (tmp_path / "new").exists()


def test_a_problem_is_marked_and_exits_1(measured, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(diagnosis, "processors", lambda: 0.5)
    assert cli.run(["doctor", "--cache-dir", str(tmp_path / "file" / "cache")]) == 1
    printed = capsys.readouterr()
    assert printed.out.endswith("Problems: threads, cache.\n")
    assert "! threads" in printed.out
    assert "OMP_NUM_THREADS=1" in printed.out
    assert "AUTOQ_CACHE_DIR" in printed.out
    assert "doctor 0/14 autoq" in printed.err


def test_no_compiler_and_no_kernels_are_problems_with_advice(monkeypatch):
    monkeypatch.setattr(toolchain, "_COMPILERS", ("no-such-compiler",))
    found = diagnosis._compiler()
    assert found.problem
    assert found.value == "no C++ compiler: looked for no-such-compiler. Install g++ 11 or later"
    assert "apt-get install g++" in found.advice
    nothing = build.BuildStatus(isa=None, path=None, operators=(), reason="avx2: no C++ compiler")
    monkeypatch.setattr(build, "load", lambda: nothing)
    found = diagnosis._kernels()
    assert (found.problem, found.value) == (True, "not built: avx2: no C++ compiler")
    assert "PyTorch's own operators" in found.advice


def test_kernels_that_are_not_the_best_are_a_problem(monkeypatch, tmp_path):
    second = build.BuildStatus(isa="portable", path=tmp_path / "k.so", operators=(), reason="avx2: does not work")
    monkeypatch.setattr(build, "load", lambda: second)
    found = diagnosis._kernels()
    assert found.problem
    assert found.advice.endswith("avx2: does not work")


def test_without_pythons_headers_torch_compile_cannot_work(monkeypatch, tmp_path):
    monkeypatch.setattr(diagnosis.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    found = diagnosis._compiler()
    assert found.problem
    assert "python3-dev" in found.advice


def test_a_containers_quota_limits_the_processors(monkeypatch, tmp_path):
    monkeypatch.setattr(diagnosis, "_CGROUP", tmp_path)
    monkeypatch.setattr(diagnosis.os, "sched_getaffinity", lambda _: set(range(8)))
    assert diagnosis.processors() == 8
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert diagnosis.processors() == 8
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert diagnosis.processors() == 1.5
    assert not diagnosis._threads(2, 1.5).problem
    assert diagnosis._threads(3, 1.5).advice.startswith("Set OMP_NUM_THREADS=2:")


def test_a_containers_limit_bounds_the_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(diagnosis, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    found = diagnosis._memory()
    assert found.value == "3.0 GB, 2.0 GB available"
    assert found.advice.startswith("Little is left")
    assert not found.problem


def test_a_full_disk_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    found = diagnosis._cache(tmp_path)
    assert found.problem
    assert found.value.endswith("0.0 GB free")


def test_a_plugin_that_cannot_be_used_is_a_problem(monkeypatch):
    good, bad = (plugins.Plugin(key=key, distribution=f"of-{key}", version="1", target="m:C") for key in ("a", "b"))
    monkeypatch.setattr(plugins, "installed", lambda: (good, bad))

    def load(key):
        if key == "b":
            raise CandidateError("a plugin can be imported", got="ImportError: m", fix="Repair or uninstall of-b.")

    monkeypatch.setattr(plugins, "load", load)
    found = diagnosis._plugins()
    assert (found.value, found.problem) == ("a (of-a 1), b (of-b 1)", True)
    assert found.advice == "a plugin can be imported; got ImportError: m. Repair or uninstall of-b."


def test_the_rates_of_products_are_positive_and_named():
    rates = diagnosis.product_rates(rows=8, size=64)
    assert list(rates) == ["float32", "bfloat16", "int8"]
    assert min(rates.values()) > 0


def test_a_fact_is_json():
    fact = Fact(name="a", value="b", figures={"GB/s": 1.0})
    assert fact.to_json() == {"value": "b", "advice": "", "problem": False, "figures": {"GB/s": 1.0}}
