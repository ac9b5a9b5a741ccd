"""Checkpoints changed by someone who knows the format: all hashes fit again afterwards."""

import hashlib
import json
import struct

PIECE = 1 << 24


def sealed(folder, change=lambda manifest: None):
    """Change the manifest, and make its own hash fit."""
    path = folder / "autoq.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest.pop("sha256", None)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps(manifest | {"sha256": hashlib.sha256(text.encode()).hexdigest()}))


def replaced(folder, name, data):
    """Give a file other bytes, and make the manifest fit."""
    (folder / name).write_bytes(data)
    pieces = [hashlib.sha256(data[at : at + PIECE]).hexdigest() for at in range(0, len(data), PIECE)]
    sealed(folder, lambda manifest: manifest["files"].update({name: {"bytes": len(data), "sha256": pieces}}))


def changed_json(folder, name, change):
    """Change a JSON file of the checkpoint."""
    value = json.loads((folder / name).read_text())
    new = change(value)
    replaced(folder, name, json.dumps(value if new is None else new).encode())


def safetensors_bytes(header, data=b"", length=None):
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data
