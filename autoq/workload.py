"""What a model's linear layers see: which layers, on which shapes, how often, in which phase."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from autoq._files import write_atomic
from autoq.errors import InputError

SCHEMA = 1
_T = TypeVar("_T")


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
        if not self.name or not self.calls > 0:
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
    def from_json(cls, value: Mapping[str, Any], *, where: str = "workload") -> Workload:
        """Read ``to_json``'s object.

        Raises:
            InputError: if the schema is newer or a field is missing or unknown.
        """
        if value.get("schema") != SCHEMA:
            raise InputError(
                f"a workload has schema {SCHEMA}",
                where=where,
                got=value.get("schema"),
                fix="Record it again with this version of autoq.",
            )
        try:
            return cls(
                layers=_read(LayerInfo, value["layers"]),
                calls=_read(LinearCall, value["calls"]),
                phases=_read(PhaseInfo, value["phases"]),
                siblings=tuple(map(tuple, value.get("siblings", ()))),
            )
        except (KeyError, TypeError) as problem:
            raise InputError(
                "a workload has exactly the fields autoq writes", where=where, got=str(problem)
            ) from problem

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
        try:
            value = json.loads(Path(path).read_text())
        except (OSError, ValueError) as problem:
            raise InputError("a workload file holds JSON", where=str(path), got=str(problem)) from problem
        if not isinstance(value, dict):
            raise InputError("a workload file holds a JSON object", where=str(path))
        return cls.from_json(value, where=str(path))


def _read(kind: type[_T], rows: Iterable[Mapping[str, Any]]) -> tuple[_T, ...]:
    return tuple(kind(**row) for row in rows)
