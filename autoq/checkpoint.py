"""Quantized models as folders: safetensors for all tensors, the plan, and a manifest with hashes. No pickles."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from autoq.errors import AutoqError, CheckpointError
from autoq.modules import QuantLinear, find_linears, quantized_layers, replace_modules, unwrap
from autoq.plan import Plan, plain_name
from autoq.quant_linear import assemble

SCHEMA = 1
FORMAT = "autoq-checkpoint"
MANIFEST = "autoq.json"
TENSORS = "model.safetensors"
PLAN = "plan.json"
CONFIG = "config.json"  # the model's own, when it has one (transformers)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def save_quantized(model: nn.Module, directory: str | Path) -> None:
    """Write a model, quantized or not, as a folder that ``load_quantized`` reads.

    ``model.safetensors`` has every parameter and buffer (also those that ``state_dict`` leaves out) and the quantized
    weights' canonical sections; tied tensors lie there once. ``plan.json`` is the plan the model carries,
    ``config.json`` the model's own configuration if it has one, ``autoq.json`` the layers' shapes, the ties and the
    files' hashes. The folder appears when it is complete. An earlier checkpoint of that name is replaced; another
    folder with content is not.

    Args:
        model: plain, compiled or wrapped.
        directory: the folder to make.

    Raises:
        CheckpointError: if the folder cannot be written or holds something else, or a tensor cannot be stored.
    """
    root, target = unwrap(model), Path(directory)
    tensors, tied = _tensors(root)
    manifest = {
        "format": FORMAT,
        "schema": SCHEMA,
        "autoq": version("autoq"),
        "layers": {name: _describe(layer) for name, layer in quantized_layers(root).items()},
        "tied": tied,
    }
    _check_target(target)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        save_file(tensors, temporary / TENSORS, metadata={"format": "pt"})
        (temporary / PLAN).write_text(json.dumps(_plan(root), indent=1) + "\n", encoding="utf-8")
        to_json = getattr(getattr(root, "config", None), "to_json_string", None)
        if callable(to_json):
            (temporary / CONFIG).write_text(str(to_json()), encoding="utf-8")
        manifest["files"] = {path.name: _identity(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _publish(temporary, target)
    except (OSError, safetensors.SafetensorError) as problem:
        raise CheckpointError(
            "the folder must be writable",
            where=str(target),
            got=f"{type(problem).__name__}: {problem}",
            fix="Choose another folder, or free space and permissions there.",
        ) from problem
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def load_quantized(model_or_factory: nn.Module | Callable[[], nn.Module], directory: str | Path) -> nn.Module:
    """Read a folder of ``save_quantized`` into a model; the outputs are bit-equal to the saved model's.

    Args:
        model_or_factory: a float model of the same structure, changed in place; or a function that makes one. It is
            called with the meta device as default, so that its float weights are never allocated, and once more
            without where that fails (a model that computes with its tensors while it is built).
        directory: the folder.

    Returns:
        The model; one that a factory made is on the CPU and in eval mode.

    Raises:
        CheckpointError: if a file is missing, cut or changed, or the checkpoint is of another model; the model is
            unchanged then.
        CandidateError: if a scheme is unknown to this version.
    """
    folder = Path(directory)
    manifest = _read_manifest(folder)
    plan = Plan.load(folder / PLAN)
    tensors = _read_tensors(folder / TENSORS)
    if isinstance(model_or_factory, nn.Module):
        model = model_or_factory
        _install(unwrap(model), manifest, tensors, plan)
        return model
    model = _skeleton(model_or_factory)
    _install(unwrap(model), manifest, tensors, plan)
    return model.eval()


def _plan(root: nn.Module) -> Any:
    text = next((layer.plan_json for layer in quantized_layers(root).values() if layer.plan_json), None)
    if text is not None:
        return json.loads(text)
    layers = {name: layer.candidate.scheme for name, layer in quantized_layers(root).items()}
    return Plan(layers=layers).to_json()


def _describe(layer: QuantLinear) -> dict[str, Any]:
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
        "dtype": str(layer.dtype).removeprefix("torch."),
    }


def _holdings(root: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Name → (module, attribute, tensor) of all parameters and buffers but the packed weights, tied ones each time."""
    found: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for path, module in root.named_modules():
        held = dict(module._parameters)
        if not isinstance(module, QuantLinear):
            held |= module._buffers
        for leaf, tensor in held.items():
            if tensor is not None:
                found[plain_name(f"{path}.{leaf}" if path else leaf)] = (module, leaf, tensor)
    return found


def _tensors(root: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Everything to store by name, and name → stored name of what is tied to something stored."""
    for name, module in root.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError("all of a model's state is in tensors", where=name, got="a module with extra state")
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    places: dict[tuple[Any, ...], str] = {}
    for name, (_, _, tensor) in _holdings(root).items():
        if tensor.is_meta:
            raise CheckpointError("every tensor has values", where=name, got="a tensor on the meta device")
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = places.setdefault(place, name) if tensor.numel() else name
        if first != name:
            tied[name] = first
        else:
            tensors[name] = tensor.detach().contiguous()
    for name, layer in quantized_layers(root).items():
        tensors |= {f"{name}.{section}": one for section, one in layer.sections().items()}
    return _unshared(tensors), tied


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all but the first of the tensors that overlap in one storage: safetensors stores each by itself."""
    ends: dict[int, list[tuple[int, int]]] = {}
    result = {}
    for name, tensor in tensors.items():
        taken = ends.setdefault(tensor.untyped_storage().data_ptr(), [])
        start = tensor.data_ptr()
        overlaps = any(start < one_end and one < start + tensor.nbytes for one, one_end in taken)
        taken.append((start, start + tensor.nbytes))
        result[name] = tensor.clone() if overlaps else tensor
    return result


def _identity(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": os.fstat(stream.fileno()).st_size, "sha256": digest}


def _check_target(target: Path) -> None:
    taken = target.exists() and not (target.is_dir() and ((target / MANIFEST).is_file() or not any(target.iterdir())))
    if taken:
        raise CheckpointError(
            "a checkpoint replaces only a checkpoint or an empty folder",
            where=str(target),
            got="a folder with other content" if target.is_dir() else "a file",
            fix="Choose another folder.",
        )


def _publish(temporary: Path, target: Path) -> None:
    """Rename a complete folder to its name; an earlier one of that name is moved aside first and removed last."""
    for path in temporary.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    temporary.chmod(0o755)
    if not target.exists():
        temporary.rename(target)
        return
    aside = temporary.with_suffix(".old")
    target.rename(aside)
    try:
        temporary.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with its fields' types and the files' hashes checked."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise CheckpointError(
            f"a quantized checkpoint is a folder with {MANIFEST}",
            where=str(folder),
            got=str(problem),
            fix="Pass the folder that autoq.save_quantized wrote.",
        ) from problem
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f'"format" is "{FORMAT}"', where=str(path))
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(
            f"this autoq reads checkpoints of schema {SCHEMA}",
            where=str(path),
            got=manifest.get("schema"),
            fix="Upgrade autoq.",
        )
    sections = {name: manifest.get(name) for name in ("files", "layers", "tied")}
    wrong = [name for name, section in sections.items() if not isinstance(section, dict)]
    if not wrong and not all(isinstance(one, str) for one in manifest["tied"].values()):
        wrong = ["tied"]
    if wrong or not {TENSORS, PLAN} <= set(manifest["files"]) <= {TENSORS, PLAN, CONFIG}:
        raise CheckpointError(
            f"the manifest has files ({TENSORS}, {PLAN}), layers and tied", where=str(path), got=sorted(manifest)
        )
    for name, identity in manifest["files"].items():
        _check_file(folder / name, identity)
    return manifest


def _check_file(path: Path, identity: Any) -> None:
    try:
        found = _identity(path)
    except OSError as problem:
        raise CheckpointError("the checkpoint's files are there", where=str(path), got=problem.strerror) from problem
    if found != identity:
        size = identity.get("bytes") if isinstance(identity, dict) else None
        cut = size != found["bytes"]
        raise CheckpointError(
            "the file is as it was saved",
            where=str(path),
            got=f"{found['bytes']} of {size} bytes" if cut else "other content (the hash differs)",
            fix="Copy the folder again, or save the model again.",
        )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors, still mapped to the file: what is kept of them must be copied."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, safetensors.SafetensorError) as problem:
        raise CheckpointError("the file holds safetensors", where=str(path), got=str(problem)) from problem


def _skeleton(factory: Callable[[], nn.Module]) -> nn.Module:
    """The factory's model without values if it can be built so, else with them."""
    # Building on the meta device fails with these wherever a value is needed.
    with suppress(RuntimeError, NotImplementedError, ValueError, TypeError):
        with torch.device("meta"):
            model = factory()
        plain = (value for module in model.modules() for value in vars(module).values())
        if not any(isinstance(value, Tensor) and value.is_meta for value in plain):
            return model
    return factory()


def _install(root: nn.Module, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], plan: Plan) -> None:
    """Check that everything fits, then put all tensors into the model."""
    linears = {site.name: site.module for site in find_linears(root)}
    rest: dict[str, Tensor] = {}
    sections: dict[str, dict[str, Tensor]] = {name: {} for name in manifest["layers"]}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if owner in sections and leaf != "bias":
            sections[owner][leaf] = tensor
        else:
            rest[name] = tensor
    changes: dict[nn.Module, QuantLinear] = {}
    for name, fields in manifest["layers"].items():
        linear = linears.get(name)
        if linear is None:
            raise CheckpointError("the model has the checkpoint's layers", where=name, got="no nn.Linear of that name")
        changes[linear] = _layer(name, fields, linear, sections[name])
    holders = {
        name: (module, leaf, old)
        for name, (module, leaf, old) in _holdings(root).items()
        if module not in changes or leaf == "bias"
    }
    values = _values(holders, rest, manifest["tied"])
    for name, (module, leaf, _) in holders.items():
        owner_module = changes.get(module, module)
        held: dict[str, Any] = owner_module._parameters if leaf in module._parameters else owner_module._buffers
        held[leaf] = values[name]
    replace_modules(root, changes)
    for layer in list(changes.values())[:1]:
        layer.plan_json = json.dumps(plan.to_json())


def _layer(name: str, fields: Any, linear: nn.Linear, sections: Mapping[str, Tensor]) -> QuantLinear:
    """The quantized layer, still with the old bias."""
    known = fields if isinstance(fields, dict) else {}
    dtype = _DTYPES.get(str(known.get("dtype")))
    shape = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None}
    if dtype is None or shape != {key: known.get(key) for key in shape}:
        raise CheckpointError("the layer is the model's", where=name, got=fields, fix=f"The model's is {shape}.")
    packed, candidate = assemble(sections, where=name)
    if not linear.weight.is_meta:
        packed = packed._replace(data=packed.data.to(linear.weight.device))
    try:
        return QuantLinear(candidate, packed, linear.bias, linear.in_features, linear.out_features, dtype=dtype)
    except AutoqError as problem:
        raise CheckpointError(problem.rule, where=name, got=problem.got) from problem


def _values(
    holders: Mapping[str, tuple[nn.Module, str, Tensor]], tensors: Mapping[str, Tensor], tied: Mapping[str, str]
) -> dict[str, Tensor]:
    """The new tensor of every parameter and buffer; tied ones are one object."""
    sources = {name: tied.get(name, name) for name in holders}
    lacking = sorted(name for name, source in sources.items() if source not in tensors)
    foreign = sorted(set(tensors) - set(sources.values()))
    if lacking or foreign:
        parts = [f"not in the checkpoint: {', '.join(lacking[:5])}"] if lacking else []
        parts += [f"not in the model: {', '.join(foreign[:5])}"] if foreign else []
        raise CheckpointError("checkpoint and model have the same tensors", got="; ".join(parts))
    values: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    for name, (_, _, old) in holders.items():
        source = sources[name]
        if tensors[source].shape != old.shape:
            raise CheckpointError(
                f"the model's tensor has shape {list(old.shape)}", where=name, got=list(tensors[source].shape)
            )
        if source not in shared or isinstance(shared[source], nn.Parameter) != isinstance(old, nn.Parameter):
            shared[source] = _like(old, tensors[source])
        values[name] = shared[source]
    return values


def _like(old: Tensor, new: Tensor) -> Any:
    """The new values as the old tensor is: parameter or buffer, on its device, with or without gradient."""
    moved = new.to("cpu" if old.is_meta else old.device, copy=True)
    if not isinstance(old, nn.Parameter):
        return moved
    return nn.Parameter(moved, requires_grad=old.requires_grad and moved.is_floating_point())
