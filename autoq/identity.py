"""What measured losses depend on, as hashes: tensors, the model's code and settings, the user's functions."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_DEPTH = 4  # objects within objects that are looked into
_BREADTH = 1000  # members of a list or mapping that are looked at
_NOT_COMPUTED_WITH = ("training", "_is_hf_initialized", "_name_or_path", "name_or_path", "transformers_version")


def content_hash(values: Any) -> str:
    """Sixteen hexadecimal digits of tensors' shapes, dtypes and bytes, and of plain values among them.

    Args:
        values: nested sequences and mappings; of a leaf that is neither a tensor nor plain the type counts.
    """
    digest = hashlib.sha256()
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            flat = leaf.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        else:
            digest.update((repr(leaf) if isinstance(leaf, _PLAIN) else _name(type(leaf))).encode())
    return digest.hexdigest()[:16]


def model_hash(model: nn.Module) -> str:
    """Sixteen hexadecimal digits of what a model computes besides its weights: its code, structure and settings.

    Seen are the source of its modules' classes, the plain values they keep, and a transformers configuration; not seen
    is what is reached from there through other objects.
    """
    modules = {}
    for name, module in model.named_modules():
        kept = {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN)}
        modules[name] = [_name(type(module)), _described(kept, 1)]
    code = {_name(kind): _source(kind) for kind in {type(module) for module in model.modules()}}
    to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
    return _digest([modules, code, _described(to_dict(), _DEPTH)])


def function_hash(function: Callable[..., Any]) -> str:
    """Sixteen hexadecimal digits of a function: its source, its defaults, and what it closes over or is bound to.

    What it reads from global variables is not seen.
    """
    return _digest(_described(function, _DEPTH))


def _described(value: Any, depth: int) -> Any:
    """A JSON value that differs where the value does, as far as it is looked into."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return content_hash(value)
    if depth == 0 or inspect.isclass(value) or inspect.ismodule(value):
        return _name(value if inspect.isclass(value) else type(value))
    if isinstance(value, Mapping):
        kept = [(key, one) for key, one in value.items() if key not in _NOT_COMPUTED_WITH][:_BREADTH]
        return sorted([repr(key), _described(one, depth - 1)] for key, one in kept)
    found = [_described(one, depth - 1) for one in _parts(value)]
    return sorted(found, key=repr) if isinstance(value, set | frozenset) else found


def _parts(value: Any) -> list[Any]:
    """What a value consists of."""
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)[:_BREADTH]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if inspect.ismethod(value):
        return [value.__func__, value.__self__]
    if inspect.isfunction(value):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_full(cell)]
        return [value.__qualname__, _source(value), value.__defaults__, value.__kwdefaults__, cells]
    return [_name(type(value)), _source(type(value)), getattr(value, "__dict__", {})]


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _source(thing: Any) -> str:
    """A class's or function's source; where there is none, what it was compiled to."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        functions = [thing, *(vars(thing).values() if inspect.isclass(thing) else ())]
        codes = [code for one in functions if (code := getattr(one, "__code__", None)) is not None]
        return repr([(code.co_code, [repr(c) for c in code.co_consts if isinstance(c, _PLAIN)]) for code in codes])


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
