"""The one form of Parquet that autoq writes, and a reader that accepts no other.

Parquet can say a gigabyte in a few bytes: compressed pages, dictionaries, shared prefixes. autoq's files have none of
it: flat columns of plain values, not compressed. All metadata and all page headers are checked here, field by field,
before pyarrow sees the file: what it decodes is no larger than the file, and damaged metadata, which can end the
process in pyarrow, never reaches it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from autoq._thrift import read_struct

MAX_FILE_BYTES = 256 << 20
MAX_ROWS = 1 << 19

_MAGIC = b"PAR1"
_NOTE = b"autoq"  # the only key of a file's own metadata
_MAX_FOOTER_BYTES = 256 << 10
_MAX_NOTE_BYTES = 64 << 10
_MAX_GROUPS = 64
_MAX_COLUMNS = 64
_MAX_TEXT_BYTES = 4 << 20  # of one value
_MIN_ROW_BYTES = 8  # of the file, or one a column: a null takes none there, and eight in memory
_DATA_PAGE, _PLAIN, _RLE, _UNCOMPRESSED = 0, 0, 3, 0
_TEXT = 6
_TYPES = {pa.int64(): 2, pa.float64(): 5, pa.bool_(): 0, pa.string(): _TEXT}  # in Parquet's numbers
_WRITER = re.compile(rb"parquet-cpp-arrow version [0-9.]{1,20}(-SNAPSHOT)?")
_ERRORS = (OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError, pa.ArrowException)

# Field numbers of Parquet's metadata, as far as autoq's files have them.
_EMPTY: dict[int, Any] = {}
_COLUMN_SCHEMA: dict[int, Any] = {1: "i32", 3: "i32", 4: "binary", 5: "i32", 6: "i32", 10: {1: _EMPTY}}
_COUNTS: dict[int, Any] = {1: "i64", 2: ["i64"], 3: ["i64"]}  # of bytes and levels
_COLUMN: dict[int, Any] = {
    **{1: "i32", 2: ["i32"], 3: ["binary"], 4: "i32", 5: "i64", 6: "i64", 7: "i64", 9: "i64"},
    **{13: [{1: "i32", 2: "i32", 3: "i32"}], 16: _COUNTS},
}
_GROUP: dict[int, Any] = {1: [{2: "i64", 3: _COLUMN}], 2: "i64", 3: "i64", 5: "i64", 6: "i64", 7: "i16"}
_FOOTER: dict[int, Any] = {
    **{1: "i32", 2: [_COLUMN_SCHEMA], 3: "i64", 4: [_GROUP]},
    **{5: [{1: "binary", 2: "binary"}], 6: "binary", 7: [{1: _EMPTY}]},
}
_PAGE: dict[int, Any] = {1: "i32", 2: "i32", 3: "i32", 5: {1: "i32", 2: "i32", 3: "i32", 4: "i32", 5: _EMPTY}}


def write(content: pa.Table, path: Path, note: bytes = b"") -> None:
    """Write a table.

    Args:
        content: flat columns.
        path: the file.
        note: UTF-8, kept in the file's metadata.

    Raises:
        ValueError: if ``read`` would refuse the file.
    """
    if content.num_rows > MAX_ROWS or content.num_columns > _MAX_COLUMNS or len(note) > _MAX_NOTE_BYTES:
        raise ValueError(f"{content.num_rows:,} rows, {content.num_columns:,} columns, a note of {len(note):,} bytes")
    for field in content.schema:
        if field.type not in _TYPES:
            raise ValueError(f"column {field.name!r} is of {field.type}")
    _check_texts(content)
    form = {"compression": "none", "use_dictionary": False, "write_statistics": False, "store_schema": False}
    with pq.ParquetWriter(path, content.schema, data_page_version="1.0", **form) as writer:
        writer.write_table(content, row_group_size=MAX_ROWS)
        if note:
            writer.add_key_value_metadata({_NOTE: note})
    _check_rows(content.num_rows, content.num_columns, path.stat().st_size)


def read(data: bytes, expect: Callable[[pa.Schema], None] | None = None) -> tuple[pa.Table, bytes]:
    """Read what ``write`` wrote.

    Args:
        data: a whole file.
        expect: called with the columns before any is decoded; what it raises goes through.

    Returns:
        The table and the note.

    Raises:
        ValueError: with the reason, if it is anything else. No more memory is taken than a small multiple of the data.
    """
    footer, end = _footer(data)
    note = _check_footer(footer, len(data))
    if expect is not None:
        expect(_columns(footer))
    last = 0
    for group in footer[4]:
        for column in group[1]:
            # In the file's order and apart: else a page could be decoded once for each column and row group.
            if column[3].get(9, 0) < last:
                raise ValueError("columns that share bytes, or in another order than the file's")
            _check_column(column[3], group[3], data, end)
            last = column[3][9] + column[3][7]
        if any(not 0 <= group.get(field, 0) <= end for field in (2, 5, 6)):
            raise ValueError("a row group outside the file")
    try:
        content = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        content.validate(full=True)
    except _ERRORS as problem:
        raise ValueError(str(problem).partition("\n")[0] or type(problem).__name__) from problem
    _check_texts(content)
    return content.replace_schema_metadata(None), note


def _footer(data: bytes) -> tuple[dict[int, Any], int]:
    """The metadata, and where it begins."""
    if len(data) < 12 or data[:4] != _MAGIC or data[-4:] != _MAGIC:
        raise ValueError("it does not begin and end as Parquet does")
    length = int.from_bytes(data[-8:-4], "little")
    if length > min(_MAX_FOOTER_BYTES, len(data) - 12):
        raise ValueError(f"a footer of {length:,} bytes, more than {_MAX_FOOTER_BYTES:,} or than the file has")
    begin = len(data) - 8 - length
    found, end = read_struct(data[begin:-8], 0, _FOOTER)
    if end != length or any(field not in found for field in (1, 2, 3, 4, 6, 7)):
        raise ValueError("a footer that is not complete")
    return found, begin


def _check_footer(footer: Mapping[int, Any], size: int) -> bytes:
    """Everything in the metadata but where columns lie; returns the note."""
    schema = [_schema(element) for element in footer[2][1:]]
    groups, rows = footer[4], footer[3]
    if not 1 <= len(schema) <= _MAX_COLUMNS or footer[2][0].get(5) != len(schema) or len(footer[7]) != len(schema):
        raise ValueError(f"{len(schema):,} columns, or columns within columns")
    if len(groups) > _MAX_GROUPS or not all(set(group) >= {1, 2, 3} and group[3] >= 0 for group in groups):
        raise ValueError(f"{len(groups):,} row groups")
    if not 0 <= rows <= MAX_ROWS or sum(group[3] for group in groups) != rows:
        raise ValueError(f"{rows:,} rows, more than {MAX_ROWS:,} or than its row groups have")
    _check_rows(rows, len(schema), size)
    for group in groups:
        found = [(column.get(3, {}).get(1), column.get(3, {}).get(3)) for column in group[1]]
        if found != [(kind, [name]) for kind, name in schema]:
            raise ValueError("a row group with other columns than the file")
    if not _WRITER.fullmatch(footer[6]):
        raise ValueError("a writer that autoq does not use")
    return _note(footer.get(5, []))


def _check_rows(rows: int, columns: int, size: int) -> None:
    if rows * max(_MIN_ROW_BYTES, columns) > size:
        raise ValueError(f"{rows:,} rows of {columns} columns in {size:,} bytes")


def _columns(footer: Mapping[int, Any]) -> pa.Schema:
    """The columns that the metadata names, which was checked."""
    kinds = {number: kind for kind, number in _TYPES.items()}
    return pa.schema([(one[4].decode("utf-8", "replace"), kinds[one[1]]) for one in footer[2][1:]])


def _schema(element: Mapping[int, Any]) -> tuple[int, bytes]:
    """(type, name) of a column."""
    kind, name = element.get(1), element.get(4, b"")
    text: tuple[Any, Any] = (0, {1: {}}) if kind == _TEXT else (None, None)
    if kind is None or kind not in _TYPES.values() or element.get(3) not in (0, 1) or 5 in element:
        raise ValueError("a column that is neither of whole numbers, reals, booleans nor text")
    if (element.get(6), element.get(10)) != text or not name.decode("utf-8", "replace").isprintable():
        raise ValueError("a column that is neither of whole numbers, reals, booleans nor text")
    return kind, name


def _note(pairs: Sequence[Mapping[int, Any]]) -> bytes:
    notes = [(pair.get(1), pair.get(2, b"")) for pair in pairs]
    if not notes:
        return b""
    if len(notes) > 1 or notes[0][0] != _NOTE or len(notes[0][1]) > _MAX_NOTE_BYTES:
        raise ValueError("metadata that autoq does not write")
    return bytes(notes[0][1])


def _check_column(column: Mapping[int, Any], rows: int, data: bytes, end: int) -> None:
    """Walk a column's pages as pyarrow will.

    Args:
        column: its metadata.
        rows: of the row group.
        data: the file.
        end: where the pages must have ended.
    """
    name = f"column {column[3][0].decode('utf-8', 'replace')!r}"
    if any(field not in column for field in (2, 4, 5, 6, 7, 9)) or column[4] != _UNCOMPRESSED:
        raise ValueError(f"{name} is compressed")
    if not set(column[2]) <= {_PLAIN, _RLE}:
        raise ValueError(f"{name} is not of plain values")
    begin, size = column[9], column[7]
    if (begin < 4 and rows) or begin < 0 or size < 0 or begin + size > end or size != column[6]:
        raise ValueError(f"{name} lies outside the file")
    if not column[5] == rows == _values(data, begin, begin + size, name):
        raise ValueError(f"{name} has not one value a row")


def _values(data: bytes, at: int, end: int, name: str) -> int:
    """The number of values in a column's pages, each of which is plain and lies within the column."""
    values = 0
    while at < end:
        page, at = read_struct(data, at, _PAGE)
        inner = page.get(5, {})
        kinds = (page.get(1), inner.get(2), inner.get(3), inner.get(4))
        size, count = page.get(3, -1), inner.get(1, -1)
        if kinds != (_DATA_PAGE, _PLAIN, _RLE, _RLE) or size != page.get(2) or size < 0 or count < 0:
            raise ValueError(f"{name} has a page that is not of plain values")
        at += size
        values += count
        if at > end:
            raise ValueError(f"{name} has a page that does not end within it")
    return values


def _check_texts(content: pa.Table) -> None:
    for name, column in zip(content.column_names, content.columns, strict=True):
        if pa.types.is_string(column.type) and column.nbytes > _MAX_TEXT_BYTES:
            longest = int(pc.max(pc.binary_length(column)).as_py() or 0)
            if longest > _MAX_TEXT_BYTES:
                raise ValueError(f"column {name!r} has a text of {longest:,} bytes, more than {_MAX_TEXT_BYTES:,}")
