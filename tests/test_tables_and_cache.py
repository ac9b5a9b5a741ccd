"""Tables on disk: their columns, and that no file is read but those in the one form that autoq writes."""

import random
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autoq import _parquet, tables
from autoq.errors import AutoqError, CacheError, InputError
from autoq.workload import LayerInfo, LinearCall, PhaseInfo, Workload

PLAIN = {"compression": "none", "use_dictionary": False, "write_statistics": False, "store_schema": False}
SCHEMA = pa.schema([("layer", pa.string()), ("score", pa.float64()), ("m", pa.int64()), ("bias", pa.bool_())])


def row(m=1, scheme="int8wo", time=10.0, device="d"):
    return {
        "m": m, "k": 64, "n": 32, "dtype": "bfloat16", "bias": False, "scheme": scheme, "kernel": "x",
        "status": "ok", "reason": "", "time_us": time, "baseline_us": 20.0, "ratio": time / 20, "threads": 2,
        "device": device,
    }  # fmt: skip


def content(rows=100):
    return pa.table(
        {
            "layer": [None if i % 7 == 0 else f"layers.{i}" for i in range(rows)],
            "score": [i / 3 for i in range(rows)],
            "m": list(range(rows)),
            "bias": [i % 2 == 0 for i in range(rows)],
        },
        schema=SCHEMA,
    )


def workload():
    return Workload(
        layers=(LayerInfo(name="fc", k=64, n=32, dtype="bfloat16", device="cpu", bias=False),),
        calls=(LinearCall(layer="fc", phase="forward", m=4, dtype="bfloat16", count=2),),
        phases=(PhaseInfo(name="forward"),),
    )


def test_a_table_has_exactly_its_columns(tmp_path):
    made = tables.table(tables.MEASUREMENTS, [row()])
    assert made.column_names == tables.MEASUREMENTS.names
    tables.write(tmp_path / "t.parquet", made)
    assert tables.read(tmp_path / "t.parquet", tables.MEASUREMENTS).to_pylist() == made.to_pylist()
    with pytest.raises(CacheError, match="surprise"):
        tables.table(tables.MEASUREMENTS, [row() | {"surprise": 1}])
    with pytest.raises(CacheError, match="types"):
        tables.table(tables.MEASUREMENTS, [row() | {"m": "one"}])


@pytest.mark.parametrize("rows", [0, 1, 70_000])
def test_a_table_is_read_as_it_was_written_with_its_note(tmp_path, rows):
    path = tmp_path / "t.parquet"
    tables.write(path, content(rows), note={"who": "me"})
    found, note = tables.read_noted(path, SCHEMA)
    assert found.equals(content(rows))
    assert note == b'{"who": "me"}'


def test_other_tools_read_the_files(tmp_path):
    tables.write(tmp_path / "t.parquet", content())
    assert pq.read_table(tmp_path / "t.parquet").to_pylist() == content().to_pylist()


def test_a_table_of_another_kind_or_cut_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    tables.write(path, tables.table(tables.SENSITIVITY, []))
    with pytest.raises(CacheError, match=r"t\.parquet: the table has exactly its columns; got no m, no k"):
        tables.read(path, tables.MEASUREMENTS)
    wrong = SCHEMA.set(1, pa.field("score", pa.int64()))
    tables.write(path, content())
    with pytest.raises(CacheError, match="got score of double"):
        tables.read(path, wrong)
    with pytest.raises(CacheError, match="got unknown 'bias'"):
        tables.read(path, SCHEMA.remove(3))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CacheError, match="Parquet"):
        tables.read(path, SCHEMA)
    with pytest.raises(CacheError, match="FileNotFoundError"):
        tables.read(tmp_path / "none.parquet", SCHEMA)
    with pytest.raises(CacheError, match="a folder"):
        tables.read(tmp_path, SCHEMA)


def is_refused(path, schema):
    try:
        tables.read(path, schema)
    except CacheError:
        return True
    return False


def plain(tmp_path, made, **changed):
    path = tmp_path / "t.parquet"
    pq.write_table(made, path, **PLAIN | changed)
    return path


BOMBS = {
    "compressed": ({"compression": "zstd"}, "compressed"),
    "snappy": ({"compression": "snappy"}, "compressed"),
    "a dictionary": ({"use_dictionary": True}, "that autoq does not write"),
    "shared prefixes": ({"column_encoding": {"layer": "DELTA_BYTE_ARRAY"}}, "not of plain values"),
    "delta lengths": ({"column_encoding": {"layer": "DELTA_LENGTH_BYTE_ARRAY"}}, "not of plain values"),
    "delta numbers": ({"column_encoding": {"m": "DELTA_BINARY_PACKED"}}, "not of plain values"),
    "split bytes": ({"column_encoding": {"score": "BYTE_STREAM_SPLIT"}}, "not of plain values"),
    "version 2 pages": ({"data_page_version": "2.0"}, "field 8 that autoq does not write"),
    "statistics": ({"write_statistics": True}, "that autoq does not write"),
    "checksums": ({"write_page_checksum": True}, "field 4 that autoq does not write"),
    "a stored schema": ({"store_schema": True}, "metadata that autoq does not write"),
    "many row groups": ({"row_group_size": 1}, "100 row groups"),
}


@pytest.mark.parametrize("what", BOMBS)
def test_another_form_of_parquet_is_refused(tmp_path, what):
    changed, reason = BOMBS[what]
    with pytest.raises(CacheError, match=reason):
        tables.read(plain(tmp_path, content(), **changed), SCHEMA)


NOT_PLAIN = {
    "list": pa.array([[1]] * 100),
    "struct": pa.array([{"a": 1}] * 100),
    "map": pa.array([[("a", 1)]] * 100, pa.map_(pa.string(), pa.int64())),
    "long nulls": pa.nulls(100, pa.binary(1 << 20)),
    "decimal": pa.nulls(100, pa.decimal128(38)),
    "time": pa.nulls(100, pa.timestamp("us")),
    "bytes": pa.array([b"x"] * 100),
    "small": pa.array([1] * 100, pa.int32()),
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_types_that_no_table_has_are_refused_before_they_are_read(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(pq, "ParquetFile", None)
    with pytest.raises(CacheError, match=r"neither of whole numbers, reals, booleans nor text|autoq does not write"):
        tables.read(plain(tmp_path, pa.table({"x": NOT_PLAIN[kind]})), SCHEMA)


def test_a_few_bytes_do_not_become_many_rows(tmp_path):
    path = plain(tmp_path, pa.table({"x": pa.nulls(500_000, pa.int64())}))
    assert path.stat().st_size < 1000
    with pytest.raises(CacheError, match="500,000 rows of 1 columns in"):
        tables.read(path, SCHEMA)
    with pytest.raises(CacheError, match="more than 524,288"):
        tables.read(plain(tmp_path, pa.table({"x": pa.nulls(600_000, pa.int64())})), SCHEMA)


def test_a_file_pays_a_byte_for_every_null(tmp_path):
    """64 columns of nulls beside one long text: 4 MiB that would take 256 MiB."""
    sparse = pa.table(
        {f"c{i}": pa.nulls(1 << 19, pa.int64()) for i in range(63)}
        | {"t": ["x" * (4 << 20)] + [None] * ((1 << 19) - 1)}
    )
    with pytest.raises(CacheError, match="524,288 rows of 64 columns in 4,"):
        tables.read(plain(tmp_path, sparse), sparse.schema)
    with pytest.raises(CacheError, match=r"new\.parquet: a table is flat and of bounded size; got 524,288 rows of 64"):
        tables.write(tmp_path / "new.parquet", sparse)
    assert list(tmp_path.iterdir()) == [tmp_path / "t.parquet"]


_CODES = {"i16": 4, "i32": 5, "i64": 6, "binary": 8}


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def compact(value, form):
    """Thrift's compact protocol, the other way round than ``_thrift`` reads it."""
    if isinstance(form, dict):
        numbers = sorted(value)
        steps = [b - a for a, b in zip([0, *numbers], numbers, strict=False)]
        fields = (
            bytes([step << 4 | code(form[n])]) + compact(value[n], form[n])
            for step, n in zip(steps, numbers, strict=True)
        )
        return b"".join(fields) + b"\0"
    if isinstance(form, list):
        return bytes([0xF0 | code(form[0])]) + varint(len(value)) + b"".join(compact(one, form[0]) for one in value)
    return varint(len(value)) + value if form == "binary" else varint(value << 1 ^ value >> 63)


def code(form):
    return _CODES[form] if isinstance(form, str) else 9 if isinstance(form, list) else 12


def with_footer(data, change):
    footer, begin = _parquet._footer(data)
    new = compact(change(footer), _parquet._FOOTER)
    return data[:begin] + new + struct.pack("<I", len(new)) + b"PAR1"


@pytest.mark.parametrize(("columns", "groups"), [(1, 32), (32, 1), (32, 32)])
def test_columns_and_row_groups_that_share_one_page_are_refused_before_they_are_decoded(
    tmp_path, monkeypatch, columns, groups
):
    """A text of 2 MiB, decoded once for each column and row group, would be 2 GiB."""
    names = [f"c{i}".encode() for i in range(columns)]

    def shared(footer):
        root, column = footer[2]
        (group,) = footer[4]
        (chunk,) = group[1]
        chunks = [chunk | {3: chunk[3] | {3: [name]}} for name in names]
        return footer | {
            2: [root | {5: columns}, *(column | {4: name} for name in names)],
            3: groups,
            4: [group | {1: chunks, 7: i} for i in range(groups)],
            7: footer[7] * columns,
        }

    path = tmp_path / "t.parquet"
    tables.write(path, pa.table({"c0": ["x" * (2 << 20)]}))
    schema = pa.schema([(name.decode(), pa.string()) for name in names])
    data = path.read_bytes()
    assert with_footer(data, lambda footer: footer) != data  # lists are written in the long form
    path.write_bytes(with_footer(data, lambda footer: footer))
    assert tables.read(path, pa.schema([("c0", pa.string())])).num_rows == 1
    path.write_bytes(with_footer(data, shared))
    monkeypatch.setattr(pq, "ParquetFile", None)
    with pytest.raises(CacheError, match="columns that share bytes"):
        tables.read(path, schema)


def test_another_kind_of_table_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    tables.write(tmp_path / "t.parquet", content())
    monkeypatch.setattr(pq, "ParquetFile", None)
    with pytest.raises(CacheError, match="the table has exactly its columns"):
        tables.read(tmp_path / "t.parquet", tables.MEASUREMENTS)


def test_texts_columns_files_and_footers_are_bounded(tmp_path, monkeypatch):
    long = pa.table({"layer": ["x" * (5 << 20)]})
    with pytest.raises(CacheError, match=r"t\.parquet.*text of 5,242,880 bytes"):
        tables.read(plain(tmp_path, long), long.schema)
    with pytest.raises(CacheError, match=r"new\.parquet.*text of 5,242,880 bytes"):
        tables.write(tmp_path / "new.parquet", long)
    assert not (tmp_path / "new.parquet").exists()
    with pytest.raises(CacheError, match="65 columns"):
        tables.read(plain(tmp_path, pa.table({f"c{i}": [1] for i in range(65)})), SCHEMA)
    path = plain(tmp_path, content())
    data = path.read_bytes()
    path.write_bytes(data[:-8] + struct.pack("<I", len(data)) + data[-4:])
    with pytest.raises(CacheError, match="a footer of"):
        tables.read(path, SCHEMA)
    path.write_bytes(data)
    monkeypatch.setattr(_parquet, "MAX_FILE_BYTES", len(data) - 1)
    with pytest.raises(CacheError, match="at most"):
        tables.read(path, SCHEMA)


def test_metadata_of_others_is_refused(tmp_path):
    for pairs in ({"pandas": "{}"}, {"autoq": "{}", "more": "x"}, {"autoq": "x" * 70_000}):
        path = tmp_path / "t.parquet"
        with pq.ParquetWriter(path, SCHEMA, **PLAIN) as writer:
            writer.write_table(content())
            writer.add_key_value_metadata(pairs)
        with pytest.raises(CacheError, match="metadata that autoq does not write"):
            tables.read(path, SCHEMA)


def test_text_that_is_not_utf8_and_columns_twice_are_refused(tmp_path):
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe"))
    with pytest.raises(CacheError, match="UTF8"):
        tables.read(plain(tmp_path, pa.table({"layer": bad})), pa.schema([("layer", pa.string())]))
    twice = pa.Table.from_arrays([*content().columns, content()["m"]], names=[*SCHEMA.names, "m"])
    with pytest.raises(CacheError, match="one twice"):
        tables.read(plain(tmp_path, twice), SCHEMA)


def test_a_page_that_lies_about_itself_is_refused_whatever_the_metadata_says(tmp_path):
    """The metadata, at the file's end, is untouched: each page's own header is what says how it is decoded."""
    path = plain(tmp_path, pa.table({"m": pa.array(range(100), pa.int64())}))
    data = path.read_bytes()
    size = data.index(b"\x2c\x15")  # the header of the page's data: values, encoding, encodings of levels
    values = data[size + 2 : size + 4]
    assert values == b"\xc8\x01"  # 100, zigzag
    assert data[size + 4 : size + 6] == b"\x15\x00"
    lies = {
        "a dictionary's indices": (size + 5, b"\x10"),
        "delta": (size + 5, b"\x0a"),
        "other values": (size + 2, b"\xca\x01"),
        "bit-packed levels": (size + 7, b"\x08"),
        "a dictionary page": (5, b"\x04"),
        "an index page": (5, b"\x02"),
        "another size": (7, bytes([data[7] ^ 2])),
        "a number of 35 bits": (size + 2, b"\xff\xff"),
    }
    for name, (at, new) in lies.items():
        changed = data[:at] + new + data[at + len(new) :]
        assert len(changed) == len(data)
        path.write_bytes(changed)
        assert is_refused(path, pa.schema([("m", pa.int64())])), name


def test_a_file_with_any_byte_changed_gives_a_table_or_an_error(tmp_path):
    path = tmp_path / "t.parquet"
    tables.write(path, content(20))
    data = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 8))):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        path.write_bytes(changed[: draw.choice((len(changed), len(changed), draw.randrange(len(changed))))])
        try:
            assert tables.read(path, SCHEMA).num_rows == 20
        except CacheError:
            refused += 1
    assert refused > 500


def test_a_workload_round_trips_and_refuses_what_it_does_not_know(tmp_path):
    one = workload()
    one.save(tmp_path / "w.json")
    assert Workload.load(tmp_path / "w.json") == one
    value = one.to_json()
    with pytest.raises(InputError, match="schema"):
        Workload.from_json(value | {"schema": 99})
    value["layers"][0]["surprise"] = 1
    with pytest.raises(InputError, match="surprise"):
        Workload.from_json(value)
    (tmp_path / "w.json").write_text((tmp_path / "w.json").read_text()[:50])
    with pytest.raises(InputError, match="JSON"):
        Workload.load(tmp_path / "w.json")


def test_an_error_says_where_what_and_what_to_do_and_pickles():
    import pickle

    error = CacheError("the rule", where="file.x", got=3, fix="Do this.")
    assert str(error) == "file.x: the rule; got 3. Do this."
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (CacheError, str(error))
    assert issubclass(CacheError, AutoqError)
