"""What stands in a transformers configuration: every setting with its JSON path, and which would fetch something."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# A part of the model by name, which transformers looks up in the Hub, or in timm, while it builds the model.
BACKBONE = re.compile(r"use_pretrained_backbone|use_timm_backbone|backbone|backbone_kwargs|backbone_checkpoint")
IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation\w*")


def settings(value: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Every setting as (JSON path, key, value): those of objects within, too.

    A list is yielded under its key, and so is every list or object in it. The words of ``label2id`` are no settings.
    """
    todo: list[tuple[str, str, Any]] = [("$", "", value)]
    while todo:
        where, key, one = todo.pop()
        if key:
            yield where, key, one
        if isinstance(one, Mapping) and key != "label2id":
            todo += [(f"{where}.{name}", name, item) for name, item in one.items()]
        elif isinstance(one, list):
            todo += [(f"{where}[{at}]", key, item) for at, item in enumerate(one) if isinstance(item, dict | list)]


def fetched(value: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The first setting with which transformers would fetch code or weights by name: (JSON path, value)."""
    for where, key, one in settings(value):
        if BACKBONE.fullmatch(key) and one not in (None, False):
            return where, one
        # Plain words are transformers' own; "owner/name" is a kernel of the Hub.
        named = one.values() if isinstance(one, Mapping) else (one,)
        if IMPLEMENTATION.fullmatch(key) and any(isinstance(name, str) and "/" in name for name in named):
            return where, one
    return None
