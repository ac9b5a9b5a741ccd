"""What was measured before, kept per device: the profile cache and the sensitivity cache."""

from autoq.cache.fingerprint import CONDITIONS, STOCK, Fingerprint
from autoq.cache.store import SHAPE, ProfileCache, SensitivityCache, ShapeKey, default_folder

__all__ = [
    "CONDITIONS",
    "SHAPE",
    "STOCK",
    "Fingerprint",
    "ProfileCache",
    "SensitivityCache",
    "ShapeKey",
    "default_folder",
]
