"""Measured losses of plans, kept in a file: no part measures a plan again, and an interruption loses one at most."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from autoq.evaluation import LossMeter, model_losses, paired
from autoq.losses import Batch
from autoq.scheme import NONE, Scheme
from autoq.search import Evaluation
from autoq.studies import digest

ROW_TOKENS = 512
UNIT_TOKENS = 4096  # tokens of one evaluation, as they are counted


class LossStore:
    """A JSONL file of plan hash → change of the loss per row, for the first rows of one text.

    Several processes may append at the same time: a line is one write, and lines of others are seen before anything
    is measured. A line that a killed process left unfinished is skipped.

    Args:
        path: of the file.
        identity: what losses depend on besides the plan; lines of others are not seen.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        self._offset = 0
        self._known: dict[str, list[float]] = {}

    def get(self, plan: str, rows: int) -> list[float] | None:
        """The first rows' changes; None if fewer were measured."""
        if len(self._known.get(plan, ())) < rows:
            self._read()
        known = self._known.get(plan, [])
        return known[:rows] if len(known) >= rows else None

    def known(self, plan: str) -> list[float]:
        """The changes of as many rows as were measured."""
        self._read()
        return list(self._known.get(plan, ()))

    def put(self, plan: str, losses: Sequence[float], **note: Any) -> None:
        """Add a plan's rows, from the first on."""
        line = json.dumps({"of": self.identity, "plan": plan, "losses": list(losses), **note}, separators=(",", ":"))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as stream:
            if stream.tell() and not self._ends_whole():
                line = "\n" + line
            os.write(stream.fileno(), (line + "\n").encode())
        self._known[plan] = list(losses)

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) == b"\n"

    def _read(self) -> None:
        """Take in the whole lines that were added since."""
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            stream.seek(self._offset)
            content = stream.read()
        whole = content.rfind(b"\n") + 1
        self._offset += whole
        for line in content[:whole].splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if found["of"] == self.identity and len(found["losses"]) > len(self._known.get(found["plan"], ())):
                self._known[found["plan"]] = found["losses"]


class Measurer:
    """Losses of plans of one model on the first rows of its text, through the store.

    Attributes:
        measured_tokens: tokens really evaluated by this process.
        asked_tokens: tokens that were asked for, those found in the store included: what a search costs.

    Args:
        meter: of a tuning; its batches are used, not its fidelities.
        store: where losses are kept.
    """

    def __init__(self, meter: LossMeter, store: LossStore) -> None:
        self._meter, self._store = meter, store
        self._baseline: dict[int, float] = {}
        self.measured_tokens = 0
        self.asked_tokens = 0

    def changes(self, schemes: Mapping[str, str], rows: int) -> list[float]:
        """Change of the NLL per row against the unquantized model, for the first ``rows`` rows."""
        self.asked_tokens += rows * ROW_TOKENS
        if all(one == str(NONE) for one in schemes.values()):
            return [0.0] * rows
        key = digest(dict(schemes))
        found = self._store.get(key, rows)
        if found is None:
            known = self._store.known(key)
            plan = {layer: Scheme.parse(one) for layer, one in schemes.items()}
            found = [*known, *self._measure(plan, len(known), rows)]
            self._store.put(key, found)
        return found[:rows]

    def evaluation(self, schemes: Mapping[str, str], rows: int) -> Evaluation:
        """The mean change with its interval."""
        changes = self.changes(schemes, rows)
        return as_evaluation(changes)

    def _measure(self, plan: Mapping[str, Scheme], begin: int, end: int) -> list[float]:
        baseline = self._losses({}, begin, end)
        losses = self._losses(plan, begin, end)
        return [loss - base for loss, base in zip(losses, baseline, strict=True)]

    def _losses(self, plan: Mapping[str, Scheme], begin: int, end: int) -> list[float]:
        """NLL of each row; the unquantized model's are measured once."""
        if not plan and all(row in self._baseline for row in range(begin, end)):
            return [self._baseline[row] for row in range(begin, end)]
        batches = self._rows(begin, end)
        shadow = self._meter.shadow
        shadow.assign(plan)
        with shadow.exact_products():
            losses: Tensor = model_losses(shadow.model, batches, self._meter.metric)
        found = [float(one) for one in losses.double()]
        self.measured_tokens += len(found) * ROW_TOKENS
        if not plan:
            self._baseline |= dict(zip(range(begin, end), found, strict=True))
        return found

    def _rows(self, begin: int, end: int) -> list[Batch]:
        """The batches that hold exactly these rows."""
        chosen, seen = [], 0
        for batch in self._meter.batches:
            rows = batch.kwargs["input_ids"].shape[0]
            if begin <= seen and seen + rows <= end:
                chosen.append(batch)
            seen += rows
        if sum(batch.kwargs["input_ids"].shape[0] for batch in chosen) != end - begin:
            raise ValueError(f"rows {begin} to {end} are no whole batches")
        return chosen


def as_evaluation(changes: Sequence[float]) -> Evaluation:
    """Changes per row as the search takes them, with their bootstrap interval."""
    import torch

    vector = torch.tensor(list(changes), dtype=torch.float64)
    found = paired(vector, torch.zeros_like(vector))
    rows = {"rows": tuple(changes)} if "rows" in Evaluation.__dataclass_fields__ else {}
    return Evaluation(loss_delta=found.mean, low=found.low, high=found.high, samples=found.samples, **rows)
