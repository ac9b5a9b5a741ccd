"""Parquet files that are bombs, that lie, or that carry what pyarrow would believe."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

from malicious.generic import Attack, pickled

BOMB_BYTES = 256 << 20  # in memory, from a few kilobytes


def _like(path: Path, rows: int) -> pa.Table:
    """A table of the file's columns with the same value in each row."""
    schema = pq.read_schema(path)
    values = {"int64": 1, "double": 0.5, "bool": True, "string": "int8wo"}
    columns = [pa.repeat(pa.scalar(values[str(one.type)], one.type), rows) for one in schema]
    return pa.table(columns, schema=schema)


def _written(**how: Any) -> Attack:
    def attack(path: Path) -> None:
        table = _like(path, BOMB_BYTES // 32 // len(pq.read_schema(path)))
        with pq.ParquetWriter(path, table.schema, **how) as stream:
            for _ in range(4):
                stream.write_table(table)

    return attack


def _changed(change: Callable[[pa.Table, Path], pa.Table], **how: Any) -> Attack:
    def attack(path: Path) -> None:
        pq.write_table(change(_like(path, 10), path), path, **({"compression": "none"} | how))

    return attack


def _patched(change: Callable[[bytes], bytes]) -> Attack:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def _with_column(table: pa.Table, column: pa.Array, metadata: dict[bytes, bytes] | None = None) -> pa.Table:
    field = pa.field(table.column_names[0], column.type, metadata=metadata)
    return table.set_column(0, field, column)


def _pickled_type(table: pa.Table, path: Path) -> pa.Table:
    """An extension type that pyarrow once unpickled."""
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickled(path),
    }
    return _with_column(table, pa.array(["x"] * table.num_rows), metadata)


def _long_text(table: pa.Table, path: Path) -> pa.Table:
    return _with_column(table, pa.array(["a" * (1 << 24)] * table.num_rows))


def _nested(table: pa.Table, path: Path) -> pa.Table:
    kind: pa.DataType = pa.int64()
    for _ in range(40):
        kind = pa.list_(kind)
    return _with_column(table, pa.nulls(table.num_rows, kind))


def _wide(table: pa.Table, path: Path) -> pa.Table:
    for number in range(300):
        table = table.append_column(f"c{number}", pa.nulls(table.num_rows, pa.int64()))
    return table


def _feather(path: Path) -> None:
    pyarrow.feather.write_feather(_like(path, 10), str(path), compression="uncompressed")


def _prefixes(path: Path) -> None:
    """Each text is the one before it and nothing more."""
    table = _like(path, 30_000)
    names = [one.name for one in table.schema if pa.types.is_string(one.type)]
    for name in names:
        table = table.set_column(table.column_names.index(name), name, pa.repeat(pa.scalar("a" * 1000), table.num_rows))
    encodings = dict.fromkeys(names, "DELTA_BYTE_ARRAY")
    pq.write_table(table, path, compression="none", use_dictionary=False, column_encoding=encodings)


def _gzipped(path: Path) -> None:
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb") as packed:
        packed.write(bytes(100 << 20))
    path.write_bytes(stream.getvalue())


def _many_groups(path: Path) -> None:
    pq.write_table(_like(path, 300), path, row_group_size=1, compression="none")


PARQUET: dict[str, Attack] = {
    "zstd bomb": _written(compression="zstd", use_dictionary=False),
    "snappy bomb": _written(compression="snappy", use_dictionary=False),
    "dictionary bomb": _written(compression="none", use_dictionary=True),
    "compressed dictionary bomb": _written(compression="zstd", use_dictionary=True),
    "bomb of shared prefixes": _prefixes,
    "a gzip file": _gzipped,
    "texts of 16 MB": _changed(_long_text, compression="zstd", use_dictionary=True),
    "lists in lists": _changed(_nested),
    "300 more columns": _changed(_wide),
    "300 row groups": _many_groups,
    "another type": _changed(lambda table, path: _with_column(table, pa.array([b"x"] * 10, pa.binary()))),
    "a column of dictionaries": _changed(
        lambda table, path: _with_column(table, pa.array(["x"] * 10).dictionary_encode())
    ),
    "a missing column": _changed(lambda table, path: table.drop_columns(table.column_names[0])),
    "no columns": _changed(lambda table, path: pa.table({})),
    "a column twice": _changed(lambda table, path: table.append_column(table.field(0), table.column(0))),
    "metadata of 2 MB": _changed(lambda table, path: table.replace_schema_metadata({b"autoq": b"a" * (2 << 20)})),
    "a type that was once unpickled": _changed(_pickled_type),
    "an Arrow file": _feather,
    "only the magic": lambda path: path.write_bytes(b"PAR1PAR1"),
    "a footer of two gigabytes": _patched(lambda data: data[:-8] + (0x7FFFFFFF).to_bytes(4, "little") + b"PAR1"),
    "a footer beyond the start": _patched(lambda data: data[:-8] + len(data).to_bytes(4, "little") + b"PAR1"),
    "an encrypted footer": _patched(lambda data: data[:-4] + b"PARE"),
    "a footer of zeros": _patched(lambda data: data[:-200] + bytes(192) + data[-8:]),
}
