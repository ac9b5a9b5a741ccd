"""What a plan file may hold, key by key, and how older files are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autoq import plugins
from autoq._files import shown
from autoq.errors import CandidateError, PlanError
from autoq.plan_text import entry, layer_path, step
from autoq.scheme import FIELDS, Choices

SCHEMA = 2
SECTIONS = ("layers", "units", "phases", "kernels", "model", "provenance")
# They hold for one assignment only.
FIGURES = ("measured", "predicted", "certificate", "decoding", "remeasured", "retargeted")

_Check = Callable[[Any, str], None]


def upgraded(value: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a file of schema 1, plain, as those of this schema.

    Schema 1 had no hash and let anything stand in ``provenance`` and ``kernels``: what may not stand there now moves to
    ``provenance.schema_1``, whose presence also says that the figures cannot be checked.
    """
    found = dict(value)
    provenance = found.get("provenance", {})
    if not isinstance(provenance, dict):
        return found
    kept = {key: one for key, one in provenance.items() if key in _SCHEMA_1 and _holds(_SCHEMA_1[key], one)}
    aside = {key: one for key, one in provenance.items() if key not in kept}
    kernels = found.get("kernels")
    if isinstance(kernels, dict) and not _holds(_SECTION_CHECKS["kernels"], kernels):
        aside["$.kernels"] = found.pop("kernels")
    if provenance or aside:
        found["provenance"] = kept | {"schema_1": aside}
    return found


def without_figures(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of an assignment that was changed by hand: marked, and without what only held before."""
    return {key: value for key, value in provenance.items() if key not in FIGURES} | {"edited": True}


def check_sections(value: Mapping[str, Any]) -> None:
    """Refuse unknown sections and keys, and values of a wrong type at any depth; the schemes are left out.

    Raises:
        PlanError: with the JSON path.
    """
    for key, one in value.items():
        if key not in _SECTION_CHECKS:
            raise PlanError(f"{step('$', key)} is not a section of a plan", fix=f"They are {', '.join(SECTIONS)}.")
        _SECTION_CHECKS[key](one, f"$.{key}")


def check_scheme(name: str, value: Any, made_with: Mapping[str, str] | None = None) -> None:
    """Refuse a layer's value unless it is a scheme of autoq's or of an installed plugin, with fields that it can have.

    Args:
        name: the layer's.
        value: the scheme as it stands in the file.
        made_with: scheme → package that had it where the plan was made; named if it is missing here.

    Raises:
        PlanError: with the JSON path.
    """
    path = layer_path(name)
    if not isinstance(value, dict):
        raise PlanError(f'{path} is an object such as {{"scheme": "int8wo"}}', got=shown(value))
    scheme = value.get("scheme")
    if not isinstance(scheme, str):
        raise PlanError(f"{path}.scheme is one of {', '.join(FIELDS)}", got=shown(scheme))
    fields = FIELDS[scheme] if scheme in FIELDS else _plugin_fields(scheme, path, (made_with or {}).get(scheme, ""))
    for field, one in value.items():
        if field == "scheme":
            continue
        if field not in fields:
            fix = f"Its fields are {', '.join(fields)}." if fields else "It has none."
            raise PlanError(f"{step(path, field)} is no field of {scheme}", fix=fix)
        if not any(type(one) is type(choice) and one == choice for choice in fields[field]):
            raise PlanError(f"{path}.{field} is one of {', '.join(map(str, fields[field]))}", got=shown(one))


def _plugin_fields(scheme: str, path: str, package: str) -> Choices:
    """The fields of a scheme that is none of autoq's own."""
    rule = f"{path}.scheme is one of {', '.join(FIELDS)}, or of an installed plugin"
    if not plugins.is_installed(scheme):
        fix = f"The plan was made with the package {shown(package)}: install it, if you trust it." if package else ""
        raise PlanError(rule, got=shown(scheme), fix=fix)
    try:
        return plugins.choices(scheme)
    except CandidateError as problem:
        raise PlanError(rule, got=f"{shown(scheme)}, whose plugin does not work: {problem}") from problem


def _holds(check: _Check, value: Any) -> bool:
    try:
        check(value, "$")
    except PlanError:
        return False
    return True


def _fail(path: str, what: str, value: Any) -> PlanError:
    return PlanError(f"{path} is {what}", got=shown(value))


def _text(value: Any, path: str) -> None:
    if not isinstance(value, str):
        raise _fail(path, "text", value)


def _flag(value: Any, path: str) -> None:
    if not isinstance(value, bool):
        raise _fail(path, "true or false", value)


def _number(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _fail(path, "a number", value)


def _count(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _fail(path, "a whole number, not negative", value)


def _size(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _fail(path, "a positive whole number", value)


def _calls(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise _fail(path, "a positive number of calls", value)


def _seed(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _fail(path, "a whole number", value)


def _fact(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _fail(path, "text or a number", value)


def _anything(value: Any, path: str) -> None:
    """For what nothing reads; `plain` has seen that it is JSON."""


def _or_null(check: _Check) -> _Check:
    def checked(value: Any, path: str) -> None:
        if value is not None:
            check(value, path)

    return checked


def _each(check: _Check, what: str = "an object") -> _Check:
    def checked(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise _fail(path, what, value)
        for key, one in value.items():
            check(one, entry(path, key))

    return checked


def _list(check: _Check, what: str = "a list") -> _Check:
    def checked(value: Any, path: str) -> None:
        if not isinstance(value, list):
            raise _fail(path, what, value)
        for index, one in enumerate(value):
            check(one, f"{path}[{index}]")

    return checked


def _record(known: Mapping[str, _Check], required: tuple[str, ...] = ()) -> _Check:
    def checked(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise _fail(path, "an object", value)
        for key in required:
            if key not in value:
                raise PlanError(f"{path} has {', '.join(required)}", got=shown(sorted(value)))
        for key, one in value.items():
            if key not in known:
                raise PlanError(f"{step(path, key)} is not known there", fix=f"Known are {', '.join(known)}.")
            known[key](one, step(path, key))

    return checked


_FIGURE = _or_null(_number)  # null where it is no finite number
_SHARE = ("loss_delta", "loss_low", "loss_high")
_TIMES = ("time_us", "low_us", "high_us", "baseline_us", "baseline_low_us", "baseline_high_us", "none_us")
_LATENCIES = ("latency_us", "baseline_latency_us", "none_latency_us")
_LIMITS = {
    "objective": _text,
    "max_increase": _FIGURE,
    "max_latency_us": _FIGURE,
    "max_weight_bytes": _FIGURE,
}
_IDENTITY = dict.fromkeys(("class", "weights", "shapes"), _text)
_MODEL_LAYER = _record({"n": _size, "k": _size, "dtype": _text}, required=("n", "k"))
_PHASE = _record(dict.fromkeys((*_TIMES, *_SHARE), _FIGURE) | {"calls": _calls, "compiled": _text})
_DECODING = _record(
    dict.fromkeys((*_SHARE, "prefill_us", "decode_us", "request_us"), _FIGURE)
    | {"attention": _text, "kv_cache": _text, "kv_bytes": _count, "chosen": _flag}
)
PROVENANCE: Mapping[str, _Check] = {
    "autoq": _text,
    "created": _text,
    "comment": _text,
    "seed": _seed,
    "study": _text,
    "request": _record(
        _LIMITS | {"max_degradation": _FIGURE, "ties": _or_null(_list(_text)), "kv_cache": _list(_text)}
    ),
    "budget": _record(_LIMITS | {"metric": _text, "unit": _text, "text": _text, "baseline": _FIGURE}),
    "measured": _record(
        dict.fromkeys((*_SHARE, *_LATENCIES, "baseline_loss"), _FIGURE)
        | dict.fromkeys(("samples", "weight_bytes", "baseline_weight_bytes"), _count)
        | {"phases": _each(_PHASE)}
    ),
    "predicted": _record(
        dict.fromkeys(("loss_delta", "latency_us", "weight_bytes"), _FIGURE)
        | dict.fromkeys(("phases", "latency_error"), _each(_FIGURE))
    ),
    "certificate": _or_null(_record(dict.fromkeys(("value", "bound", "gap", "loss_error"), _FIGURE))),
    "device": _each(_fact),
    "versions": _each(_text),
    "model": _record(_IDENTITY | {"layers": _each(_MODEL_LAYER), "left_alone": _each(_each(_number))}),
    "notes": _list(_text),
    "decoding": _list(_DECODING),
    "plugins": _each(_text),
    "profile_from": _record({"profile": _text, "device": _text, "shapes": _count, "verified": _flag}),
    "edited": _flag,
    "retargeted": _flag,
    "remeasured": _record({"created": _text, "loss_device": _each(_fact)}),
    "schema_1": _each(_anything),
}
# As schema 1 meant them: it knew no layers of the model, and `schema_1` was anybody's word.
_SCHEMA_1 = {**PROVENANCE, "model": _record(_IDENTITY)}
del _SCHEMA_1["schema_1"]
_SECTION_CHECKS: Mapping[str, _Check] = {
    "layers": _each(_anything, "an object of layer name to scheme"),
    "units": _each(_list(_text, "a list of layers of the plan")),
    "phases": _each(_calls),
    "kernels": _each(_each(_text)),
    "model": _each(_anything),
    "provenance": _record(PROVENANCE),
}
