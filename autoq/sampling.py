"""Choosing the next token: greedy, by temperature, among the top k, and from the nucleus.

Legend: B sequences, V words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoq.errors import InputError

_NUCLEUS = 256  # words looked at first: sorting a whole vocabulary takes longer than a step's linear layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only so many most likely tokens; ties beyond them are left out.
        top_p: only the smallest set of most likely tokens whose probabilities reach this sum (Holtzman et al. 2020).

    Raises:
        InputError: a value out of range, or a set to choose from without a temperature.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise InputError("temperature is 0 or more", got=self.temperature)
        if self.top_k is not None and self.top_k < 1:
            raise InputError("top_k is 1 or more", got=self.top_k)
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InputError("top_p is above 0 and at most 1", got=self.top_p)
        if self.greedy and (self.top_k is not None or self.top_p is not None):
            raise InputError("top_k and top_p choose at random", got="temperature 0", fix="Give a temperature.")

    @property
    def greedy(self) -> bool:
        """Whether nothing is random."""
        return self.temperature == 0.0

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The next tokens.

        Args:
            logits: float [B, V].
            generator: of the random numbers, on the logits' device.

        Returns:
            int64 [B, 1].
        """
        if self.greedy:
            return logits.argmax(dim=-1, keepdim=True)
        weights, words = self.weights(logits)
        drawn = torch.multinomial(weights, 1, generator=generator)
        return drawn if words is None else words.gather(1, drawn)

    def weights(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which tokens may come next, and how likely.

        Args:
            logits: float [B, V].

        Returns:
            Weights float32 [B, W], of any sum; and the words they belong to, int64 [B, W], or None for all in order.
        """
        if self.top_k is not None:
            best, words = logits.topk(min(self.top_k, logits.shape[1]), dim=-1)
            chances = (best.float() / self.temperature).softmax(dim=-1)
            return (chances if self.top_p is None else _nucleus(chances, self.top_p)), words
        if self.top_p is None:
            return (logits.float() / self.temperature).softmax(dim=-1), None
        total = (logits.float() / self.temperature).logsumexp(dim=-1, keepdim=True)
        for count in (min(_NUCLEUS, logits.shape[1]), logits.shape[1]):
            best, words = logits.topk(count, dim=-1)
            chances = (best.float() / self.temperature - total).exp()
            if bool((chances.sum(dim=-1) >= self.top_p).all()):
                break
        return _nucleus(chances, self.top_p), words


def _nucleus(chances: Tensor, top_p: float) -> Tensor:
    """The chances, largest first, [B, W], with 0 for those that the ones before reach ``top_p`` without."""
    before = chances.cumsum(dim=-1) - chances
    return chances.where(before < top_p, 0.0)
