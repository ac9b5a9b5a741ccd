"""The Parquet tables that stages exchange: measurements, sensitivity, front. One place for their columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from autoq._files import write_atomic
from autoq.errors import AutoqError, CacheError

if TYPE_CHECKING:
    import pandas as pd

_TEXT = pa.string()
_INT = pa.int64()
_REAL = pa.float64()

# One row: one (shape, scheme) timed on one device. `ratio` is time over the baseline's, both from the same window.
MEASUREMENTS = pa.schema(
    [
        ("m", _INT),
        ("k", _INT),
        ("n", _INT),
        ("dtype", _TEXT),
        ("bias", pa.bool_()),
        ("scheme", _TEXT),
        ("kernel", _TEXT),  # what ran, such as avx2.int4.gemv
        ("status", _TEXT),  # ok, unsupported, wrong, error
        ("reason", _TEXT),  # why not ok; empty otherwise
        ("time_us", _REAL),  # median
        ("time_low_us", _REAL),  # 10 % quantile
        ("time_high_us", _REAL),  # 90 % quantile
        ("baseline_us", _REAL),  # median of the unquantized layer in stock PyTorch, in the same window
        ("ratio", _REAL),  # time_us / baseline_us
        ("bandwidth_gb_s", _REAL),  # the machine's read bandwidth in the same window
        ("error", _REAL),  # relative RMS of the output against the scheme's own reference
        ("weight_bytes", _INT),
        ("repeats", _INT),
        ("threads", _INT),
        ("device", _TEXT),  # fingerprint; its parts lie beside the table in clear
    ]
)

# One row: what one scheme on one layer costs in loss, estimated from gradients (and measured on a sample).
SENSITIVITY = pa.schema(
    [
        ("layer", _TEXT),
        ("scheme", _TEXT),
        ("score", _REAL),  # second-order estimate of the loss increase; null where no batch calls the layer
        ("first_order", _REAL),  # signed first-order part
        ("weight_error", _REAL),  # relative RMS of the weight
        ("output_error", _REAL),  # relative RMS of the layer's output on recorded activations
        ("measured", _REAL),  # loss increase measured one at a time; null where it was not
        ("measured_low", _REAL),
        ("measured_high", _REAL),
    ]
)

# The label of the model itself, which has a row where `none` runs in autoq's kernels and is a plan of its own.
UNQUANTIZED_LABEL = "unquantized"

# One row: one plan that was evaluated.
FRONT = pa.schema(
    [
        ("plan", _TEXT),  # hash of the assignment
        ("source", _TEXT),  # uniform, frontier, optuna, local
        ("label", _TEXT),  # the scheme of a uniform plan; `unquantized` of the model itself; else empty
        ("loss_predicted", _REAL),
        ("loss_delta", _REAL),  # measured increase of the loss; null if not measured
        ("loss_low", _REAL),
        ("loss_high", _REAL),
        ("samples", _INT),
        ("latency_predicted_us", _REAL),
        ("latency_measured_us", _REAL),  # null unless timed end to end
        ("latency_low_us", _REAL),
        ("latency_high_us", _REAL),
        ("weight_bytes", _INT),
        ("in_budget", pa.bool_()),
        ("pareto", pa.bool_()),
        ("chosen", pa.bool_()),
        ("assignment", _TEXT),  # JSON: layer → scheme
    ]
)


def table(schema: pa.Schema, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table of exactly the schema's columns; a missing column is null.

    Raises:
        CacheError: if a row has a column the schema lacks, or a value of the wrong type.
    """
    rows = list(rows)
    for row in rows:
        unknown = sorted(set(row) - set(schema.names))
        if unknown:
            raise CacheError("a row has the table's columns only", got=", ".join(unknown))
    try:
        return pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as problem:
        raise CacheError("a row's values have the columns' types", got=str(problem)) from problem


def write(path: str | Path, content: pa.Table, error: type[AutoqError] = CacheError) -> None:
    """Write a table as Parquet, atomically."""
    write_atomic(Path(path), lambda temporary: pq.write_table(content, temporary), error)


def read(path: str | Path, schema: pa.Schema) -> pa.Table:
    """Read a table and check its columns.

    Raises:
        CacheError: if the file is missing, cut, not Parquet, or lacks a column.
    """
    try:
        content = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as problem:
        raise CacheError(
            "the table must be readable Parquet",
            where=str(path),
            got=str(problem).splitlines()[0],
            fix="Delete the file to measure again.",
        ) from problem
    missing = [name for name in schema.names if name not in content.column_names]
    if missing:
        raise CacheError(
            "the table has all columns",
            where=str(path),
            got=f"no {', '.join(missing)}",
            fix="It was written by another version of autoq; delete it to measure again.",
        )
    return content.select(schema.names).cast(schema)


def frame(content: pa.Table | Sequence[Mapping[str, Any]], schema: pa.Schema) -> pd.DataFrame:
    """A table or rows as a pandas DataFrame."""
    if not isinstance(content, pa.Table):
        content = table(schema, content)
    result: pd.DataFrame = content.to_pandas()
    return result
