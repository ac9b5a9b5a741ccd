"""Losses by which accuracy is judged, and the gradients by which it is predicted.

A metric gives one loss per sample (a row of tokens, an image), so that two plans are compared in pairs. Its ``probe``
is a scalar whose gradient's outer product estimates the loss's curvature: the empirical Fisher for likelihoods,
random projections for distances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn

from autoq.errors import InputError

LossFn = Callable[[Any, Any], Tensor]
_ROW_TOKENS = 2048  # logits of this many tokens are turned into float32 at once


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch as given and as the model is called with it.

    Attributes:
        given: what the user passed; handed to ``loss_fn``.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    given: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, given: Any) -> Batch:
        """A tensor is the first argument, a tuple or list the positional ones, a mapping the keywords.

        A function is called for any of these (inputs with a state, such as a filled cache, are made afresh so).
        """
        if isinstance(given, Batch):
            return given
        if callable(given):
            return cls.of(given())
        if isinstance(given, Mapping):
            return cls(given, (), dict(given))
        if isinstance(given, tuple | list):
            return cls(given, tuple(given), {})
        return cls(given, (given,), {})

    def call(self, model: nn.Module) -> Any:
        """The model's outputs on this batch."""
        return model(*self.args, **self.kwargs)


def as_batches(batches: Any) -> list[Batch]:
    """A list of batches from what a user passes: one tensor or mapping, or a sequence or iterable of batches.

    Raises:
        InputError: if there is none.
    """
    if isinstance(batches, Tensor | Mapping | Batch) or callable(batches):
        found = [Batch.of(batches)]
    elif isinstance(batches, Sequence) or hasattr(batches, "__iter__"):
        found = [Batch.of(one) for one in batches]
    else:
        raise InputError("batches is a tensor, a mapping, or a sequence of batches", got=type(batches).__name__)
    if not found or any(_is_empty(batch) for batch in found):
        raise InputError(
            "batches must hold at least one sample each",
            got="no batches" if not found else "an empty batch",
            fix="Pass a few inputs the model will really see.",
        )
    return found


def _is_empty(batch: Batch) -> bool:
    tensors = [one for one in (*batch.args, *batch.kwargs.values()) if isinstance(one, Tensor)]
    return bool(tensors) and all(one.numel() == 0 for one in tensors)


class Probe(NamedTuple):
    """What is differentiated to predict a metric's change.

    With g the gradient of ``value`` and Δy a layer output's change, a sample's loss is predicted to rise by
    ``factor × Σ (g·Δy)²``, summed over the sample's rows of activations.

    Attributes:
        value: a scalar, summed over samples.
        factor: half the number of predictions a sample's loss averages over, for likelihoods.
    """

    value: Tensor
    factor: float


class Metric(Protocol):
    """How a model's outputs become one loss per sample."""

    name: str
    unit: str

    def losses(self, outputs: Any, index: int, batch: Batch) -> Tensor:
        """float32 [samples], lower is better."""

    def probe(self, outputs: Any, index: int, batch: Batch, generator: torch.Generator) -> Probe:
        """What is differentiated for the sensitivities."""


def logits_of(outputs: Any) -> Tensor | None:
    """The ``logits`` of a model's outputs, if they have any."""
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    return found if isinstance(found, Tensor) else None


def tensor_of(outputs: Any) -> Tensor:
    """The first floating-point tensor of a model's outputs.

    Raises:
        InputError: if there is none.
    """
    found = logits_of(outputs)
    if found is not None:
        return found
    if isinstance(outputs, Tensor):
        return outputs
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    if isinstance(values, tuple | list) or hasattr(values, "__iter__"):
        for value in values:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value
    raise InputError(
        "the model returns a floating-point tensor",
        got=type(outputs).__name__,
        fix="Pass loss_fn(outputs, batch) or eval_fn(model).",
    )


def token_nll(logits_BLV: Tensor, tokens_BL: Tensor) -> Tensor:
    """Mean negative log-likelihood of each row's tokens after the first, in nats.

    Args:
        logits_BLV: float [rows, length, vocabulary].
        tokens_BL: int64 [rows, length].

    Returns:
        float32 [rows]; computed in float32, a few rows at a time.
    """
    rows, length = tokens_BL.shape
    step = max(1, _ROW_TOKENS // max(1, length))
    parts = []
    for start in range(0, rows, step):
        logits = logits_BLV[start : start + step, :-1].float()
        targets = tokens_BL[start : start + step, 1:]
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        parts.append(nll.view(targets.shape).mean(dim=1))
    return torch.cat(parts)


class TokenNLL:
    """Negative log-likelihood of the next token, for causal language models."""

    name = "nll"
    unit = "nats per token"

    def losses(self, outputs: Any, index: int, batch: Batch) -> Tensor:
        """One mean NLL per row."""
        logits = logits_of(outputs)
        if logits is None:
            raise InputError("a causal language model returns logits", got=type(outputs).__name__)
        return token_nll(logits, _tokens(batch))

    def probe(self, outputs: Any, index: int, batch: Batch, generator: torch.Generator) -> Probe:
        """The NLL itself: its per-token gradients give the empirical Fisher."""
        return Probe(self.losses(outputs, index, batch).sum(), 0.5 * (_tokens(batch).shape[1] - 1))


class OutputKL:
    """KL divergence of a classifier's (or any other) logits from the unquantized model's, in nats."""

    name = "kl"
    unit = "nats"

    def __init__(self) -> None:
        self._reference: dict[int, Tensor] = {}

    def losses(self, outputs: Any, index: int, batch: Batch) -> Tensor:
        """One KL per sample; the first outputs seen of a batch are the unquantized model's."""
        logits = tensor_of(outputs).float()
        now = F.log_softmax(logits, dim=-1)
        reference = self._reference.setdefault(index, now.detach())
        divergence = (reference.exp() * (reference - now)).sum(dim=-1)
        return divergence.flatten(1).mean(dim=1) if divergence.dim() > 1 else divergence

    def probe(self, outputs: Any, index: int, batch: Batch, generator: torch.Generator) -> Probe:
        """Log-likelihood of labels drawn from the model itself: the Fisher information (the KL is flat there)."""
        logits = tensor_of(outputs).float()
        flat = F.log_softmax(logits, dim=-1).flatten(0, -2)
        labels = torch.multinomial(flat.detach().exp(), 1, generator=generator)
        positions = max(1, flat.shape[0] // max(1, logits.shape[0]))
        return Probe(-flat.gather(1, labels).sum() / positions, 0.5 * positions)


class RelativeRMS:
    """Root mean square of the outputs' difference from the unquantized model's, over their own.

    Its squares add up over layers, not the values themselves: see ``additive.Additive``.
    """

    name = "relative_rms"
    unit = "relative"

    def __init__(self) -> None:
        self._reference: dict[int, Tensor] = {}

    def losses(self, outputs: Any, index: int, batch: Batch) -> Tensor:
        """One ratio per sample; the first outputs seen of a batch are the unquantized model's."""
        now = _per_sample(tensor_of(outputs).float())
        reference = self._reference.setdefault(index, now.detach())
        return _norm(now - reference) / _scale(reference)

    def probe(self, outputs: Any, index: int, batch: Batch, generator: torch.Generator) -> Probe:
        """A random projection: the mean square of its gradients times a change is that change's square."""
        now = _per_sample(tensor_of(outputs).float())
        direction = torch.randn(now.shape, generator=generator).to(now.device)
        return Probe(((now * direction).sum(dim=1) / _scale(now.detach())).sum(), 1.0)


def _per_sample(outputs: Tensor) -> Tensor:
    return outputs.reshape(max(1, outputs.shape[0]), -1) if outputs.dim() > 1 else outputs.reshape(1, -1)


def _scale(reference: Tensor) -> Tensor:
    return _norm(reference).clamp_min(torch.finfo(torch.float32).tiny)


def _norm(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=1).sqrt()


class UserLoss:
    """The user's ``loss_fn(outputs, batch) -> Tensor[samples]``."""

    name = "loss_fn"
    unit = "loss_fn's"

    def __init__(self, loss_fn: LossFn) -> None:
        self._loss_fn = loss_fn

    def losses(self, outputs: Any, index: int, batch: Batch) -> Tensor:
        """What the user's function returns, checked.

        Raises:
            InputError: if it is not a floating-point tensor of at least one sample.
        """
        found = self._loss_fn(outputs, batch.given)
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.numel() == 0:
            raise InputError(
                "loss_fn returns one loss per sample",
                got=type(found).__name__ if not isinstance(found, Tensor) else f"{found.dtype}, {found.shape}",
                fix="Return a floating-point tensor of shape [samples].",
            )
        return found.float().reshape(-1)

    def probe(self, outputs: Any, index: int, batch: Batch, generator: torch.Generator) -> Probe:
        """The loss itself, taken as one prediction per sample."""
        return Probe(self.losses(outputs, index, batch).sum(), 0.5)


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model predicts the next token and can generate (transformers' decoder-only models)."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    if not callable(getattr(model, "generate", None)):
        return False
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return isinstance(head, nn.Module)


def default_metric(model: nn.Module, batches: Sequence[Batch], loss_fn: LossFn | None) -> Metric:
    """The metric for a model: the user's, else token NLL, else KL of logits, else relative RMS."""
    if loss_fn is not None:
        return UserLoss(loss_fn)
    if is_causal_lm(model):
        return TokenNLL()
    with torch.no_grad():
        outputs = batches[0].call(model)
    return OutputKL() if logits_of(outputs) is not None else RelativeRMS()


def _tokens(batch: Batch) -> Tensor:
    tokens = batch.kwargs.get("labels", batch.kwargs.get("input_ids", batch.args[0] if batch.args else None))
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[1] < 2:
        raise InputError(
            "a batch of a causal language model is token rows [rows, length >= 2]",
            got=f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__,
        )
    return tokens


def perplexity(model: nn.Module, token_rows: Tensor, *, batch_rows: int = 4) -> float:
    """Perplexity of a causal language model on independent rows of tokens.

    The exponential of the mean float32 negative log-likelihood over the L−1 predicted tokens of each row; no
    beginning-of-sequence token is added and rows do not overlap.

    Args:
        model: returns logits [rows, L, vocabulary], as ``.logits`` or as the output itself.
        token_rows: int64 [rows, L], L at least 2.
        batch_rows: rows per forward pass.

    Raises:
        InputError: if ``token_rows`` is not such a tensor.
    """
    if token_rows.dim() != 2 or token_rows.shape[1] < 2 or token_rows.numel() == 0:
        raise InputError("token_rows has shape [rows, length >= 2]", got=tuple(token_rows.shape))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = [token_nll(tensor_of(model(rows)), rows) for rows in torch.split(token_rows, max(1, batch_rows))]
    finally:
        model.train(training)
    return math.exp(torch.cat(parts).double().mean().item())
