"""The Parquet tables that stages exchange: measurements, sensitivity, front. One place for their columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from autoq import _parquet
from autoq._files import read_bytes_bounded, shown, write_atomic
from autoq.errors import AutoqError, CacheError

if TYPE_CHECKING:
    import pandas as pd

_FIX = "If it lies in the cache, `autoq cache prune` removes it, and it is measured again."
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
        ("device", _TEXT),  # hash of the device's parts, which lie beside the table in clear
        # What else the time depends on; 0 and "" where it does not.
        ("threads", _INT),
        ("torch", _TEXT),
        ("triton", _TEXT),
        ("runtime", _TEXT),  # of a GPU: CUDA or HIP, and the driver
        ("kernels", _TEXT),  # hash of the kernels' sources
        ("compile", _TEXT),  # single layers are timed `eager`
        ("origin", _TEXT),  # empty: measured here; else the foreign device whose ratio predicts this row
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

# One row: what the search took one scheme on one layer to cost, or why it is refused; then the values are null.
COSTS = pa.schema(
    [
        ("layer", _TEXT),
        ("unit", _TEXT),  # the layers that are decided together; the layer's own name where it is alone
        ("scheme", _TEXT),
        ("reason", _TEXT),  # why it is refused; empty otherwise
        ("time_us", _REAL),  # the layer's part of a request
        ("phases_us", _TEXT),  # JSON: phase → its part of one pass
        ("loss", _REAL),  # on the scale that adds up over layers (squares, of a relative RMS)
        ("loss_low", _REAL),  # 95 % interval
        ("loss_high", _REAL),
        ("measured", pa.bool_()),  # whether this layer was measured with this scheme alone
        ("weight_bytes", _INT),
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


def write(
    path: str | Path, content: pa.Table, error: type[AutoqError] = CacheError, *, note: Mapping[str, Any] | None = None
) -> None:
    """Write a table as Parquet, atomically.

    Args:
        path: the file.
        content: the table.
        error: the class raised when it cannot be written.
        note: JSON to be kept in the file's metadata.

    Raises:
        AutoqError: (as ``error``) if the folder cannot be written, or the table is larger than ``read`` accepts.
    """
    text = b"" if note is None else json.dumps(note, sort_keys=True).encode()
    try:
        write_atomic(Path(path), lambda temporary: _parquet.write(content, temporary, text), error)
    except ValueError as problem:
        raise error("a table is flat and of bounded size", where=str(path), got=str(problem)) from problem


def read(path: str | Path, schema: pa.Schema) -> pa.Table:
    """Read a table and check its columns.

    Raises:
        CacheError: if the file is missing, cut, not Parquet as ``write`` writes it, or has other columns.
    """
    return read_noted(path, schema)[0]


def read_noted(path: str | Path, schema: pa.Schema) -> tuple[pa.Table, bytes]:
    """Read a table and the JSON that was kept with it, not parsed; empty if there is none.

    Raises:
        CacheError: as ``read``.
    """
    data = read_bytes_bounded(path, CacheError, what="a table", limit_bytes=_parquet.MAX_FILE_BYTES, fix=_FIX)
    try:
        content, note = _parquet.read(data, lambda found: _check_columns(found, schema, path))
    except ValueError as problem:
        raise CacheError(
            "a table is Parquet in the form that autoq writes", where=str(path), got=str(problem)[:300], fix=_FIX
        ) from problem
    return content.select(schema.names), note


def _check_columns(found: pa.Schema, schema: pa.Schema, path: str | Path) -> None:
    known = [one for one in found if one.name in schema.names]
    faults = [
        *(f"no {name}" for name in schema.names if name not in found.names),
        *(f"unknown {shown(name)}" for name in found.names if name not in schema.names),
        *(f"{one.name} of {one.type}" for one in known if one.type != schema.field(one.name).type),
    ]
    if faults or len(set(found.names)) < len(found):
        got = ", ".join(faults[:5]) or "one twice"
        fix = "It is of another kind, or of another version of autoq. " + _FIX
        raise CacheError("the table has exactly its columns", where=str(path), got=got, fix=fix)


def rows(content: pa.Table) -> list[dict[str, Any]]:
    """A table's rows as ``to_pylist`` gives them, in half the time."""
    names, columns = content.column_names, [values(column) for column in content.columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def values(column: pa.ChunkedArray) -> list[Any]:
    """A column as Python values; None for null."""
    found: list[Any]
    if column.null_count == 0 and pa.types.is_string(column.type):
        coded = column.combine_chunks().dictionary_encode()
        texts = coded.dictionary.to_pylist()
        found = [texts[i] for i in coded.indices.to_numpy().tolist()]
    elif column.null_count == 0 and not pa.types.is_boolean(column.type):
        found = column.to_numpy().tolist()
    else:
        found = column.to_pylist()
    return found


def frame(content: pa.Table | Sequence[Mapping[str, Any]], schema: pa.Schema) -> pd.DataFrame:
    """A table or rows as a pandas DataFrame."""
    if not isinstance(content, pa.Table):
        content = table(schema, content)
    result: pd.DataFrame = content.to_pandas()
    return result
