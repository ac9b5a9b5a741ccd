"""Full disks, read-only file systems and missing permissions: a clear error, and what was there stays as it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FAULTS = ("file size limit", "disk full", "read-only file system", "no permission")
ERRORS = {
    "plan": "PlanError",
    "workload": "InputError",
    "table": "CacheError",
    "profile cache": "CacheError",
    "sensitivity cache": "CacheError",
    "baseline losses": "CacheError",
    "calibration": "CacheError",
    "checkpoint": "CheckpointError",
    "report": "PlanError",  # the first of its files is the plan
    "study journal": "SearchError",
}
SAYS = {
    "file size limit": "File too large",
    "disk full": "No space left on device",
    "read-only file system": "Read-only file system",
    "no permission": "Permission denied",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(writer, fault) → what came of it, all made by one child process."""
    report = tmp_path_factory.mktemp("faults") / "report.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "faults.py"), "--only", "refusals", "--json", str(report)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert report.exists(), done.stderr[-3000:]
    return {(one["writer"], one["fault"]): one for one in json.loads(report.read_text())["refusals"]}


def test_every_writer_met_every_fault(outcomes):
    assert set(outcomes) == {(writer, fault) for writer in ERRORS for fault in FAULTS}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("writer", ERRORS)
def test_a_write_that_fails_says_so_and_leaves_everything_as_it_was(outcomes, writer, fault):
    found = outcomes[writer, fault]
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert found["error"] == ERRORS[writer], found
    assert SAYS[fault] in found["message"]
    assert ". Choose another" in found["message"] or ". What was measured" in found["message"]  # what to do
    assert found["intact"], found["changed"]
    assert found["versions"] == [1]
