"""What a plan says of the run that made it, besides the figures."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from autoq.workload import Workload


def autocast(device: str) -> dict[str, str]:
    """The dtype of ``torch.autocast`` where the caller is inside it: losses and times depend on it."""
    kind = device.partition(":")[0]
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return {"autocast": str(torch.get_autocast_dtype(kind))} if on else {}


def versions() -> dict[str, str]:
    """Package → version, of those that times and the search depend on."""
    found = {"torch": str(torch.__version__), "optuna": version("optuna")}
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    return found


def of_run(device: Mapping[str, Any], seed: int, request: Mapping[str, Any]) -> dict[str, Any]:
    """When, where and with what a run was made.

    Args:
        device: the fingerprint, as JSON values.
        seed: of the run.
        request: its settings, as JSON values.
    """
    return {
        "autoq": version("autoq"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "request": dict(request),
        "device": dict(device),
        "versions": versions(),
    }


def of_model(kind: str, weights: str, workload: Workload, left_alone: Mapping[str, Any]) -> dict[str, Any]:
    """Which model a plan is of.

    Args:
        kind: the model's class.
        weights: hash of every parameter and buffer.
        workload: its layers.
        left_alone: the weights that no plan can quantize, by kind.
    """
    shapes = json.dumps([(one.name, one.n, one.k) for one in workload.layers])
    return {
        "class": kind,
        "weights": weights,
        "shapes": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "layers": {one.name: {"n": one.n, "k": one.k, "dtype": one.dtype} for one in workload.quantizable},
        "left_alone": dict(left_alone),
    }


def kernels_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Scheme and shape → the kernel that was measured, as a plan records it."""
    return {
        f"{row['scheme']} M={row['m']} K={row['k']} N={row['n']} {row['dtype']}": row["kernel"]
        for row in rows
        if row["status"] == "ok"
    }
