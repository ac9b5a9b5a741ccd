"""What `autoq diff` tells of two plans."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from autoq import cli
from autoq.plan import Plan
from autoq.plan_diff import compare
from autoq.scheme import NONE, Scheme

INT8, HQQ = Scheme(name="int8wo"), Scheme.parse("int4wo-hqq(group_size=64)")
Q, K, UP, UP10, HEAD = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.2.mlp.up_proj",
    "model.layers.10.mlp.up_proj",
    "lm_head",
)
A = Plan(
    layers={Q: INT8, K: INT8, UP: HQQ, UP10: HQQ, HEAD: NONE},
    units={"qk": (Q, K)},
    phases={"prefill": 1.0, "decode": 128.0},
    provenance={
        "created": "2026-11-22T04:00:00+00:00",
        "budget": {"metric": "nll", "max_increase": 0.01},
        "measured": {"latency_us": 100.5, "loss_delta": 0.009, "phases": {"decode": {"time_us": 7.5}}},
        "device": {"name": "AMD", "threads": 2},
        "versions": {"torch": "2.13.0", "triton": "3.5.0"},
        "seed": 0,
    },
)
B = Plan(
    layers={Q: INT8, K: HQQ, UP: INT8, UP10: INT8, "score": INT8},
    phases={"prefill": 1.0, "decode": 64.0},
    provenance={
        "created": "2026-11-23T04:00:00+00:00",
        "budget": {"metric": "nll", "max_increase": 0.02},
        "measured": {"latency_us": 90.5, "loss_delta": 0.009, "phases": {"decode": {"time_us": 6.5}}},
        "device": {"name": "Intel", "threads": 2},
        "versions": {"torch": "2.13.0"},
        "seed": 0,
        "edited": True,
    },
)


def test_every_difference_is_found_and_nothing_else():
    found = compare(A, B)
    assert not found.same
    assert found.changed == {K: (INT8, HQQ), UP: (HQQ, INT8), UP10: (HQQ, INT8)}
    assert (found.only_a, found.only_b) == ({HEAD: NONE}, {"score": INT8})
    assert found.units == {"qk": ((Q, K), ())}
    assert found.facts == {
        "phases.decode": (128.0, 64.0),
        "budget.max_increase": (0.01, 0.02),
        "measured.latency_us": (100.5, 90.5),
        "measured.phases.decode.time_us": (7.5, 6.5),
        "device.name": ("AMD", "Intel"),
        "versions.triton": ("3.5.0", None),
        "edited": (None, True),
    }
    assert list(found.facts)[:3] == ["phases.decode", "budget.max_increase", "measured.latency_us"]
    assert list(compare(Plan(layers={}), A).facts)[-2:] == ["versions.triton", "seed"]
    hqq = str(HQQ)
    assert found.by_family == {
        "attention": {("int8wo", hqq): 1},
        "mlp": {(hqq, "int8wo"): 2},
        "lm_head": {("none", "nowhere"): 1, ("nowhere", "int8wo"): 1},
    }


def test_the_other_way_round_everything_is_swapped():
    one, other = compare(A, B), compare(B, A)
    assert other.changed == {name: (b, a) for name, (a, b) in one.changed.items()}
    assert (other.only_a, other.only_b) == (one.only_b, one.only_a)
    assert other.facts == {name: (b, a) for name, (a, b) in one.facts.items()}
    assert other.units == {"qk": ((), (Q, K))}


@pytest.mark.parametrize(
    "other",
    [A, Plan.from_json(A.to_json()), replace(A, provenance=A.provenance | {"created": "later"})],
)
def test_a_plan_and_its_copy_are_the_same_whenever_it_was_made(other):
    found = compare(A, other)
    assert found.same
    assert found.to_json() == {
        "same": True,
        "changed": {},
        "only_a": {},
        "only_b": {},
        "by_family": {},
        "units": {},
        "facts": {},
    }


def with_evidence(kernel, gap):
    evidence = {"certificate": {"gap": gap}, "schema_1": {"author": kernel}}
    return replace(A, kernels={"d": {"int8wo M=1": kernel, "fp6 M=1": "same"}}, provenance=A.provenance | evidence)


def test_kernels_and_certificates_that_differ_are_found():
    found = compare(with_evidence("avx2", 0.1), with_evidence("torch.reference", 0.9))
    assert not found.same
    assert found.facts == {
        "certificate.gap": (0.1, 0.9),
        "schema_1.author": ("avx2", "torch.reference"),
        "kernels.d.int8wo M=1": ("avx2", "torch.reference"),
    }


def test_the_command_counts_kernels_that_differ_and_lists_them_when_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with_evidence("avx2", 0.1).save("a.json")
    with_evidence("avx512", 0.1).save("b.json")
    assert cli.run(["diff", "a.json", "b.json"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "kernels 1 differ; --layers lists them" in shown
    assert "kernels.d" not in shown
    assert cli.run(["diff", "a.json", "b.json", "--layers"]) == 0
    assert "kernels.d.int8wo M=1 avx2 avx512" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    A.save("a.json")
    B.save("b.json")


def test_the_command_prints_families_units_and_figures(files, capsys):
    assert cli.run(["diff", "a.json", "b.json"]) == 0
    lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    assert f"mlp: 2 layers {HQQ} int8wo" in lines
    assert "lm_head: 1 layer none nowhere" in lines
    assert f"unit qk {Q}, {K}" in lines
    assert "measured.latency_us 100.5 90.5" in lines
    assert "versions.triton 3.5.0" in lines
    assert not [line for line in lines if line.startswith(UP)]


def test_the_command_lists_layers_by_number(files, capsys):
    assert cli.run(["diff", "a.json", "b.json", "--layers"]) == 0
    lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line.startswith("model.layers")] == [
        f"{K} int8wo {HQQ}",
        f"{UP} {HQQ} int8wo",
        f"{UP10} {HQQ} int8wo",
    ]


def test_the_command_prints_one_object_of_pairs(files, capsys):
    assert cli.run(["diff", "a.json", "b.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["same"] is False
    assert found["changed"][K] == [{"scheme": "int8wo"}, {"scheme": "int4wo-hqq", "group_size": 64}]
    assert found["by_family"]["mlp"] == [{"from": str(HQQ), "to": "int8wo", "layers": 2}]
    assert found["facts"]["versions.triton"] == ["3.5.0", None]
    assert found["units"] == {"qk": [[Q, K], []]}


def test_a_path_is_shown_as_it_is(files, tmp_path, capsys):
    folder = tmp_path / "out[" / "t]"  # `[/t]` closes a tag in rich's markup
    A.save(folder / "[red].json")
    assert cli.run(["show", "out[/t]/[red].json"]) == 0
    assert f"out[/t]/[red].json ({A.hash})" in capsys.readouterr().out


def test_the_command_says_that_plans_are_the_same(files, capsys):
    assert cli.run(["diff", "a.json", "a.json"]) == 0
    assert capsys.readouterr().out == "The plans are the same.\n"


@pytest.mark.parametrize("command", [["show", "a.json", "--layers"], ["diff", "a.json", "b.json"]])
def test_plans_are_shown_and_compared_without_torch(files, command):
    code = f"import sys; from autoq.cli import run; sys.exit(run({command!r}) or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_damaged_plan_is_one_error(files, tmp_path, capsys):
    (tmp_path / "b.json").write_text("{")
    assert cli.run(["diff", "a.json", "b.json"]) == 1
    assert "Error: b.json: a plan file holds one complete JSON value" in capsys.readouterr().err
