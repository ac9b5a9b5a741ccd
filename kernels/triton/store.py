"""Tuned choices on disk: a folder per device and software, in it one JSON file per product.

Files are written beside their place and renamed over it, so that a reader, in this process or another, sees a whole
file or none, and of two writers the last one wins. What a file is valid for stands in it in clear, and is compared
before it is used: a file that is damaged, of another schema, or moved from elsewhere counts as absent, with a warning.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from autoq_kernels.layout import Header
from autoq_kernels.triton.configs import dynamic, m_bucket
from autoq_kernels.triton.device import Device, short_hash

_log = logging.getLogger(__name__)
SCHEMA = 1


def default_folder() -> Path:
    """``~/.cache/autoq/triton``."""
    return Path.home() / ".cache" / "autoq" / "triton"


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What a choice is tuned for: the form of the weight and of the activation, whatever their values.

    Attributes:
        kind: of the codes, such as ``AFFINE``.
        bits: of a code.
        group_size: inputs that share a scale; 0 where there are no groups.
        minimum: whether there are minima.
        row_scale: whether there are row scales.
        column_scale: whether there are column scales.
        dynamic: whether x is rounded to int8.
        n: outputs.
        k: inputs.
        m: rows of x, rounded up as `configs.m_bucket` does.
        dtype: of x, such as ``bfloat16``.
    """

    kind: str
    bits: int
    group_size: int
    minimum: bool
    row_scale: bool
    column_scale: bool
    dynamic: bool
    n: int
    k: int
    m: int
    dtype: str

    @classmethod
    def of(cls, form: Header, m: int, dtype: torch.dtype, *, has_column_scale: bool) -> Product:
        """The product of ``m`` rows of x with a weight of this form."""
        return cls(
            kind=form.kind.name,
            bits=form.bits,
            group_size=form.group_size,
            minimum=form.minimum_offset != 0,
            row_scale=form.row_scale_offset != 0,
            column_scale=has_column_scale,
            dynamic=dynamic(form, m),
            n=form.n,
            k=form.k,
            m=m_bucket(m),
            dtype=str(dtype).removeprefix("torch."),
        )

    @property
    def file_name(self) -> str:
        """Readable, and different where any part is."""
        group = f"-g{self.group_size}" if self.group_size else ""
        shape = f"n{self.n}-k{self.k}-m{self.m}"
        return f"{self.kind.lower()}-b{self.bits}{group}-{shape}-{self.dtype}-{short_hash(asdict(self))}.json"

    def to_json(self) -> dict[str, Any]:
        """The parts in clear."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What became of one choice.

    Attributes:
        choice: its label.
        status: ``ok``, ``wrong`` (its result was) or ``error`` (it did not compile or run).
        reason: why not ok; empty otherwise.
        error: relative RMS of its result against the reference; None where there was no finite one.
        median_us: of its calls; None where it was not timed.
        repeats: calls that the median is of.
    """

    choice: str
    status: str
    reason: str = ""
    error: float | None = None
    median_us: float | None = None
    repeats: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The outcome of tuning one product.

    Attributes:
        choice: the fastest, as `products.Choice.to_json` gives it.
        median_us: of its calls.
        repeats: calls that the median is of.
        trials: every choice that was considered, the fastest first.
        date: when, ISO 8601 in UTC.
    """

    choice: Mapping[str, Any]
    median_us: float
    repeats: int
    trials: tuple[Trial, ...]
    date: str

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Record:
        """From `to_json`'s fields.

        Raises:
            ValueError: a field is missing, unknown or of another type.
        """
        try:
            trials = tuple(Trial(**trial) for trial in fields["trials"])
            record = cls(**{**fields, "trials": trials})
        except (TypeError, KeyError) as problem:
            raise ValueError(f"not a record of tuning: {problem}") from problem
        if not isinstance(record.choice, dict) or not isinstance(record.median_us, int | float):
            raise ValueError("not a record of tuning: choice or median_us of another type")
        return record


class Store:
    """The tuned choices of one device.

    What was read, or was not there, is remembered: another process's later work is seen by a new store, or after
    `forget`.

    Args:
        folder: of all devices, for example `default_folder()`; made when the first record is written.
        device: whose choices these are.
    """

    def __init__(self, folder: Path, device: Device) -> None:
        self.device = device
        self._folder: Path = folder / device.key
        self._seen: dict[Product, Record | None] = {}

    def path(self, product: Product) -> Path:
        """Where a product's record lies, or would."""
        return self._folder / product.file_name

    def read(self, product: Product) -> Record | None:
        """The record of a product; None where there is none that can be used."""
        if product not in self._seen:
            self._seen[product] = self._load(product)
        return self._seen[product]

    def write(self, product: Product, record: Record) -> None:
        """Keep a record in place of an older one; where the folder cannot be written, in this store only, and aloud."""
        self._seen[product] = record
        try:
            note = self._folder / "device.json"
            if not note.exists():
                _replace(note, self.device.to_json())
            _replace(self.path(product), {"schema": SCHEMA, "product": product.to_json(), **record.to_json()})
        except OSError as problem:
            _log.warning("the tuned choice is not kept, %s cannot be written: %s", self.path(product), problem)

    def forget(self) -> None:
        """Read files anew."""
        self._seen.clear()

    def _load(self, product: Product) -> Record | None:
        path = self.path(product)
        try:
            fields = json.loads(path.read_bytes())
            if not isinstance(fields, dict):
                raise ValueError("no object")
            schema, owner = fields.pop("schema", None), fields.pop("product", None)
            if schema != SCHEMA:
                raise ValueError(f"schema {schema!r}, this build reads {SCHEMA}")
            if owner != product.to_json():
                raise ValueError("it is another product's")
            return Record.from_json(fields)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as problem:
            _log.warning("%s is not used, the product counts as not tuned: %s", path, problem)
            return None


def _replace(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON so that it is seen whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".tmp", delete=False) as stream:
            temporary = Path(stream.name)
            json.dump(value, stream, indent=1)
            stream.write("\n")
        temporary.chmod(0o644)
        temporary.replace(path)
        temporary = None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
