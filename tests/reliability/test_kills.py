"""kill -9 while autoq writes: what was finished is found, nothing is half-written, the next run goes on.

The long mode is `make faults KILLS=200`.
"""

from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[2] / "benchmarks" / "faults.py"


@pytest.fixture(scope="module")
def writers(report_of):
    found = report_of(FAULTS, "--only", "kills", "--kills", "30")
    return {one["writer"]: one for one in found["kills"]}


def test_every_writer_is_killed_in_each_way(writers):
    assert len(writers) == 10
    for one in writers.values():
        assert one["kills"] == 3
        assert one["by"] == {"change": 1, "byte": 1, "time": 1}


def test_nothing_finished_is_lost_and_nothing_is_half_written(writers):
    assert {name: one["problems"] for name, one in writers.items() if one["problems"]} == {}
    assert all(one["lost"] == one["broken"] == 0 for one in writers.values())


def test_the_next_write_removes_what_a_killed_one_left(writers):
    assert {name: one["left"] for name, one in writers.items() if one["left"]} == {}


@pytest.fixture(scope="module")
def tunings(report_of):
    return report_of(FAULTS, "--only", "tune", "--kills", "6")["tune"]


def test_a_killed_tuning_goes_on_where_it_was(tunings):
    assert tunings["problems"] == []
    assert tunings["kills"] == 6
    assert tunings["runs"] >= 1  # the last one, which nobody kills, comes to its end
    assert tunings["finished"] > 0
    assert tunings["lost"] == 0
    assert tunings["repeated"] == 0
