"""Everything that autoq writes, each with how to write version 1, 2, 3 … and how to read what is there."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import autoq
from autoq import calibration, definition, result_files, studies, tables
from autoq.cache import Fingerprint, ProfileCache, SensitivityCache
from autoq.knapsack import Option, Problem, Unit
from autoq.plan import Plan
from autoq.profiler.end_to_end import UNQUANTIZED
from autoq.reporting import write_files
from autoq.scheme import NONE, Scheme
from autoq.search_values import Budget
from autoq.workload import LayerInfo, LinearCall, PhaseInfo, Workload

SCHEMES = ("int8wo", "int4wo-hqq(group_size=32)", "none")


@dataclass(frozen=True, kw_only=True)
class Writer:
    """One kind of file.

    Attributes:
        name: what is written.
        write: ``write(folder, version)`` replaces version ``version - 1``, or adds to it.
        read: ``read(folder)`` gives the versions that are there, whole.
        adds: whether earlier versions stay.
        writes: of a child that nobody kills; the caches compact after 16.
        in_place: whether it appends to a file; a failed write may leave a part behind what was there.
    """

    name: str
    write: Callable[[Path, int], object]
    read: Callable[[Path], list[int]]
    adds: bool = False
    in_place: bool = False
    writes: int = 20


# -- plan, workload, tables --------------------------------------------------------------------------------------------


def plan(version: int) -> Plan:
    layers = {f"model.layers.{i}.mlp.up_proj": SCHEMES[(i + version) % len(SCHEMES)] for i in range(40)}
    return Plan(layers=layers, provenance={"seed": version})


def plan_version(path: Path) -> list[int]:
    found = Plan.load(path)
    version = int(found.provenance["seed"])
    assert found.layers == plan(version).layers
    return [version]


def workload(version: int) -> Workload:
    layers = tuple(
        LayerInfo(name=f"layers.{i}", k=64, n=version, dtype="bfloat16", device="cpu", bias=False) for i in range(40)
    )
    calls = tuple(LinearCall(layer=one.name, phase="decode", m=1, dtype="bfloat16", count=version) for one in layers)
    return Workload(layers=layers, calls=calls, phases=(PhaseInfo(name="decode"),))


def workload_version(path: Path) -> list[int]:
    found = Workload.load(path)
    version = found.layers[0].n
    assert found == workload(version)
    return [version]


def score_rows(version: int) -> list[dict[str, Any]]:
    return [{"layer": f"v{version}.{i}", "scheme": "int8wo", "score": float(version)} for i in range(30)]


def score_versions(rows: list[dict[str, Any]]) -> list[int]:
    """Versions whose rows are all there, each once."""
    have = [(row["layer"], row["score"]) for row in rows]
    assert len(set(have)) == len(have), "a row is there twice"
    versions = sorted({int(score) for _, score in have})
    whole = {(row["layer"], row["score"]) for version in versions for row in score_rows(version)}
    assert whole == set(have), "a part of what one call wrote is missing"
    return versions


def write_table(folder: Path, version: int) -> None:
    tables.write(folder / "table.parquet", tables.table(tables.SENSITIVITY, score_rows(version)))


def read_table(folder: Path) -> list[int]:
    return score_versions(tables.read(folder / "table.parquet", tables.SENSITIVITY).to_pylist())


# -- caches ------------------------------------------------------------------------------------------------------------


def profile_rows(fingerprint: Fingerprint, version: int) -> list[dict[str, Any]]:
    shape = {"m": version, "k": 64, "dtype": "bfloat16", "bias": False}
    known = {"kernel": "portable.int8.gemv", "status": "ok", "reason": "", "time_us": 5.0, "baseline_us": 10.0}
    known |= {
        "origin": "",
        "ratio": 0.5,
        "device": fingerprint.device_key,
        **fingerprint.conditions("portable.int8.gemv"),
    }
    return [shape | known | {"n": n, "scheme": scheme} for n in (64, 128) for scheme in SCHEMES]


def append_profile(folder: Path, version: int) -> None:
    fingerprint = Fingerprint.current("cpu")
    ProfileCache(folder, fingerprint).append(profile_rows(fingerprint, version))


def read_profile(folder: Path) -> list[int]:
    rows = ProfileCache(folder, Fingerprint.current("cpu")).rows()
    have = [(row["m"], row["n"], row["scheme"]) for row in rows]
    assert len(set(have)) == len(have), "a row is there twice"
    versions = sorted({row["m"] for row in rows})
    assert len(have) == len(versions) * 2 * len(SCHEMES), "a part of what one call wrote is missing"
    return versions


IDENTITY = {"weights": "of the test", "autoq": "1"}


def append_scores(folder: Path, version: int) -> None:
    SensitivityCache(folder, IDENTITY).append(score_rows(version))


def read_scores(folder: Path) -> list[int]:
    return score_versions(SensitivityCache(folder, IDENTITY).rows())


def keep_baseline(folder: Path, version: int) -> None:
    SensitivityCache(folder, IDENTITY).keep_baseline([version / 2] * 3000)


def read_baseline(folder: Path) -> list[int]:
    found = SensitivityCache(folder, IDENTITY).baseline()
    if found is None:
        return []
    assert found == found[:1] * 3000
    return [int(found[0] * 2)]


class _Clock:
    """In place of ``calibration.Timer``: counts what it is asked to time."""

    compile_arguments: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def __init__(self) -> None:
        self.asked = 0

    def time(self, plans: Any, stage: str) -> dict[str, Any]:
        self.asked += 1
        return {label: {"decode": SimpleNamespace(median_us=100.0)} for label in [*plans, UNQUANTIZED]}


def calibrate(folder: Path, version: int) -> int:
    """Calibrate for the ``version``-th weights; returns how often that took measurements."""
    clock, seen = _Clock(), workload(64)
    schemes = [NONE, Scheme.of("int8wo")]
    isolated = {(layer.name, scheme, "decode"): 2.0 for layer in seen.layers for scheme in schemes}
    identity = {"weights": str(version), "device": "the test's"}
    calibration.calibrate(clock, seen, isolated, schemes, none_is_stock=True, identity=identity, folder=folder)  # type: ignore[arg-type]
    return clock.asked


def read_calibration(folder: Path) -> list[int]:
    count = len(list((folder / "calibration").glob("*.json")))
    return [version for version in range(1, count + 2) if not calibrate(folder, version)]


# -- checkpoint --------------------------------------------------------------------------------------------------------


def model(version: int) -> nn.Module:
    torch.manual_seed(version)
    made = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    made.register_buffer("version", torch.tensor(version))
    return made.eval()


def quantized(version: int) -> nn.Module:
    made = model(version)
    autoq.apply(made, Plan(layers={"0": "int8wo", "2": "int4wo-hqq(group_size=32)"}, provenance={"seed": version}))
    return made


def save_checkpoint(folder: Path, version: int) -> None:
    autoq.save_quantized(quantized(version), folder / "checkpoint")


def read_checkpoint(folder: Path) -> list[int]:
    found = autoq.load_quantized(lambda: model(0), folder / "checkpoint")
    version = int(found.get_buffer("version"))
    whole, mine = quantized(version).state_dict(), found.state_dict()
    assert whole.keys() == mine.keys()
    assert all(torch.equal(whole[name], mine[name]) for name in whole)
    carried = autoq.plan_of(found)
    assert carried is not None
    assert carried.provenance["seed"] == version
    return [version]


# -- report and study --------------------------------------------------------------------------------------------------


def report(version: int) -> Any:
    """What ``write_files`` needs of a ``TuneResult``."""
    row = {"plan": "p", "source": "uniform", "loss_delta": 0.01, "loss_low": 0.0, "loss_high": 0.02, "samples": version}
    row |= {"latency_predicted_us": 10.0, "latency_measured_us": 9.0, "latency_low_us": 8.0, "latency_high_us": 10.0}
    row |= {"weight_bytes": 100, "in_budget": True, "pareto": True, "chosen": True, "assignment": "{}"}
    rows = [row | {"label": scheme} for scheme in SCHEMES]
    return SimpleNamespace(
        plan=plan(version),
        workload=workload(version),
        notes=(f"version {version}",),
        front=tables.frame(rows, tables.FRONT),
        costs=tables.frame([], tables.COSTS),
        measurements=tables.frame([], tables.MEASUREMENTS),
        sensitivity=tables.frame([], tables.SENSITIVITY),
    )


def read_report(folder: Path) -> list[int]:
    """The files are eight, and each is whole; a kill between two leaves neighbouring versions."""
    versions = plan_version(folder / "plan.json")
    (samples,) = set(tables.read(folder / "front.parquet", tables.FRONT)["samples"].to_pylist())
    assert workload_version(folder / "workload.json")[0] in (versions[0], versions[0] - 1)
    assert [tables.read(folder / name, schema) for name, schema in result_files.TABLES.items()]
    text = (folder / "report.html").read_text()
    assert text.endswith("</body></html>\n")
    noted = int(text.partition("<li>version ")[2].partition("<")[0])
    assert (folder / "front.png").read_bytes()[-12:] == b"\0\0\0\0IEND\xaeB`\x82"
    assert versions[0] >= samples >= noted >= versions[0] - 1
    return versions


def _problem() -> Problem:
    options = tuple(Option(scheme=one, time_us=1.0 + i, loss=2.0 - i, bytes=10) for i, one in enumerate(SCHEMES[:2]))
    return Problem(units=(Unit(name="u", layers=("u",), options=options),), fixed_time_us=1.0)


def publish_study(folder: Path, version: int) -> None:
    problem = _problem()
    wanted = definition.Definition(
        problem=problem,
        families={"u": "mlp"},
        uniform={one: problem.uniform(one) for one in SCHEMES[:2]},
        budget=Budget(max_loss=1.0),
        fidelities=1,
        seed=version,
        fingerprint="of the test",
        recipe={"padding": "." * 20_000},  # more than the slack in a disk's last block
    )
    definition.publish(studies.open_storage(folder / "study.journal"), "autoq", wanted, 4)


def read_study(folder: Path) -> list[int]:
    storage = studies.open_storage(folder / "study.journal")
    found = [definition.load(storage, name)[1] for name in definition.published(storage)]
    assert all(one.problem == _problem() for one in found)
    return sorted(one.seed for one in found)


WRITERS = {
    one.name: one
    for one in (
        Writer(
            name="plan",
            write=lambda folder, version: plan(version).save(folder / "plan.json"),
            read=lambda folder: plan_version(folder / "plan.json"),
        ),
        Writer(
            name="workload",
            write=lambda folder, version: workload(version).save(folder / "workload.json"),
            read=lambda folder: workload_version(folder / "workload.json"),
        ),
        Writer(name="table", write=write_table, read=read_table),
        Writer(name="profile cache", write=append_profile, read=read_profile, adds=True),
        Writer(name="sensitivity cache", write=append_scores, read=read_scores, adds=True),
        Writer(name="baseline losses", write=keep_baseline, read=read_baseline),
        Writer(name="calibration", write=calibrate, read=read_calibration, adds=True),
        Writer(name="checkpoint", write=save_checkpoint, read=read_checkpoint),
        Writer(
            name="report",
            write=lambda folder, version: write_files(report(version), folder),
            read=read_report,
            writes=3,
        ),
        Writer(name="study journal", write=publish_study, read=read_study, adds=True, in_place=True),
    )
}
