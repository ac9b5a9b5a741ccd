"""The folder of a tuning: its plan and the tables that it rests on. Reports and explanations need no more."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from autoq import tables
from autoq.errors import CacheError, InputError
from autoq.plan import Plan
from autoq.workload import Workload

if TYPE_CHECKING:
    import pandas as pd

PLAN, WORKLOAD = "plan.json", "workload.json"
TABLES: Mapping[str, pa.Schema] = MappingProxyType(
    {
        "front.parquet": tables.FRONT,
        "costs.parquet": tables.COSTS,
        "measurements.parquet": tables.MEASUREMENTS,
        "sensitivity.parquet": tables.SENSITIVITY,
    }
)
_FIX = "Tune again with --output: what was measured is kept in the cache, so that this takes minutes at most."


class Result(Protocol):
    """What a report and an explanation are made of; ``autoq.tune`` returns one, ``Saved`` is one from files."""

    @property
    def plan(self) -> Plan:
        """The chosen plan with its provenance."""

    @property
    def workload(self) -> Workload:
        """What was recorded."""

    @property
    def notes(self) -> Sequence[str]:
        """What autoq decided by itself, in sentences."""

    @property
    def front(self) -> pd.DataFrame:
        """Columns of ``tables.FRONT``."""

    @property
    def costs(self) -> pd.DataFrame:
        """Columns of ``tables.COSTS``."""

    @property
    def measurements(self) -> pd.DataFrame:
        """Columns of ``tables.MEASUREMENTS``."""

    @property
    def sensitivity(self) -> pd.DataFrame:
        """Columns of ``tables.SENSITIVITY``."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A tuning read back from its folder.

    Attributes:
        plan: as it stands there; it may have been edited since.
        workload: what was recorded.
        notes: what autoq decided by itself, in sentences.
        read: file name → its table.
    """

    plan: Plan
    workload: Workload
    notes: tuple[str, ...]
    read: Mapping[str, pa.Table]

    @cached_property
    def front(self) -> pd.DataFrame:
        """Columns of ``tables.FRONT``."""
        return self._frame("front.parquet")

    @cached_property
    def costs(self) -> pd.DataFrame:
        """Columns of ``tables.COSTS``."""
        return self._frame("costs.parquet")

    @cached_property
    def measurements(self) -> pd.DataFrame:
        """Columns of ``tables.MEASUREMENTS``."""
        return self._frame("measurements.parquet")

    @cached_property
    def sensitivity(self) -> pd.DataFrame:
        """Columns of ``tables.SENSITIVITY``."""
        return self._frame("sensitivity.parquet")

    def _frame(self, name: str) -> pd.DataFrame:
        return tables.frame(self.read[name], TABLES[name])


def write_tables(result: Result, folder: Path) -> list[Path]:
    """Write the plan, the workload and the tables, each atomically; returns their paths.

    Raises:
        InputError: if the folder cannot be written.
        PlanError: the same, for the plan.
    """
    result.plan.save(folder / PLAN)
    result.workload.save(folder / WORKLOAD)
    frames = (result.front, result.costs, result.measurements, result.sensitivity)
    for (name, schema), frame in zip(TABLES.items(), frames, strict=True):
        content = pa.Table.from_pandas(frame, schema, preserve_index=False)
        tables.write(folder / name, content, InputError, note=_tag(result.plan))
    return [folder / name for name in (PLAN, WORKLOAD, *TABLES)]


def read_folder(folder: str | Path) -> Saved:
    """Read what ``write_tables`` wrote. The plan may have been edited since; the tables are those of its tuning.

    Raises:
        InputError: if a file is missing, damaged, or of another tuning than the plan.
        PlanError: if the plan cannot be read.
    """
    folder = Path(folder)
    missing = [name for name in (PLAN, WORKLOAD, *TABLES) if not (folder / name).is_file()]
    if missing:
        there = folder.is_dir()
        got = f"no {', no '.join(missing)}" if there else "no such folder"
        fix = _FIX if there else "Give the folder that `autoq tune --output` wrote; without --output it is autoq-out."
        raise InputError("a tuning's folder has its plan and its tables", where=str(folder), got=got, fix=fix)
    plan = Plan.load(folder / PLAN)
    workload = Workload.load(folder / WORKLOAD)
    read = {name: _table(folder / name, schema, plan) for name, schema in TABLES.items()}
    return Saved(plan=plan, workload=workload, notes=tuple(plan.provenance.get("notes", ())), read=read)


def _tag(plan: Plan) -> dict[str, Any]:
    """What tells tunings apart, edited plans included."""
    return {name: plan.provenance.get(name) for name in ("created", "study")}


def _table(path: Path, schema: pa.Schema, plan: Plan) -> pa.Table:
    try:
        content, note = tables.read_noted(path, schema)
    except CacheError as problem:
        raise InputError(problem.rule, where=problem.where, got=problem.got, fix=_FIX) from problem
    if note.decode(errors="replace") != json.dumps(_tag(plan), sort_keys=True):
        raise InputError("the tables are of the tuning that wrote plan.json", where=str(path), got="another", fix=_FIX)
    return content
