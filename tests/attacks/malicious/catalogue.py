"""All attacks, by name: the reader, the sample's file, and what is done to it."""

from dataclasses import dataclass
from pathlib import Path

from malicious.checkpoints import CHECKPOINT
from malicious.generic import JSON, PLACES, Attack
from malicious.journals import JOURNAL
from malicious.parquet import PARQUET


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attack on one reader.

    Attributes:
        reader: its name in ``READERS``.
        pattern: of the one file that is changed, or of the folder that is.
        attack: changes it.
        seal: whether a checkpoint's hashes are made to fit again.
        may_read: whether reading it, without harm, is right too.
    """

    reader: str
    pattern: str
    attack: Attack
    seal: bool = False
    may_read: bool = False

    def place(self, folder: Path) -> Path:
        """What is attacked, in a sample's folder."""
        return min(folder.glob(self.pattern))


_JSON_FILES = (
    ("plan", "plan.json", False),
    ("workload", "workload.json", False),
    ("profile cache", "profiles/*/key.json", False),
    ("sensitivity cache", "sensitivity/*/key.json", False),
    ("sensitivity cache", "sensitivity/*/baseline.json", False),
    ("cache check", "profiles/*/key.json", False),
    ("calibration", "calibration/*.json", False),
    ("checkpoint", "checkpoint/autoq.json", False),
    ("checkpoint", "checkpoint/plan.json", True),
    ("sharded checkpoint", "checkpoint/model.safetensors.index.json", True),
    ("transformers checkpoint", "checkpoint/config.json", True),
    ("transformers checkpoint", "checkpoint/generation_config.json", True),
)
_PARQUET_FILES = (
    ("table", "table.parquet"),
    ("profile cache", "profiles/*/part-*.parquet"),
    ("exported profile", "export.parquet"),
)
_OTHER_FILES = (
    ("sensitivity cache", "sensitivity/*/part-*.parquet", False),
    ("cache check", "sensitivity/*/part-*.parquet", False),
    ("study journal", "study.journal", False),
    ("checkpoint", "checkpoint/model.safetensors", True),
    ("sharded checkpoint", "checkpoint/model-00001-of-*.safetensors", True),
)
# A study that nobody has written to yet is an empty file; a journal's last line may be cut by a kill.
_HARMLESS = {("study journal", "an empty file"), ("study journal", "a file that was cut")}
# It leads nowhere, so the file counts as not written yet, and takes the link's place.
_MISSING = {
    (pattern, "a link to itself")
    for pattern in ("sensitivity/*/baseline.json", "sensitivity/*/key.json", "profiles/*/key.json")
}
# Optuna passes over what another process did to a study that is not there.
_OF_OTHERS = ("a trial of no study", "an attribute of a study that is missing")


def _all() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for reader, pattern, seal in _JSON_FILES:
        for name, attack in (PLACES | JSON).items():
            found[f"{reader}, {pattern}: {name}"] = Case(
                reader=reader, pattern=pattern, attack=attack, seal=seal, may_read=(pattern, name) in _MISSING
            )
    for reader, pattern in _PARQUET_FILES:
        for name, attack in (PLACES | PARQUET).items():
            found[f"{reader}, {pattern}: {name}"] = Case(reader=reader, pattern=pattern, attack=attack)
    for reader, pattern, seal in _OTHER_FILES:
        for name, attack in PLACES.items():
            found[f"{reader}, {pattern}: {name}"] = Case(
                reader=reader, pattern=pattern, attack=attack, seal=seal, may_read=(reader, name) in _HARMLESS
            )
    for name, attack in CHECKPOINT.items():
        found[f"checkpoint: {name}"] = Case(
            reader="checkpoint", pattern="checkpoint", attack=attack, seal=True, may_read=name.startswith("word ")
        )
    for name, attack in JOURNAL.items():
        found[f"study journal: {name}"] = Case(
            reader="study journal", pattern="study.journal", attack=attack, may_read=name in _OF_OTHERS
        )
    return found


CASES = _all()
