"""Every reader of autoq's files, a valid sample of what it reads, and how to seal a changed checkpoint again."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from fault_bench import writers

import autoq
from autoq import tables
from autoq.cache import Fingerprint, ProfileCache, SensitivityCache, housekeeping, sharing
from autoq.plan import Plan
from autoq.workload import Workload

transformers.LlamaForCausalLM  # noqa: B018 - imported here, so that the processes that read need not

PIECE_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A reader.

    Attributes:
        make: writes a valid sample into an empty folder.
        read: reads it.
        errors: what it may raise; all are AutoqErrors.
        sealed: the checkpoint within the folder whose hashes an attacker would make fit.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    errors: tuple[str, ...]
    sealed: str = ""
    files: tuple[str, ...] = field(default=("*",))


def _make_caches(folder: Path) -> None:
    writers.append_profile(folder, 1)
    writers.append_profile(folder, 2)
    writers.append_scores(folder, 1)
    writers.keep_baseline(folder, 1)


def _make_export(folder: Path) -> None:
    writers.append_profile(folder / "cache", 1)
    key = Fingerprint.current("cpu").device_key
    sharing.export_profile(sharing.find(folder / "cache", key), folder / "export.parquet")


def _import(folder: Path) -> None:
    sharing.import_profile(folder / "other", folder / "export.parquet")


def _look_after(folder: Path) -> None:
    housekeeping.check(folder)
    housekeeping.prune(folder, [Fingerprint.current("cpu")], dry_run=True)


def _run_checkpoint(folder: Path) -> None:
    """Load it, and run the kernels on what was loaded."""
    found = autoq.load_quantized(lambda: writers.model(0), folder / "checkpoint")
    found(torch.ones(3, 64))


def _read_sensitivity(folder: Path) -> None:
    cache = SensitivityCache(folder, writers.IDENTITY)
    cache.rows()
    cache.baseline()


def _make_shards(folder: Path) -> None:
    autoq.save_quantized(writers.quantized(1), folder / "checkpoint", max_shard_bytes=8192)


def _make_hugging_face(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, max_position_embeddings=64)
    model = transformers.LlamaForCausalLM(config)
    autoq.apply(model, Plan(layers={"model.layers.0.mlp.up_proj": "int4wo-hqq(group_size=32)"}))
    autoq.save_quantized(model, folder / "checkpoint")


def _run_hugging_face(folder: Path) -> None:
    autoq.hf.load(folder / "checkpoint")(torch.ones(1, 3, dtype=torch.long))


READERS = {
    "plan": Reader(
        make=lambda folder: writers.plan(1).save(folder / "plan.json"),
        read=lambda folder: Plan.load(folder / "plan.json"),
        errors=("PlanError", "CandidateError"),
    ),
    "workload": Reader(
        make=lambda folder: writers.workload(1).save(folder / "workload.json"),
        read=lambda folder: Workload.load(folder / "workload.json"),
        errors=("InputError",),
    ),
    "table": Reader(
        make=lambda folder: writers.write_table(folder, 1),
        read=lambda folder: tables.read(folder / "table.parquet", tables.SENSITIVITY),
        errors=("CacheError",),
    ),
    "profile cache": Reader(
        make=_make_caches,
        read=lambda folder: ProfileCache(folder, Fingerprint.current("cpu")).rows(),
        errors=("CacheError",),
        files=("profiles/*/*",),
    ),
    "sensitivity cache": Reader(
        make=_make_caches, read=_read_sensitivity, errors=("CacheError",), files=("sensitivity/*/*",)
    ),
    "calibration": Reader(
        make=lambda folder: writers.calibrate(folder, 1),
        read=lambda folder: writers.calibrate(folder, 1),
        errors=("CacheError", "read"),  # what is damaged is measured again
        files=("calibration/*",),
    ),
    "cache check": Reader(make=_make_caches, read=_look_after, errors=("CacheError", "read"), files=("*/*/*",)),
    "exported profile": Reader(make=_make_export, read=_import, errors=("CacheError",), files=("export.parquet",)),
    "checkpoint": Reader(
        make=lambda folder: writers.save_checkpoint(folder, 1),
        read=_run_checkpoint,
        errors=("CheckpointError", "PlanError", "CandidateError"),
        sealed="checkpoint",
        files=("checkpoint/*",),
    ),
    "sharded checkpoint": Reader(
        make=_make_shards,
        read=_run_checkpoint,
        errors=("CheckpointError", "PlanError", "CandidateError"),
        sealed="checkpoint",
        files=("checkpoint/*",),
    ),
    "transformers checkpoint": Reader(
        make=_make_hugging_face,
        read=_run_hugging_face,
        errors=("CheckpointError", "PlanError", "CandidateError"),
        sealed="checkpoint",
        files=("checkpoint/*",),
    ),
    "study journal": Reader(
        make=lambda folder: writers.publish_study(folder, 1), read=writers.read_study, errors=("SearchError",)
    ),
}


def targets(reader: Reader, folder: Path) -> list[Path]:
    """The files of a sample that an attacker can change."""
    found = {path for pattern in reader.files for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.name != ".lock")


def seal(checkpoint: Path) -> None:
    """Make a changed checkpoint's hashes fit again, as far as its manifest can be understood."""
    path = checkpoint / "autoq.json"
    try:
        manifest: Any = json.loads(path.read_text())
        for name, identity in manifest["files"].items():
            if not (checkpoint / name).is_file() or (checkpoint / name).stat().st_size > 1 << 28:
                continue
            data = (checkpoint / name).read_bytes()
            pieces = range(0, len(data), PIECE_BYTES)
            identity["bytes"] = len(data)
            identity["sha256"] = [hashlib.sha256(data[at : at + PIECE_BYTES]).hexdigest() for at in pieces]
        manifest.pop("sha256", None)
        canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        manifest["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
        path.write_text(json.dumps(manifest))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return
