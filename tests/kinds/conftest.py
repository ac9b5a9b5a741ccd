"""Tuning made quick for models whose times and losses are not judged.

Nothing is compiled, one round of each time is taken, and random text is not extended by more of it.
"""

import pytest
import torch

import autoq.candidates
import autoq.language
import autoq.pipeline
import autoq.tuning
from autoq.profiler import end_to_end, timing
from autoq.profiler import isolated as isolated_module


def one_round(functions, *, prepare, **_):
    return timing.interleaved(functions, budget_s=0.0, min_rounds=1, prepare=prepare)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache folder for all models: their shapes are much the same."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def quick(monkeypatch, cache):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one only waits, with models this small
    torch.manual_seed(0)
    monkeypatch.setattr(isolated_module, "_SECONDS_PER_SHAPE", 0.0)
    monkeypatch.setattr(isolated_module, "_MAX_COPIES", 2)
    monkeypatch.setattr(end_to_end, "_compiled", lambda model, *_: (model, "not compiled"))
    monkeypatch.setattr(end_to_end, "interleaved", one_round)
    monkeypatch.setattr(autoq.language, "extended", lambda model, rows, **_: rows)
    monkeypatch.setattr(autoq.tuning, "default_folder", lambda: cache)
    monkeypatch.setattr(autoq.pipeline, "TRIALS", 6)
    chosen = [autoq.candidates.parse(name) for name in ("int8wo", "sinq(bits=4,group_size=64)")]
    monkeypatch.setattr(autoq.candidates, "DEFAULT", tuple(chosen))
    yield
    torch.set_num_threads(threads)
