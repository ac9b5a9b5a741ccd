"""Engines of others: llama.cpp and OpenVINO, run with the Python of the environment that ``make peers`` makes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoq.model_bench.engine import Engine, Missing

_HERE = Path(__file__).parent
LLAMACPP_TYPES = ("Q4_0", "Q4_1", "Q4_K_M", "Q8_0")
OPENVINO_BITS = {"int8": 8, "int4": 4}
_TYPE = re.compile(r"(I?Q\d\w*|B?F16|F32)$", re.IGNORECASE)


def peer_engines(
    *,
    peers: Path,
    gguf: Path | None,
    others: Sequence[Path] = (),
    folders: Mapping[str, Path] | None = None,
    source: Path,
    work: Path,
    tokens: int,
    batch: int,
) -> tuple[list[Engine], list[Missing]]:
    """The engines of others for one model.

    Args:
        peers: the side environment.
        gguf: the model's GGUF file, from which files of other types are made; None if it has none.
        others: more GGUF files of it.
        folders: name → a folder that OpenVINO reads.
        source: the Hugging Face folder from which OpenVINO's folders are made; it may come to be later.
        work: where files and folders are made.
        tokens: that a cache holds for each row.
        batch: the most rows.

    Returns:
        Those that can run, and those that cannot.
    """
    room = {"context": tokens, "batch": batch}
    found = [_llamacpp(peers, kind, one, room) for kind, one in _files(gguf, others).items()]
    missing = []
    for kind in LLAMACPP_TYPES:
        if kind in _files(gguf, others):
            continue
        if gguf is None or kind == "Q4_1":
            reason = f"no GGUF file of this type: --gguf FILE{'' if gguf else ', or a .gguf file as MODEL'}"
            missing.append(Missing(name=f"llamacpp-{kind}", reason=reason))
            continue
        target = work / f"{gguf.stem}-{_stamp(gguf)}-{kind}.gguf"
        convert: dict[str, Any] = {"source": str(gguf.absolute()), "target": str(target.absolute()), "type": kind}
        found.append(_llamacpp(peers, kind, target, room, convert))
    for kind, bits in OPENVINO_BITS.items():
        target = work / f"{source.name}-openvino-{kind}"
        convert = {"source": str(source.absolute()), "target": str(target.absolute()), "bits": bits}
        found.append(_openvino(peers, kind, target, room, convert))
    found += [_openvino(peers, name, folder, room) for name, folder in (folders or {}).items()]
    python = peers / "bin" / "python"
    if python.is_file():
        return found, missing
    reason = f"no {python}: make peers"
    return [], missing + [Missing(name=one.name, reason=reason) for one in found]


def _files(gguf: Path | None, others: Sequence[Path]) -> dict[str, Path]:
    """Name → file, for those that are there already: types where the names tell them, else the files' names."""
    found: dict[str, Path] = {}
    for one in ([] if gguf is None else [gguf]) + list(others):
        kind = _TYPE.search(one.stem)
        name = kind.group().upper() if kind else one.stem
        found[one.stem if name in found else name] = one
    return found


def _stamp(file: Path) -> str:
    """Changes with the file."""
    status = file.stat()
    return f"{status.st_size:x}-{status.st_mtime_ns:x}"


def _llamacpp(
    peers: Path, kind: str, file: Path, room: Mapping[str, Any], convert: Mapping[str, Any] | None = None
) -> Engine:
    load = {"file": str(file.absolute()), **room}
    command = _command(peers, "worker_llamacpp.py")
    return Engine(name=f"llamacpp-{kind}", plan=kind, command=command, load=load, convert=convert, own=False)


def _openvino(
    peers: Path, kind: str, folder: Path, room: Mapping[str, Any], convert: Mapping[str, Any] | None = None
) -> Engine:
    load = {"folder": str(folder.absolute()), **room}
    command = _command(peers, "worker_openvino.py")
    return Engine(name=f"openvino-{kind}", plan=kind, command=command, load=load, convert=convert, own=False)


def _command(peers: Path, worker: str) -> tuple[str, ...]:
    return str((peers / "bin" / "python").absolute()), str(_HERE / worker)
