"""The errors autoq raises. Every message has the rule, what was got and what to do.

AutoqError
├── ModelError      the model: no linear layers, NaN weights, unsupported parameters
├── InputError      batches, phases, text, arguments
├── CandidateError  a scheme: unknown name, impossible field, a weight it cannot hold
├── KernelError     a kernel could not be compiled, probed or called
├── PlanError       a plan file or a plan that does not fit the model
├── CacheError      the profile or sensitivity cache
├── CheckpointError a quantized checkpoint
└── SearchError     the search was given an impossible problem
"""

from __future__ import annotations


class AutoqError(Exception):
    """Base of every error autoq raises on purpose.

    Args:
        rule: what must hold, as a sentence without its final period.
        got: what was found instead.
        fix: what the user can do about it.
        where: the layer, file or argument concerned.
    """

    def __init__(self, rule: str, *, got: object = None, fix: str = "", where: str = "") -> None:
        self.rule = rule
        self.got = got
        self.fix = fix
        self.where = where
        parts = [f"{where}: {rule}" if where else rule]
        if got is not None:
            parts.append(f"got {got}")
        message = "; ".join(parts)
        if fix:
            message = f"{message}. {fix}"
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.rule, self.got, self.fix, self.where))


def _rebuild(kind: type[AutoqError], rule: str, got: object, fix: str, where: str) -> AutoqError:
    return kind(rule, got=got, fix=fix, where=where)


class ModelError(AutoqError):
    """The model cannot be tuned or changed as asked."""


class InputError(AutoqError):
    """Batches, phases, text or arguments are not usable."""


class CandidateError(AutoqError):
    """A scheme does not exist, has an impossible field, or cannot hold this weight."""


class KernelError(AutoqError):
    """A kernel could not be compiled, probed or called."""


class PlanError(AutoqError):
    """A plan file cannot be read, or does not fit the model."""


class CacheError(AutoqError):
    """The profile or sensitivity cache cannot be read or written."""


class CheckpointError(AutoqError):
    """A quantized checkpoint cannot be written or read."""


class SearchError(AutoqError):
    """The search was given a problem it cannot solve."""
