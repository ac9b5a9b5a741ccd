"""What a model's linear layers see: which layers, on which shapes, how often, in which phase."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from autoq._files import read_json, shown, write_atomic
from autoq.errors import InputError

SCHEMA = 1
_T = TypeVar("_T")
_LIMIT_BYTES = 1 << 26  # a hundred layers in three phases take 60 KB
_FIX = "Record it again with this version of autoq."
# A field's annotation → the types of its JSON value, and their name.
_JSON: dict[object, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a string"),
    "str | None": ((str, type(None)), "a string or null"),
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "tuple[str, ...]": ((list,), "a list of strings"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInfo:
    """One linear layer of the model.

    Attributes:
        name: qualified name in the uncompiled model.
        k: input features.
        n: output features.
        dtype: the weight's dtype, such as ``bfloat16``.
        device: the weight's device type, such as ``cpu``.
        bias: whether it has one.
        aliases: other names under which the same module appears.
        tied_to: name of another parameter that shares the weight (an embedding), or None.
        reason: why autoq leaves the layer alone, or None when it may be quantized.
    """

    name: str
    k: int
    n: int
    dtype: str
    device: str
    bias: bool
    aliases: tuple[str, ...] = ()
    tied_to: str | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.k < 1 or self.n < 1:
            raise InputError(
                "a layer has at least one input and one output",
                where=self.name,
                got=f"k={self.k}, n={self.n}",
            )
        object.__setattr__(self, "aliases", tuple(self.aliases))


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCall:
    """Calls of one layer on one shape within one request of a phase.

    Attributes:
        layer: the layer's name.
        phase: the phase's name.
        m: rows of the activation (the product of its leading dimensions).
        dtype: the activation's dtype.
        count: how often per pass over the phase's inputs.
    """

    layer: str
    phase: str
    m: int
    dtype: str
    count: int

    def __post_init__(self) -> None:
        if self.m < 0 or self.count < 1:
            raise InputError(
                "a call has m >= 0 rows and happens at least once",
                where=self.layer,
                got=f"m={self.m}, count={self.count}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseInfo:
    """A phase by name and weight.

    Attributes:
        name: for example ``prefill`` or ``decode``.
        calls: passes per request; a request's latency is the sum over phases of calls × time.
        synthesised: whether autoq made the inputs itself rather than the user.
    """

    name: str
    calls: float = 1.0
    synthesised: bool = False

    def __post_init__(self) -> None:
        if not self.name or not 0 < self.calls < math.inf:
            raise InputError(
                "a phase has a name and a positive number of calls",
                got=f"name={self.name!r}, calls={self.calls}",
            )


@dataclass(frozen=True, slots=True)
class Phase:
    """Inputs the model is tuned for, given by the user.

    Args:
        inputs: one batch, or a list of batches. A batch is a tensor (the first positional argument), a tuple
            (positional arguments) or a mapping (keyword arguments).
        calls: passes of this phase per request (a prompt of one pass and an answer of 128 tokens are
            ``calls=1`` and ``calls=128``).
        synthesised: set by autoq on the phases it makes up.
    """

    inputs: Any
    calls: float = 1.0
    synthesised: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not self.calls > 0:
            raise InputError("a phase's calls must be positive", got=self.calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The recorder's result; the profiler's and the search's input.

    Attributes:
        layers: every linear layer found, quantizable or not.
        calls: per layer, phase and shape.
        phases: in the order recorded.
        siblings: groups of two layers or more that belong together: always called with the same inputs (q, k and v of
            an attention), or of the same role in a block's experts. A layer is in one group at most.
    """

    layers: tuple[LayerInfo, ...]
    calls: tuple[LinearCall, ...]
    phases: tuple[PhaseInfo, ...]
    siblings: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        names = {layer.name for layer in self.layers}
        phases = {phase.name for phase in self.phases}
        if len(names) != len(self.layers) or len(phases) != len(self.phases):
            raise InputError("layers and phases have distinct names", where="workload")
        for call in self.calls:
            if call.layer not in names or call.phase not in phases:
                raise InputError(
                    "a call names a known layer and phase",
                    where="workload",
                    got=f"{call.layer!r} in {call.phase!r}",
                )
        grouped = [layer for group in self.siblings for layer in group]
        if len(set(grouped)) != len(grouped) or not names.issuperset(grouped) or any(len(g) < 2 for g in self.siblings):
            raise InputError(
                "siblings are groups of two known layers or more, a layer in one of them",
                where="workload",
                got=[list(group) for group in self.siblings],
            )

    def layer(self, name: str) -> LayerInfo:
        """The layer of that name.

        Raises:
            InputError: if there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise InputError("the workload has no such layer", where=name)

    @property
    def quantizable(self) -> tuple[LayerInfo, ...]:
        """The layers that may be quantized and were called at least once."""
        called = {call.layer for call in self.calls}
        return tuple(one for one in self.layers if one.reason is None and one.name in called)

    def calls_of(self, layer: str) -> tuple[LinearCall, ...]:
        """The layer's calls, in all phases."""
        return tuple(call for call in self.calls if call.layer == layer)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with a schema number."""
        return {
            "schema": SCHEMA,
            "layers": [asdict(one) | {"aliases": list(one.aliases)} for one in self.layers],
            "calls": [asdict(one) for one in self.calls],
            "phases": [asdict(one) for one in self.phases],
            "siblings": [list(group) for group in self.siblings],
        }

    @classmethod
    def from_json(cls, value: Any, *, where: str = "workload") -> Workload:
        """Read ``to_json``'s object, strictly.

        Raises:
            InputError: with the JSON path of a field that is missing, unknown or of the wrong type.
        """
        if not isinstance(value, dict):
            raise InputError("a workload is a JSON object", where=where, got=type(value).__name__, fix=_FIX)
        if type(value.get("schema")) is not int or value["schema"] != SCHEMA:
            raise InputError(f"$.schema is {SCHEMA}", where=where, got=shown(value.get("schema")), fix=_FIX)
        sections = {"layers": LayerInfo, "calls": LinearCall, "phases": PhaseInfo}
        unknown = sorted(set(value) - {"schema", "siblings", *sections})
        if unknown:
            raise InputError("$ has exactly the fields autoq writes", where=where, got=shown(unknown[0]), fix=_FIX)
        read = {name: _rows(kind, value.get(name), f"$.{name}", where) for name, kind in sections.items()}
        siblings = _list(value.get("siblings", []), "$.siblings", where)
        groups = [_names(group, f"$.siblings[{i}]", where) for i, group in enumerate(siblings)]
        try:
            return cls(layers=read["layers"], calls=read["calls"], phases=read["phases"], siblings=tuple(groups))
        except InputError as problem:
            raise InputError(problem.rule, where=where, got=problem.got, fix=_FIX) from problem

    def save(self, path: str | Path) -> None:
        """Write the JSON file, atomically."""
        text = json.dumps(self.to_json(), indent=1) + "\n"
        write_atomic(Path(path), lambda temporary: temporary.write_text(text), InputError)

    @classmethod
    def load(cls, path: str | Path) -> Workload:
        """Read a file that ``save`` wrote.

        Raises:
            InputError: if the file is missing, cut or not a workload.
        """
        value = read_json(path, InputError, what="a workload file", limit_bytes=_LIMIT_BYTES, fix=_FIX)
        return cls.from_json(value, where=str(path))


def _rows(kind: type[Any], rows: Any, path: str, where: str) -> tuple[Any, ...]:
    """A list of JSON objects as dataclasses."""
    return tuple(_row(kind, row, f"{path}[{i}]", where) for i, row in enumerate(_list(rows, path, where)))


def _row(kind: type[_T], row: Any, path: str, where: str) -> _T:
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(row, dict) or set(row) - set(known):
        got = shown(sorted(set(row) - set(known))[0]) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{path} is an object of {', '.join(known)}", where=where, got=got, fix=_FIX)
    for name, one in known.items():
        types, text = _JSON[one.type]
        if name not in row and (one.default is not MISSING or one.default_factory is not MISSING):
            continue
        if name not in row or type(row[name]) not in types:
            got = shown(row[name]) if name in row else "nothing"
            raise InputError(f"{path}.{name} is {text}", where=where, got=got, fix=_FIX)
        if types == (list,):
            _names(row[name], f"{path}.{name}", where)
    try:
        return kind(**row)
    except InputError as problem:
        raise InputError(f"{path}: {problem.rule}", where=where, got=problem.got, fix=_FIX) from problem


def _list(value: Any, path: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{path} is a list", where=where, got=type(value).__name__, fix=_FIX)
    return value


def _names(value: Any, path: str, where: str) -> tuple[str, ...]:
    names = _list(value, path, where)
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{path} is a list of strings", where=where, got=shown(names), fix=_FIX)
    return tuple(names)
