"""A small tuning made by hand, and its folder."""

import importlib.util
from pathlib import Path

import pytest

from autoq.reporting import write_files


@pytest.fixture(scope="session")
def sample():
    """The module ``sample``: its numbers, and ``result()``."""
    spec = importlib.util.spec_from_file_location("tuning_sample", Path(__file__).with_name("sample.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def written(sample, tmp_path_factory):
    """The folder that ``autoq tune --output`` would write of it; tests that change a file copy it first."""
    folder = tmp_path_factory.mktemp("tuning")
    write_files(sample.result(), folder)
    return folder
