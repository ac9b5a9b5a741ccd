"""Quantized checkpoints that lie, with hashes that fit: an attacker can hash too."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from malicious.generic import Attack, pickled

Entries = dict[str, Any]
FIRST = "0.weight"  # of the packed weights, safetensors' names in order


def _parts(path: Path) -> tuple[Entries, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _tensors(change: Callable[[Entries], object]) -> Attack:
    """Change the header of ``model.safetensors``."""

    def attack(folder: Path) -> None:
        header, body = _parts(folder / "model.safetensors")
        change(header)
        write(folder / "model.safetensors", json.dumps(header).encode(), body)

    return attack


def write(path: Path, header: bytes, body: bytes) -> None:
    """A safetensors file of any header."""
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def _entry(**fields: Any) -> Attack:
    """Change fields of the largest tensor's entry."""

    def change(header: Entries) -> None:
        names = [name for name in header if name != "__metadata__"]
        largest = max(names, key=lambda name: header[name]["data_offsets"][1] - header[name]["data_offsets"][0])
        header[largest] |= fields

    return _tensors(change)


def _raw_length(length: int) -> Attack:
    def attack(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])

    return attack


def _huge_header(folder: Path) -> None:
    _, body = _parts(folder / "model.safetensors")
    write(folder / "model.safetensors", b"{" + b" " * (70 << 20) + b"}", body)


def _twice(folder: Path) -> None:
    header, body = _parts(folder / "model.safetensors")
    text = json.dumps(header)
    name = next(name for name in header if name != "__metadata__")
    again = f"{json.dumps(name)}: {json.dumps(header[name])}, "
    write(folder / "model.safetensors", ("{" + again + text[1:]).encode(), body)


def _manifest(change: Callable[[Any], object]) -> Attack:
    def attack(folder: Path) -> None:
        path = folder / "autoq.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return attack


def _moved(name: str) -> Attack:
    """The tensors lie outside, under a name in the manifest that leads there."""

    def attack(folder: Path) -> None:
        outside = folder.parent / "outside.safetensors"
        (folder / "model.safetensors").rename(outside)
        path = folder / "autoq.json"
        value = json.loads(path.read_text())
        value["files"][name.format(outside=outside)] = value["files"].pop("model.safetensors")
        path.write_text(json.dumps(value))

    return attack


def _linked(name: str) -> Attack:
    def attack(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return attack


def _overlapping(header: Entries) -> None:
    names = sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    one, other = names[-2:]
    size = header[other]["data_offsets"][1] - header[other]["data_offsets"][0]
    begin = header[one]["data_offsets"][0]
    header[other]["data_offsets"] = [begin, begin + size]


def packed_header(word: int, value: int) -> Attack:
    """Set a 4-byte word of the first packed weight's own header, which kernels trust."""

    def attack(folder: Path) -> None:
        path = folder / "model.safetensors"
        header, body = _parts(path)
        name = min(name for name, one in header.items() if name.endswith(".weight") and one["shape"] == [128])
        at = header[name]["data_offsets"][0] + 4 * word
        changed = body[:at] + struct.pack("<I", value) + body[at + 4 :]
        write(path, json.dumps(header).encode(), changed)

    return attack


CHECKPOINT: dict[str, Attack] = {
    "a header of 2^63 bytes": _raw_length(1 << 63),
    "a header of 2^64 - 1 bytes": _raw_length((1 << 64) - 1),
    "a header of no bytes": _raw_length(0),
    "a header of 70 MB of spaces": _huge_header,
    "a header nested 100,000 deep": lambda folder: write(folder / "model.safetensors", b"[" * 100_000, b""),
    "a tensor twice": _twice,
    "offsets beyond the file": _entry(data_offsets=[0, 1 << 40]),
    "offsets below zero": _entry(data_offsets=[-8, 0]),
    "offsets the wrong way round": _entry(data_offsets=[64, 0]),
    "offsets that are no integers": _entry(data_offsets=[0.0, "64"]),
    "one offset": _entry(data_offsets=[0]),
    "overlapping tensors": _tensors(_overlapping),
    "a dtype that is larger": _entry(dtype="F64"),
    "a dtype that does not exist": _entry(dtype="PICKLE"),
    "a dtype that is no text": _entry(dtype=["U8"]),
    "a shape of 2^40": _entry(shape=[1 << 40]),
    "a shape whose product overflows": _entry(shape=[1 << 32, 1 << 32]),
    "a shape of nothing times 2^63": _entry(shape=[0, 1 << 63]),
    "a shape below zero": _entry(shape=[-1, -64]),
    "a shape of 10,000 dimensions": _entry(shape=[1] * 10_000),
    "a shape of flags": _entry(shape=[True, True]),
    "an unknown key": _entry(strides=[1]),
    "metadata that is no text": _tensors(lambda header: header.update(__metadata__={"format": ["pt"]})),
    "a tensor too few": _tensors(lambda header: header.pop(FIRST, None) or header.popitem()),
    "a tensor too many": _tensors(
        lambda header: header.update({"x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})
    ),
    "a pickle in place of the tensors": lambda folder: (folder / "model.safetensors").write_bytes(
        pickled(folder / "x")
    ),
    "a pickle that torch.load would read": lambda folder: (
        (folder / "pytorch_model.bin").write_bytes(pickled(folder / "x")) and (folder / "model.safetensors").unlink()
    ),
    "tensors in the parent folder": _moved("../outside.safetensors"),
    "tensors at an absolute path": _moved("{outside}"),
    "tensors below a name with a zero byte": _moved("model.safetensors\0"),
    "tensors behind a link": _linked("model.safetensors"),
    "a plan behind a link": _linked("plan.json"),
    "a manifest behind a link": _linked("autoq.json"),
    "a file that nobody expects": _manifest(
        lambda value: value["files"].update({"evil.py": value["files"]["plan.json"]})
    ),
    "no files": _manifest(lambda value: value.update(files={})),
    "files that are a list": _manifest(lambda value: value.update(files=[])),
    "a schema that is true": _manifest(lambda value: value.update(schema=True)),
    "another format": _manifest(lambda value: value.update(format="pickle")),
    "a tensor tied to one that is missing": _manifest(lambda value: value.update(tied={"version": "nothing"})),
    "tensors tied in a circle": _manifest(lambda value: value.update(tied={"0.bias": "2.bias", "2.bias": "0.bias"})),
    "a tensor tied to a number": _manifest(lambda value: value.update(tied={"version": 7})),
    "a tensor tied to a packed weight": _manifest(lambda value: value.update(tied={"version": FIRST})),
    "a layer that the model lacks": _manifest(lambda value: value["layers"].update({"9": value["layers"]["0"]})),
    "a layer that is null": _manifest(lambda value: value["layers"].update({"0": None})),
    "a layer of another shape": _manifest(lambda value: value["layers"]["0"].update(in_features=128)),
    "a layer of a dtype that is a list": _manifest(lambda value: value["layers"]["0"].update(dtype=["float32"])),
    "a layer too few": _manifest(lambda value: value["layers"].pop("0")),
}
CHECKPOINT |= {
    f"word {word} of a packed weight's header is {value:#x}": packed_header(word, value)
    for word in range(32)
    for value in (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000)
}
