"""What a study searches, kept in the study itself, so that any worker can take part."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from autoq._files import parse_json, shown
from autoq.errors import SearchError
from autoq.knapsack import Assignment, Problem
from autoq.search_values import Budget
from autoq.studies import digest, quiet

if TYPE_CHECKING:
    import optuna

# MySQL's columns hold 65,535 bytes, and quotation marks are escaped.
_CHUNK = 30_000
_SCHEMA = 1
_FIX = "Use one version of autoq for a study and its workers."


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """What a study searches; ``autoq.search.search`` describes each field.

    Attributes:
        known: plans that other studies with this fingerprint had measured when this one was made; measuring them again
            costs nothing.
    """

    problem: Problem
    families: Mapping[str, str]
    uniform: Mapping[str, Assignment]
    budget: Budget
    fidelities: int
    seed: int
    fingerprint: str
    known: tuple[Assignment, ...] = ()
    identity: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The form kept in the study."""
        return {
            "schema": _SCHEMA,
            "problem": self.problem.to_json(),
            "families": dict(self.families),
            "uniform": [[name, list(assignment)] for name, assignment in self.uniform.items()],
            "budget": asdict(self.budget),
            "fidelities": self.fidelities,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "known": [list(assignment) for assignment in self.known],
            "identity": dict(self.identity),
            "recipe": dict(self.recipe),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, where: str = "") -> Definition:
        """Read the form kept in the study.

        Args:
            value: from ``to_json``.
            where: the study's name, for messages.

        Raises:
            SearchError: if another version of autoq wrote it in another form.
        """
        schema = value.get("schema") if isinstance(value, dict) else None
        if schema != _SCHEMA:
            raise SearchError(f"a study's definition has schema {_SCHEMA}", where=where, got=shown(schema), fix=_FIX)
        try:
            names = ("families", "fidelities", "seed", "fingerprint", "identity", "recipe")
            return cls(
                **{name: value[name] for name in names},
                problem=Problem.from_json(value["problem"]),
                uniform={name: tuple(assignment) for name, assignment in value["uniform"]},
                known=tuple(tuple(assignment) for assignment in value["known"]),
                budget=Budget(**value["budget"]),
            )
        except (ValueError, LookupError, TypeError, AttributeError) as problem:
            got = f"{type(problem).__name__}: {shown(str(problem))}"
            raise SearchError("a study's definition is as autoq wrote it", where=where, got=got, fix=_FIX) from problem

    @property
    def hash(self) -> str:
        """Of everything that decides which plans are measured and what is learned of them."""
        return digest({k: v for k, v in self.to_json().items() if k not in ("known", "identity", "recipe")})


def publish(storage: optuna.storages.BaseStorage, prefix: str, definition: Definition, n_trials: int) -> optuna.Study:
    """Open or create the study that searches this, with all in it that a worker needs to take part.

    The name ends in a hash of the definition.
    """
    import optuna

    with quiet():
        study = optuna.create_study(
            storage=storage,
            study_name=f"{prefix}-{definition.hash[:12]}",
            directions=["minimize", "minimize"],
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(),  # never asked: ``draw`` makes the parameters
        )
    known = study.user_attrs
    if "definition" not in known:
        study.set_user_attr("fingerprint", definition.fingerprint)
        study.set_user_attr("identity", dict(definition.identity))
        text = json.dumps(definition.to_json(), separators=(",", ":"))
        chunks = [text[i : i + _CHUNK] for i in range(0, len(text), _CHUNK)]
        part = digest(text)[:12]  # two processes may publish at once, and what they know may differ
        for number, chunk in enumerate(chunks):
            study.set_user_attr(f"definition:{part}:{number}", chunk)
        study.set_user_attr("definition", {"part": part, "chunks": len(chunks)})  # last: from now on it is complete
    if known.get("n_trials") != n_trials:
        study.set_user_attr("n_trials", n_trials)
    return study


def published(storage: optuna.storages.BaseStorage) -> dict[str, dict[str, Any]]:
    """The names of the studies whose definition is complete, the oldest first, with all they say.

    Raises:
        SearchError: if the storage contradicts itself.
    """
    import optuna

    with _consistent("the storage"):
        summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
        return {one.study_name: one.user_attrs for one in summaries if "definition" in one.user_attrs}


def load(storage: optuna.storages.BaseStorage, name: str) -> tuple[optuna.Study, Definition]:
    """A published study and what it searches.

    Raises:
        SearchError: if there is none of that name, or its definition is damaged.
    """
    import optuna

    with _consistent(name):
        study = optuna.load_study(study_name=name, storage=storage, sampler=optuna.samplers.RandomSampler())
        said = study.user_attrs
    try:
        part, chunks = said["definition"]["part"], said["definition"]["chunks"]
        text = "".join(said[f"definition:{part}:{number}"] for number in range(chunks))
    except (LookupError, TypeError) as problem:
        got = f"{type(problem).__name__}: {shown(str(problem))}"
        raise SearchError("a study's definition is complete", where=name, got=got, fix=_FIX) from problem
    value = parse_json(text, SearchError, what="a study's definition", where=name, fix=_FIX)
    return study, Definition.from_json(value, where=name)


@contextmanager
def _consistent(where: str) -> Iterator[None]:
    """What Optuna raises on a storage that it did not write so, as a SearchError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, AssertionError) as problem:
        raise SearchError(
            "a study is in the storage, as Optuna wrote it",
            where=where,
            got=f"{type(problem).__name__}: {problem}",
            fix="Choose another storage, or remove the file to start over.",
        ) from problem
