"""Which loads of a kernel read the weight, and how many bytes each takes at once.

Triton's last intermediate form (TTGIR) still has the kernel's arguments by name. A load belongs to every argument that
its address is computed from; its place in the source, which the assembly repeats, says which machine loads it became.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

Place = tuple[str, int, int]  # file name, line, column

_DEFINITION = re.compile(r"^\s*(%[\w.$-]+)(?::\d+)?(?:, %[\w.$-]+(?::\d+)?)* = (.*)$")
_VALUE = re.compile(r"%[\w.$-]+")
_CARRIED = re.compile(r"(%[\w.$-]+) = (%[\w.$-]+)")
_LOAD = re.compile(r"^(?:tt\.load|ttg\.async_copy_global_to_local|amdg\.buffer_load\w*|amdg?\w*\.async\w*load\w*) ")
_LOCATION_OF = re.compile(r"loc\((#loc\d*)\)\s*$")
_LOCATION = re.compile(r"^(#loc\d*) = loc\((.*)\)$")
_FILE_LINE = re.compile(r'^"([^"]+)":(\d+):(\d+)')
_ALIAS = re.compile(r"#loc\d*")

_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]+)"')
_AT = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)")
_PTX_LOAD = re.compile(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)\b")
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^\[]*\[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)")
_AMD_LOAD = re.compile(r"^\s*(?:buffer|global|flat)_load_(\w+)")
_AMD_BYTES = {
    "dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "ubyte": 1, "sbyte": 1,
    "lds_dwordx4": 16, "lds_dword": 4,
    "short_d16": 2, "short_d16_hi": 2, "ubyte_d16": 1, "ubyte_d16_hi": 1, "sbyte_d16": 1, "sbyte_d16_hi": 1,
}  # fmt: skip


def places_reading(ttgir: str, names: Iterable[str]) -> frozenset[Place]:
    """Where in the source the loads are whose address depends on one of the arguments.

    Args:
        ttgir: the text of a kernel.
        names: of arguments.
    """
    wanted = {f"%{name}" for name in names}
    operands = _operands(ttgir)
    locations = _locations(ttgir)
    found = set()
    for line in ttgir.splitlines():
        match = _DEFINITION.match(line)
        if match and _LOAD.match(match[2]) and _depends(_VALUE.findall(match[2]), wanted, operands):
            alias = _LOCATION_OF.search(line)
            place = _place(locations, alias[1]) if alias else None
            if place:
                found.add(place)
    return frozenset(found)


def _operands(ttgir: str) -> dict[str, list[str]]:
    """What each value is computed from; nothing behind a load, since an address comes from numbers alone."""
    operands: dict[str, list[str]] = {}
    for line in ttgir.splitlines():
        match = _DEFINITION.match(line)
        if not match:
            continue
        name, body = match[1], match[2].split(" loc(")[0]
        if _LOAD.match(body):
            operands[name] = []
            continue
        carried = _CARRIED.findall(body)
        if carried:  # a loop: what it carries starts as, and depends on nothing else than, what is passed in
            for inner, outer in carried:
                operands.setdefault(inner, []).append(outer)
        operands.setdefault(name, []).extend(_VALUE.findall(body))
    return operands


def _depends(start: list[str], wanted: set[str], operands: Mapping[str, list[str]]) -> bool:
    seen, waiting = set(), list(start)
    while waiting:
        name = waiting.pop().split("#")[0]
        if name in wanted:
            return True
        if name not in seen:
            seen.add(name)
            waiting.extend(operands.get(name, ()))
    return False


def _locations(ttgir: str) -> dict[str, str]:
    return {match[1]: match[2] for match in map(_LOCATION.match, ttgir.splitlines()) if match}


def _place(locations: Mapping[str, str], alias: str) -> Place | None:
    """The innermost function's place behind a location: names and callers are left aside."""
    for _ in range(32):
        body = locations.get(alias, "")
        match = _FILE_LINE.match(body)
        if match:
            return PurePosixPath(match[1]).name, int(match[2]), int(match[3])
        inner = _ALIAS.search(body)
        if not inner:
            return None
        alias = inner[0]
    return None


def loads(assembly: str) -> list[tuple[int, Place | None]]:
    """Every load from global memory in PTX or AMD's assembly: its bytes, and its place in the source."""
    files, found, at = {}, [], None
    inside = fixed = False
    for line in assembly.splitlines():
        if match := _FILE.match(line):
            files[match[1]] = PurePosixPath(match[2]).name
        elif "inline asm" in line:  # LLVM counts the lines of inline assembly on from its place: the first one holds
            inside, fixed = "begin" in line, False
        elif match := _AT.match(line):
            if not fixed:
                at = match[1], int(match[2]), int(match[3])
            fixed = inside
        elif bytes_ := _bytes_of(line):
            found.append((bytes_, at))
    return [(size, (files.get(at[0], at[0]), at[1], at[2]) if at else None) for size, at in found]


def _bytes_of(line: str) -> int:
    if match := _PTX_LOAD.search(line):
        return int(match[1] or 1) * int(match[2]) // 8
    if match := _PTX_COPY.search(line):
        return int(match[1], 0)
    if match := _AMD_LOAD.match(line):
        return _AMD_BYTES.get(match[1], 0)
    return 0


def widths(found: Iterable[tuple[int, Place | None]], places: frozenset[Place] | None = None) -> dict[int, int]:
    """How many loads take how many bytes.

    Args:
        found: as from `loads`.
        places: count only the loads there; None counts all.
    """
    return dict(sorted(Counter(size for size, at in found if places is None or at in places).items()))
