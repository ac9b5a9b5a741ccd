"""What tests of several folders share."""

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def report_of(tmp_path_factory):
    """Runs a program of this repository in a process of its own; returns the JSON that it wrote for ``--json``."""

    def run(program, *arguments):
        report = tmp_path_factory.mktemp(program.stem) / "report.json"
        done = subprocess.run(
            [sys.executable, str(program), *arguments, "--json", str(report)],
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        assert report.exists(), done.stderr[-3000:]
        return json.loads(report.read_text())

    return run
