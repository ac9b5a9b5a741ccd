"""Study journals with lines that Optuna did not write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from malicious.generic import Attack


def _line(value: Any) -> Attack:
    """Add a line after those that are there."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda path: path.write_bytes(path.read_bytes() + data + b"\n")


def _lines(change: Callable[[dict[str, Any]], object]) -> Attack:
    """Change every line."""

    def attack(path: Path) -> None:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        for one in found:
            change(one)
        path.write_text("".join(json.dumps(one) + "\n" for one in found))

    return attack


def _attribute(name: str, value: Any) -> Attack:
    """Change an attribute of the study."""

    def change(line: dict[str, Any]) -> None:
        if name in line.get("user_attr", {}):
            line["user_attr"][name] = value

    return _lines(change)


def _definition(text: str) -> Attack:
    def change(line: dict[str, Any]) -> None:
        attribute = line.get("user_attr", {})
        for key in attribute:
            if key.startswith("definition:"):
                attribute[key] = text

    return _lines(change)


JOURNAL: dict[str, Attack] = {
    "a line of garbage": _line(b"garbage"),
    "a line nested 100,000 deep": _line(b"[" * 100_000),
    "a line that is a number": _line(7),
    "a line that is a list": _line([]),
    "an empty object": _line({}),
    "an unknown operation": _line({"op_code": 99, "worker_id": "w"}),
    "a study without directions": _line({"op_code": 0, "worker_id": "w", "study_name": "x"}),
    "a study of strange directions": _line({"op_code": 0, "worker_id": "w", "study_name": "x", "directions": ["up"]}),
    "a trial of no study": _line({"op_code": 4, "worker_id": "w", "study_id": 77}),
    "an attribute of a study that is missing": _line(
        {"op_code": 2, "worker_id": "w", "study_id": 77, "user_attr": {"a": 1}}
    ),
    "attributes that are a number": _line({"op_code": 2, "worker_id": "w", "study_id": 0, "user_attr": 7}),
    "a definition in a thousand million parts": _attribute("definition", {"part": "x", "chunks": 10**9}),
    "a definition that is a number": _attribute("definition", 7),
    "a definition without a number of parts": _attribute("definition", {"part": "x"}),
    "a definition that is null": _definition("null"),
    "a definition that is a list": _definition("[1, 2]"),
    "a definition of another schema": _definition('{"schema": 99}'),
    "a definition of nothing": _definition('{"schema": 1}'),
    "a definition of strange parts": _definition(
        '{"schema": 1, "problem": [], "families": 1, "uniform": 2, "budget": 3, "fidelities": "x", "seed": null, '
        '"fingerprint": 1, "known": 1, "identity": 1, "recipe": 1}'
    ),
    "a definition nested too deep": _definition('{"schema": 1, "problem": ' + "[" * 5000 + "]" * 5000 + "}"),
}
