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
_NOT_COMPUTED_WITH = (
    "training",
    "config",
    "generation_config",
    "_is_hf_initialized",
    "_name_or_path",
    "name_or_path",
    "transformers_version",
)


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

    Seen are the source of its modules' classes, what their attributes hold, some levels deep, and a transformers
    configuration.
    """
    modules = {}
    for name, module in model.named_modules():
        kept = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        modules[name] = [_name(type(module)), _described(kept, 3)]
    code = {_name(kind): _described(_code(kind), _DEPTH) for kind in {type(module) for module in model.modules()}}
    configuration = getattr(model, "config", None)
    known: list[Any] = [getattr(configuration, "to_dict", dict)(), getattr(configuration, "_attn_implementation", None)]
    return _digest([modules, code, _described(known, _DEPTH)])


def function_hash(function: Callable[..., Any]) -> str:
    """Sixteen hexadecimal digits of a function: its code, and what it reads, closes over or is bound to."""
    return _digest(_described(function, _DEPTH))


def _described(value: Any, depth: int) -> Any:
    """A JSON value that differs where the value does, as far as it is looked into."""
    leaf = _leaf(value, depth)
    if leaf is not None:
        return leaf
    if isinstance(value, Mapping):
        # What ends in `_cached` is a state, such as the longest row that rotary embeddings have seen.
        ignored = [key for key in value if key in _NOT_COMPUTED_WITH or str(key).endswith("_cached")]
        kept = [(key, one) for key, one in value.items() if key not in ignored][:_BREADTH]
        return sorted([repr(key), _described(one, depth - 1)] for key, one in kept)
    found = [_described(one, depth - 1) for one in _parts(value)]
    return sorted(found, key=repr) if isinstance(value, set | frozenset) else found


def _leaf(value: Any, depth: int) -> str | None:
    """What stands for a value that is not looked into; None for one that is."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return content_hash(value)
    if hasattr(value, "__array_interface__"):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if inspect.isclass(value) or inspect.isbuiltin(value) or inspect.ismethoddescriptor(value):
        return _name(value)
    if inspect.ismodule(value):
        return str(value.__name__)
    return None if depth else _name(type(value))


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
        read = [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
        return [value.__qualname__, *_code(value), value.__defaults__, value.__kwdefaults__, cells, read]
    slots = {name: getattr(value, name, None) for name in getattr(type(value), "__slots__", ())}
    return [_name(type(value)), *_code(type(value)), getattr(value, "__dict__", {}), slots]


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _code(thing: Any) -> list[Any]:
    """The source of a class or function, if there is any, and what its functions were compiled to."""
    try:
        source = inspect.getsource(thing)
    except (OSError, TypeError):
        source = ""
    functions = [thing, *(vars(thing).values() if inspect.isclass(thing) else ())]
    codes = [code for one in functions if (code := getattr(one, "__code__", None)) is not None]
    return [
        source,
        [[code.co_code, [c for c in code.co_consts if isinstance(c, _PLAIN)], code.co_names] for code in codes],
    ]


def _name(kind: Any) -> str:
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', getattr(kind, '__name__', ''))}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
