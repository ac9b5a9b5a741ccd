"""What was measured before, kept per device: the profile cache and the sensitivity cache."""

from autoq.cache.fingerprint import Fingerprint
from autoq.cache.store import ProfileCache, SensitivityCache, default_folder

__all__ = ["Fingerprint", "ProfileCache", "SensitivityCache", "default_folder"]
