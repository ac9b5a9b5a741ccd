"""Chooses how a product runs on a GPU: every choice is checked, timed, and the fastest right one is kept.

Legend: M rows of the activation, K inputs, N outputs.

Timing goes in two passes. Most choices are far from the fastest, and a few calls show it: the quick pass gives every
choice some rounds. Only those near its fastest are timed again, with the rest of the budget, so that what decides
between neighbours is a median of many calls in one window.
"""

from __future__ import annotations

import datetime
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from autoq_kernels import layout, ops, tolerance
from autoq_kernels.layout import Header
from autoq_kernels.triton import products
from autoq_kernels.triton.configs import dynamic, m_bucket
from autoq_kernels.triton.products import Choice
from autoq_kernels.triton.store import Product, Record, Store, Trial
from autoq_kernels.triton.timing import time_interleaved
from autoq_kernels.triton.weight import Weight

_log = logging.getLogger(__name__)
TimeFunction = Callable[..., Mapping[str, Sequence[float]]]

_FINALISTS = 4
_NEAR = 1.25  # times the quick pass's fastest: its medians of few calls are not off by more
_QUICK_ROUNDS = (3, 10)  # at least, at most
_FINAL_ROUNDS = (5, 100)
_QUICK_SHARE = 0.4  # of the budget
_ROWS = 2048  # of the weight that the reference decodes at once
_SEED = 0
PLAIN = "default"


class TuningError(RuntimeError):
    """No choice of a product compiles, runs and gives the right result."""


class Tuner:
    """Finds and remembers the fastest choice of each product on one device.

    Args:
        store: of that device.
        time: called as ``timing.time_interleaved`` is, returns name → microseconds of single calls.
    """

    def __init__(self, store: Store, time: TimeFunction = time_interleaved) -> None:
        self._store = store
        self._time = time
        self._known: dict[tuple[Header, int, bool, torch.dtype, bool], Choice | None] = {}

    def tuned(self, form: Header, m: int, dtype: torch.dtype, has_column_scale: bool) -> Choice | None:
        """The stored choice of a product; None where it was not tuned. Nothing is run or compiled.

        Args:
            form: of the weight.
            m: rows of x; those of one `configs.m_bucket` share a choice.
            dtype: of x.
            has_column_scale: whether the weight has one.
        """
        key = (form, m_bucket(m), dynamic(form, m), dtype, has_column_scale)
        if key not in self._known:
            self._known[key] = self._stored(Product.of(form, m, dtype, has_column_scale=has_column_scale))
        return self._known[key]

    def tune(self, weight: Weight, m: int, dtype: torch.dtype, *, budget_s: float) -> Choice:
        """The fastest choice whose result is right: the stored one, or found now and stored.

        Args:
            weight: [N, K], on the device.
            m: rows of x.
            dtype: of x.
            budget_s: for timing, about; compiling and checking the choices come on top.

        Raises:
            TuningError: no choice works; the message has every reason.
        """
        has_column_scale = weight.form.column_scale_offset != 0
        known = self.tuned(weight.form, m, dtype, has_column_scale)
        if known is not None:
            return known
        product = Product.of(weight.form, m, dtype, has_column_scale=has_column_scale)
        offered = products.choices(weight.form, m, dtype, has_column_scale=has_column_scale)
        prepared = set(weight.prepared)
        x_MK = _activation(m, weight, dtype)
        with torch.cuda.device(x_MK.device) if x_MK.is_cuda else nullcontext():
            trials = _check(offered, x_MK, weight)
        right = [choice for choice in offered if trials[choice.label].status == "ok"]
        if not right:
            reasons = "; ".join(f"{label}: {one.reason}" for label, one in trials.items())
            raise TuningError(f"no choice for {product.file_name.removesuffix('.json')} works: {reasons}")
        runs = {choice: functools.partial(products.multiply, choice, x_MK, weight, None) for choice in right}
        finalists = self._time_into(trials, runs, x_MK.device, budget_s)
        best = min(finalists, key=lambda choice: _us(trials[choice.label]))
        if best.method != products.INT4PACK:  # a second copy of the weight, made to try it
            for name in set(weight.prepared) - prepared:
                del weight.prepared[name]
        self._keep(product, best, trials)
        self._known.clear()  # it remembers that there was none
        return best

    def forget(self) -> None:
        """See what other processes stored since."""
        self._known.clear()
        self._store.forget()

    def _time_into(
        self,
        trials: dict[str, Trial],
        runs: Mapping[Choice, Callable[[], object]],
        device: torch.device,
        budget_s: float,
    ) -> list[Choice]:
        """Both passes: writes medians into ``trials``; returns the choices of the last pass."""

        def measure(choices: Sequence[Choice], seconds: float, rounds: tuple[int, int]) -> None:
            found = self._time(
                {choice.label: runs[choice] for choice in choices},
                budget_s=seconds,
                device=device,
                # The plain definition reads the weight's header, which waits for the device: no graph can hold that.
                graphs=[choice.label for choice in choices if choice.method != products.PLAIN],
                min_rounds=rounds[0],
                max_rounds=rounds[1],
            )
            for label, times in found.items():
                trials[label] = replace(trials[label], median_us=median(times), repeats=len(times))

        choices = list(runs)
        if len(choices) == 1:
            measure(choices, budget_s, _FINAL_ROUNDS)
            return choices
        measure(choices, _QUICK_SHARE * budget_s, _QUICK_ROUNDS)
        ranked = sorted(choices, key=lambda choice: _us(trials[choice.label]))
        limit = _NEAR * _us(trials[ranked[0].label])
        finalists = [choice for choice in ranked[:_FINALISTS] if _us(trials[choice.label]) <= limit]
        measure(finalists, (1 - _QUICK_SHARE) * budget_s, _FINAL_ROUNDS)
        return finalists

    def _stored(self, product: Product) -> Choice | None:
        record = self._store.read(product)
        if record is None:
            return None
        try:
            return Choice.from_json(record.choice)
        except (ValueError, TypeError, KeyError) as problem:
            _log.warning("%s is not used, the product counts as not tuned: %s", self._store.path(product), problem)
            return None

    def _keep(self, product: Product, best: Choice, trials: Mapping[str, Trial]) -> None:
        winner = trials[best.label]
        others = sorted((one for one in trials.values() if one is not winner), key=_us)
        record = Record(
            choice=best.to_json(),
            median_us=_us(winner),
            repeats=winner.repeats,
            trials=(winner, *others),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        self._store.write(product, record)


def _us(trial: Trial) -> float:
    return math.inf if trial.median_us is None else trial.median_us


def _activation(m: int, weight: Weight, dtype: torch.dtype) -> Tensor:
    """The x [M, K] that choices are checked and timed on: the same numbers every time."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(m, weight.form.k, generator=generator).to(weight.head.device, dtype)


def _check(choices: Sequence[Choice], x_MK: Tensor, weight: Weight) -> dict[str, Trial]:
    """Run every choice once, which compiles it, and compare its result; by label, in the given order."""
    limit = tolerance.limit(x_MK.dtype, x_MK.device)
    expected_MN = reference(x_MK, weight)
    trials = {}
    for choice in choices:
        try:
            error = _relative_rms(products.multiply(choice, x_MK, weight, None), expected_MN)
        except Exception as problem:  # whatever compiling or running it meets: the others are still there
            reason = f"{type(problem).__name__}: {_first_line(problem)}"
            _log.info("%s does not run: %s", choice.label, reason)
            trials[choice.label] = Trial(choice=choice.label, status="error", reason=reason)
            continue
        trial = Trial(choice=choice.label, status="ok", error=error if math.isfinite(error) else None)
        if not error <= limit:
            _log.warning("%s gives wrong results: relative RMS %.2e above %.0e", choice.label, error, limit)
            trial = replace(trial, status="wrong", reason=f"relative RMS {error:.2e} above {limit:.0e}")
        trials[choice.label] = trial
    return trials


def _first_line(problem: Exception) -> str:
    return next((line for line in str(problem).splitlines() if line.strip()), "")


def reference(x_MK: Tensor, weight: Weight) -> Tensor:
    """The product in plain PyTorch, some rows of the weight at a time: float32 [M, N].

    Sums are float64, or exact where x is rounded: they do not depend on torch's settings for float32 products.
    """
    form = weight.form
    data = layout.buffer(weight.head)
    expected_MN = x_MK.new_empty(len(x_MK), form.n, dtype=torch.float32)
    for start in range(0, form.n, _ROWS):
        rows = slice(start, min(start + _ROWS, form.n))
        head = _some_rows(data, rows)[: layout.HEADER_BYTES]
        count = rows.stop - rows.start
        if dynamic(form, len(x_MK)):
            expected_MN[:, rows] = ops.linear(x_MK.float(), head, None, count)
        else:
            expected_MN[:, rows] = (x_MK.double() @ ops.dequantize(head, count, form.k).double().T).float()
    return expected_MN


def _some_rows(data: Tensor, rows: slice) -> Tensor:
    """The buffer of a slice of a weight's rows."""
    form, parts = layout.header(data), layout.sections(data)
    if "codes" in parts:
        codes = parts["codes"][rows]
    else:
        shift, codes = 0, torch.zeros((), dtype=torch.uint8, device=data.device)
        for bits in layout.PLANES[form.bits]:
            codes = codes | (layout.unpack_plane(parts[f"codes_{bits}"][rows], bits) << shift)
            shift += bits
    built: Tensor = layout.build(
        kind=form.kind,
        bits=form.bits,
        n=rows.stop - rows.start,
        k=form.k,
        codes=codes,
        group_size=form.group_size,
        activation_bits=form.activation_bits,
        m_switch=form.m_switch,
        column_scale=parts.get("column_scale"),
        **{name: parts[name][rows] for name in ("scale", "minimum", "row_scale") if name in parts},
    )
    return built


def _relative_rms(actual_MN: Tensor, expected_MN: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; 0 where both are zero."""
    off = float(torch.linalg.vector_norm(actual_MN.float() - expected_MN, dtype=torch.float64))
    power = float(torch.linalg.vector_norm(expected_MN, dtype=torch.float64))
    return off / power if power else (off and math.inf)
