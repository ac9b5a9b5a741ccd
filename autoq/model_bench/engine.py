"""The engines that are compared: what each is called, which process runs it and with what settings."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoq.errors import InputError

PREFILL, DECODE = "prefill", "decode"
OWN_WORKER = (sys.executable, "-m", "autoq.model_bench.worker_torch")
STOCK_ATTENTION, OWN_ATTENTION = "sdpa", "autoq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One engine, ready to start.

    Attributes:
        name: without spaces; options select engines by it.
        plan: how the weights are stored: a plan's or scheme's name, or the engine's own name for it.
        command: starts the worker; the program is an absolute path.
        load: fields of the request ``load``.
        convert: fields of the request ``convert``, which makes the file ``target`` that is loaded; None for none.
        phases: which it can be timed in.
        own: whether it is one of PyTorch's, of which the parts of a step can be told.
        judged: engines of one value have the same losses, which are measured once; empty for the name.
    """

    name: str
    plan: str
    command: tuple[str, ...] = OWN_WORKER
    load: Mapping[str, Any] = field(default_factory=dict)
    convert: Mapping[str, Any] | None = None
    phases: tuple[str, ...] = (PREFILL, DECODE)
    own: bool = True
    judged: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """An engine that is not measured.

    Attributes:
        name: of the engine.
        reason: why, and what would help.
    """

    name: str
    reason: str


def own_engines(
    model: str,
    *,
    plans: Mapping[str, Path | None],
    kv_caches: Sequence[str] = ("none",),
    cpp_wrapper: bool = False,
    torchao: Path | None = None,
) -> tuple[list[Engine], list[Missing]]:
    """The engines that run in PyTorch: bfloat16 as it comes, autoq's plans, and torchao's weight-only schemes.

    Args:
        model: the argument of ``autoq.loading.load_model``.
        plans: name → plan file, or None where the name is a scheme that all layers get.
        kv_caches: how the key-value cache of the plans' own decode step is stored.
        cpp_wrapper: whether there is, for each plan, one more engine whose decode step calls its kernels from C++.
        torchao: folder with the package torchao.

    Returns:
        Those that can run, and those that cannot.
    """
    found = [
        _own("bf16-eager", "none", model, kind="eager"),
        _own("bf16-compiled", "none", model, kind="static"),
        _own("bf16-compiled-nocache", "none", model, kind="nocache"),
        _own("bf16-attention", "none", model, kind="static", attention=OWN_ATTENTION),
        _own("bf16-decoder", "none", model, kind="decoder", attention=OWN_ATTENTION),
    ]
    for name, file in plans.items():
        source = {"scheme": name} if file is None else {"plan_file": str(file.absolute())}
        found.append(_own(f"autoq-{name}-stock", name, model, kind="static", **source))
        for cache in kv_caches:
            label = f"autoq-{name}" if cache == "none" else f"autoq-{name}-kv-{cache}"
            more = {"kind": "decoder", "attention": OWN_ATTENTION, "kv_cache": cache}
            found.append(_own(label, name, model, **more, **source))
        if cpp_wrapper:
            called = {"kind": "decoder", "attention": OWN_ATTENTION, "cpp_wrapper": True}
            found.append(_own(f"autoq-{name}-cpp", name, model, **called, **source))
    others = [
        _own(f"torchao-{kind}{end}", kind, model, kind="static", attention=attention, torchao=str(torchao), bits=bits)
        for kind, bits in (("int8", 8), ("int4", 4))
        for end, attention in (("", STOCK_ATTENTION), ("-attention", OWN_ATTENTION))
    ]
    if torchao is not None and (torchao / "torchao").is_dir():
        return found + others, []
    reason = f"no package torchao in {torchao}: make peers" if torchao else "no folder with torchao was given"
    return found, [Missing(name=one.name, reason=reason) for one in others]


def _own(name: str, plan: str, model: str, **load: Any) -> Engine:
    phases = (PREFILL,) if load["kind"] == "nocache" else (PREFILL, DECODE)
    load = {"attention": STOCK_ATTENTION, **load, "model": model}
    # Losses are measured uncompiled, once for the same weights; only the decoder of a plan holds others.
    alike = ("kind", "attention") if plan == "none" or load["kind"] != "decoder" else ()
    judged = {key: value for key, value in load.items() if key not in (*alike, "cpp_wrapper")}
    if plan != "none" and load["kind"] == "decoder":
        judged.setdefault("kv_cache", "none")
    return Engine(name=name, plan=plan, load=load, phases=phases, judged=repr(sorted(judged.items())))


def chosen(
    engines: Iterable[Engine], missing: Iterable[Missing], patterns: Sequence[str]
) -> tuple[list[Engine], list[Missing]]:
    """Those whose names fit one of the patterns (``*`` and ``?``); all of them without a pattern.

    Raises:
        InputError: if a pattern fits none, or two engines have one name.
    """
    ready, absent = list(engines), list(missing)
    names = [one.name for one in ready] + [one.name for one in absent]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError("engines have distinct names", got=", ".join(twice), fix="Name plans and files differently.")
    useless = [one for one in patterns if not fnmatch.filter(names, one)]
    if useless:
        there = f"There are: {', '.join(names)}."
        raise InputError("a pattern fits the name of an engine", where="--engine", got=useless[0], fix=there)

    def wanted(name: str) -> bool:
        return not patterns or any(fnmatch.fnmatchcase(name, one) for one in patterns)

    return [one for one in ready if wanted(one.name)], [one for one in absent if wanted(one.name)]
