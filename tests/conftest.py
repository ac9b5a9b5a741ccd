"""What tests of several folders share."""

import json
import signal
import subprocess
import sys

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """A shell that runs the tests in the background makes them ignore Ctrl-C, and so all processes that they start."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


@pytest.fixture
def linear_devices(monkeypatch):
    """Kinds of devices on which ``nn.Linear`` layers are made during the test."""
    devices = set()
    real = torch.nn.Linear.__init__

    def spy(self, *arguments, **options):
        real(self, *arguments, **options)
        devices.add(self.weight.device.type)

    monkeypatch.setattr(torch.nn.Linear, "__init__", spy)
    return devices
