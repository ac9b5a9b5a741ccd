"""What is seen of the stages: the time left, the best plan so far, lines where there is no terminal."""

import io

import pytest
from rich.console import Console

from autoq import progress_bars
from autoq.progress_bars import Progress, time_left


@pytest.mark.parametrize(
    ("spent", "done", "left", "text"),
    [
        (10.0, 0, 5, ""),
        (10.0, 5, 0, ""),
        (10.0, 5, 5, "about 10 s left"),
        (60.0, 1, 9, "about 9 min left"),
        (3600.0, 1, 2, "about 2.0 h left"),
    ],
)
def test_the_time_left_goes_on_as_so_far(spent, done, left, text):
    assert time_left(spent, done, left) == text


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(progress_bars.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_at_most_every_twenty_seconds_for_each_stage(clock):
    stream = io.StringIO()
    with Progress(Console(file=stream, width=40)) as progress:
        progress("profile", "M=1 K=64 N=[64]", 3, 10)
        clock[0] = 10.0
        progress("profile", "not said", 4, 10)
        progress("search", "int8wo: 1 ms; best so far int8wo: 1 ms, 0.1 MB, loss +0.01", 1, 4)
        clock[0] = 21.0
        progress("profile", "M=2 K=64 N=64", 6, 10)
        clock[0] = 60.0
        progress("profile", "", 10, 10)
    assert stream.getvalue().splitlines() == [
        "[    0 s] profile 3/10 M=1 K=64 N=[64]",
        "[   10 s] search 1/4 int8wo: 1 ms; best so far int8wo: 1 ms, 0.1 MB, loss +0.01",
        "[   21 s] profile 6/10, about 28 s left M=2 K=64 N=64",
    ]


def test_a_terminal_shows_a_bar_for_each_stage_and_what_happens_below(clock):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, height=30)
    with Progress(console) as progress:
        progress("profile", "M=1 K=64 N=64", 0, 4)
        clock[0] = 8.0
        progress("profile", "M=2 K=64 N=64", 1, 4)
        progress("search", "iter: 2 ms; best so far [int8wo]: 1 ms", 2, 4)
        progress._live.refresh()
    shown = stream.getvalue()
    assert "about 24 s left" in shown
    assert "best so far [int8wo]: 1 ms" in shown
    final = shown.rpartition("profile")[2]
    assert "search" in final
    assert "best so far" not in final
