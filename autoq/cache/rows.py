"""What the rows of the caches say, checked column by column: a file can be sound and still hold nonsense."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from autoq._files import shown
from autoq.errors import CandidateError
from autoq.scheme import Scheme

_STATUS = ("ok", "unsupported", "wrong", "error")
_MAX_SIDE = 1 << 24  # of a shape
_MAX_TIME_US = 1e12  # eleven days; of a ratio too
_WORD = re.compile(r"[a-z0-9_]{1,40}")


class Fault(NamedTuple):
    """The first row that autoq would not have written, and what is wrong with it."""

    row: int
    text: str


def fault_in_measurements(content: pa.Table, device: str) -> Fault | None:
    """What is wrong with rows of the measurements.

    Args:
        content: the rows.
        device: key of the device that all of them were measured on.
    """
    here: Mapping[str, Callable[[Any], bool]] = {"device": lambda one: one == device, "origin": lambda one: one == ""}
    found = _fault_in_values(content, {**here, **_MEASUREMENT})
    if found is not None:
        return found
    time, baseline, ratio = (_numbers(content, name) for name in ("time_us", "baseline_us", "ratio"))
    with np.errstate(all="ignore"):
        usable = np.isfinite(time + baseline + ratio) & (time > 0) & (baseline > 0) & (ratio > 0)
        usable &= (time <= _MAX_TIME_US) & (baseline <= _MAX_TIME_US) & (ratio <= _MAX_TIME_US)
        usable &= np.isclose(ratio, time / baseline, rtol=1e-6, atol=0.0)
    wrong = ~usable & pc.equal(content["status"], "ok").to_numpy()
    return _first(wrong, content, ("time_us", "baseline_us", "ratio"))


def fault_in_scores(content: pa.Table) -> Fault | None:
    """What is wrong with rows of the sensitivity table."""
    found = _fault_in_values(content, _SCORE)
    if found is not None:
        return found
    score, measured, low, high = (_numbers(content, name) for name in ("score", *_MEASURED))
    known = pc.is_valid(content["measured"]).to_numpy()
    with np.errstate(all="ignore"):
        # An interval of a bootstrap need not contain the mean; where all of it is above zero, the mean is too.
        usable = np.isfinite(measured + low + high) & (low <= high) & ((low <= 0) | (measured > 0))
    wrong = (known & ~(usable & pc.is_valid(content["score"]).to_numpy())) | (score < 0)
    return _first(wrong, content, ("score", *_MEASURED))


_MEASURED = ("measured", "measured_low", "measured_high")


def _fault_in_values(content: pa.Table, checks: Mapping[str, Callable[[Any], bool]]) -> Fault | None:
    """Look at each distinct value of the columns once."""
    for name, fine in checks.items():
        for value in content[name].unique().to_pylist():
            if not fine(value):
                return Fault(content[name].to_pylist().index(value), f"{name} = {shown(value)}")
    return None


def _numbers(content: pa.Table, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A column of reals; NaN for null."""
    return np.asarray(content[name].to_numpy(), dtype=np.float64)


def _first(wrong: np.ndarray[Any, Any], content: pa.Table, names: tuple[str, ...]) -> Fault | None:
    rows = np.flatnonzero(wrong)
    if not len(rows):
        return None
    row = int(rows[0])
    return Fault(row, f"{', '.join(names)} = {', '.join(str(content[name][row].as_py()) for name in names)}")


def _is_side(value: int | None) -> bool:
    return value is not None and 0 < value <= _MAX_SIDE


def _is_line(value: str | None) -> bool:
    return value is not None and value.isprintable()


@cache
def _is_scheme(value: str | None) -> bool:
    try:
        Scheme.parse(value or "")
    except CandidateError:
        return False
    return True


_MEASUREMENT: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("m", "k", "n"), _is_side),
    "bias": lambda one: one is not None,
    "dtype": lambda one: _WORD.fullmatch(one or "") is not None,
    "scheme": _is_scheme,
    "status": lambda one: one in _STATUS,
    "reason": lambda one: one is not None,
    "threads": lambda one: one is not None and one >= 0,
    **dict.fromkeys(("kernel", "torch", "triton", "runtime", "kernels", "compile"), _is_line),
}
_SCORE: Mapping[str, Callable[[Any], bool]] = {"layer": lambda one: one is not None, "scheme": _is_scheme}
