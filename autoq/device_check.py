"""What of a plan holds on this device: which of its times are stale, and which of its schemes have no kernel here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from autoq.cache import Fingerprint
from autoq.candidates.base import load_kernels
from autoq.plan import Plan
from autoq.scheme import NONE, Scheme

_LABELS = {"isa": "instruction sets", "triton": "Triton"}  # of a fingerprint's parts whose names do not say it


def stale_figures(plan: Plan, device: str) -> tuple[str, ...]:
    """What the plan says of latency and does not hold on a device, in sentences; empty if it says nothing of it.

    Args:
        plan: its provenance tells where its times come from.
        device: the model's, such as ``"cpu"``, with or without an index.
    """
    then = plan.provenance.get("device")
    figures = {name: plan.provenance.get(name) or {} for name in ("measured", "predicted")}
    how = next((name for name, found in figures.items() if found.get("latency_us") is not None), None)
    if not then or how is None:
        return ()
    return tuple(f"latency was {how} {text}" for text in _differences(then, Fingerprint.current(device)))


def _differences(then: Mapping[str, Any], now: Fingerprint) -> Iterable[str]:
    here = now.to_json()
    if any(then.get(name, here[name]) != here[name] for name in ("device", "name")):
        yield f"on {_named(then)}, not on {_named(here)}"
        return
    # Parts that an older plan does not have, or that times do not depend on here, are not compared.
    parts = {**now.hardware(), **now.conditions()}
    for name, part in parts.items():
        if part in ("", 0) or then.get(name, part) == part:
            continue
        if name == "kernels":
            yield "with another version of autoq's kernels"
        else:
            yield f"with {_LABELS.get(name, name)} {then[name]}, not with {part}"


def _named(device: Mapping[str, Any]) -> str:
    threads = f" ({device['threads']} threads)" if device.get("device") == "cpu" and "threads" in device else ""
    return f"{device.get('name') or device.get('device') or 'another device'}{threads}"


def without_kernels(schemes: Iterable[tuple[Scheme, str]]) -> tuple[str, ...]:
    """The schemes that no compiled kernel runs, in sentences; ``none`` is always fast.

    Args:
        schemes: of each layer, with its device.
    """
    found = Counter(one for one in schemes if one[0] != NONE and not load_kernels(torch.device(one[1])))
    return tuple(
        f"{count} layer{'s' if count > 1 else ''} in {scheme}: {_reason(device)}; each call dequantizes the weight"
        for (scheme, device), count in found.items()
    )


def _reason(device: str) -> str:
    kind = torch.device(device).type
    if kind == "cuda":
        return "Triton is not installed"
    if kind != "cpu":
        return f"autoq has no kernels for {kind}"
    from autoq_kernels.cpu import build

    return build.status().reason or "no compiled kernels"
