"""Predicts a plan's end-to-end time from isolated times and a few whole-model measurements."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoq.errors import CacheError
from autoq.scheme import NONE, Scheme
from autoq.workload import Workload

Assignment = Mapping[str, Scheme]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyModel:
    """Time per pass of a phase = fixed part + Σ over layers of factor(scheme) × isolated time.

    Isolated times miss what surrounds a layer (fusion, caches, dispatch), so each phase has its own fixed part and
    each scheme its own factor, fitted to whole-model times of uniform plans.

    Attributes:
        isolated_us: (layer, scheme, phase) → isolated time per pass, at the baseline's level.
        fixed_us: phase → time outside the linear layers.
        factors: (phase, scheme) → factor.
        calls: phase → passes per request.
        error: phase → largest relative error on the plans it was fitted to.
    """

    isolated_us: Mapping[tuple[str, Scheme, str], float]
    fixed_us: Mapping[str, float]
    factors: Mapping[tuple[str, Scheme], float]
    calls: Mapping[str, float]
    error: Mapping[str, float]

    def layer_us(self, layer: str, scheme: Scheme, phase: str) -> float:
        """One layer's part of a pass, corrected."""
        factor = self.factors.get((phase, scheme), 1.0)
        return factor * self.isolated_us.get((layer, scheme, phase), 0.0)

    def pass_us(self, assignment: Assignment, layers: Iterable[str], phase: str) -> float:
        """One pass of a phase under a plan."""
        linear = sum(self.layer_us(layer, assignment.get(layer, NONE), phase) for layer in layers)
        return self.fixed_us[phase] + linear

    def request_us(self, assignment: Assignment, layers: Iterable[str]) -> float:
        """One request: the sum over phases of calls × pass."""
        layers = tuple(layers)
        return sum(calls * self.pass_us(assignment, layers, phase) for phase, calls in self.calls.items())


def isolated_times(
    workload: Workload, rows: Sequence[Mapping[str, Any]], schemes: Sequence[Scheme]
) -> dict[tuple[str, Scheme, str], float]:
    """Isolated time per pass of every (layer, scheme, phase) that the measurements cover.

    Each time is the scheme's ratio to the unquantized layer of its own window, times one baseline per shape: windows
    differ, ratios less so. A scheme that is not ``ok`` on one of a layer's shapes is absent for that layer.

    Raises:
        CacheError: if a shape of the workload was not measured at all.
    """
    table = {(r["m"], r["k"], r["n"], r["dtype"], r["bias"], r["scheme"]): r for r in rows}
    times: dict[tuple[str, Scheme, str], float] = {}
    for layer in workload.quantizable:
        for scheme in schemes:
            parts = dict.fromkeys((phase.name for phase in workload.phases), 0.0)
            for call in workload.calls_of(layer.name):
                shape = (call.m, layer.k, layer.n, call.dtype, layer.bias)
                base = table.get((*shape, str(NONE)))
                if base is None or base["status"] != "ok":
                    got = f"{shape}: {'no row' if base is None else base['reason']}"
                    raise CacheError("every shape is measured unquantized", where=layer.name, got=got)
                row = table.get((*shape, str(scheme)))
                if row is None or row["status"] != "ok":
                    break
                parts[call.phase] += call.count * row["ratio"] * base["baseline_us"]
            else:
                times.update({(layer.name, scheme, phase): time for phase, time in parts.items()})
    return times


def fit_latency(
    workload: Workload,
    isolated: Mapping[tuple[str, Scheme, str], float],
    measured: Sequence[tuple[Assignment, Mapping[str, float]]],
) -> LatencyModel:
    """Fit the fixed part and the factors of each phase.

    Args:
        workload: its quantizable layers and phases.
        isolated: as ``isolated_times`` gives.
        measured: (assignment, phase → time of one pass in µs); the unquantized model among them.

    With one measurement per scheme and one unknown more, the common factor is the least-squares one, and each scheme's
    own factor then meets its uniform plan's time exactly: mixed plans are interpolated between uniform ones.
    """
    layers = [layer.name for layer in workload.quantizable]
    fixed: dict[str, float] = {}
    factors: dict[tuple[str, Scheme], float] = {}
    errors: dict[str, float] = {}
    for phase in workload.phases:
        sums = [
            {s: v for s, v in _sums(isolated, assignment, layers, phase.name).items() if v > 0}
            for assignment, _ in measured
        ]
        times = np.array([found[phase.name] for _, found in measured])
        fixed[phase.name], common = _line(np.array([sum(one.values()) for one in sums]), times)
        for one in sums:
            factors.update({(phase.name, scheme): common for scheme in one if (phase.name, scheme) not in factors})
        _refine(phase.name, sums, times, fixed[phase.name], factors)
        errors[phase.name] = max(
            (
                abs(fixed[phase.name] + sum(factors[phase.name, s] * v for s, v in one.items()) - t) / t
                for one, t in zip(sums, times, strict=True)
            ),
            default=0.0,
        )
    return LatencyModel(
        isolated_us=dict(isolated),
        fixed_us=fixed,
        factors=factors,
        calls={phase.name: phase.calls for phase in workload.phases},
        error=errors,
    )


def _sums(
    isolated: Mapping[tuple[str, Scheme, str], float], assignment: Assignment, layers: Sequence[str], phase: str
) -> dict[Scheme, float]:
    found: dict[Scheme, float] = {}
    for layer in layers:
        scheme = assignment.get(layer, NONE)
        found[scheme] = found.get(scheme, 0.0) + isolated.get((layer, scheme, phase), 0.0)
    return found


def _line(sums: np.ndarray, times: np.ndarray) -> tuple[float, float]:
    """Non-negative intercept and slope of times over isolated sums, fitted to relative errors."""
    weights = 1 / times
    if len(times) == 1 or np.ptp(sums) < 1e-9:
        slope = min(1.0, float(times[0] / sums[0])) if sums[0] > 0 else 1.0
        return float(max(0.0, times[0] - slope * sums[0])), slope
    matrix = np.stack([np.ones_like(sums), sums], axis=1) * weights[:, None]
    (intercept, slope), *_ = np.linalg.lstsq(matrix, times * weights, rcond=None)
    # The linear layers take some time, and not more than the whole.
    slope = float(np.clip(slope, 0.2, (times / np.maximum(sums, 1e-9)).min()))
    intercept = float(np.clip(np.median(times - slope * sums), 0.0, times.min()))
    return intercept, slope


def _refine(
    phase: str,
    sums: Sequence[Mapping[Scheme, float]],
    times: np.ndarray,
    fixed: float,
    factors: dict[tuple[str, Scheme], float],
) -> None:
    """Let each scheme's factor meet the plans that consist mostly of it, most uniform first."""
    for one, time in sorted(zip(sums, times, strict=True), key=lambda pair: len(pair[0])):
        if not one:
            continue
        main = max(one, key=lambda scheme: one[scheme])
        if one[main] < 0.8 * sum(one.values()):
            continue
        rest = sum(factors[phase, scheme] * value for scheme, value in one.items() if scheme != main)
        factors[phase, main] = max(0.05, float(time - fixed - rest) / one[main])
