"""What applying a plan did, and what of the plan does not hold on this device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from autoq.scheme import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedLayer:
    """A layer that the plan would quantize and that was left alone.

    Attributes:
        name: the layer.
        scheme: what the plan asked for.
        reason: why it was left alone.
    """

    name: str
    scheme: Scheme
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherWeight:
    """A weight that no plan can quantize.

    Attributes:
        name: the parameter's qualified name.
        kind: what it is, such as ``experts (3-D parameters)`` or ``linear layers: its weight is float64``.
        size_bytes: of its data.
        share: ``size_bytes`` over the bytes of all the model's parameters, each storage counted once; 0 to 1.
    """

    name: str
    kind: str
    size_bytes: int
    share: float


def by_kind(weights: Iterable[OtherWeight]) -> dict[str, tuple[int, int, float]]:
    """Kind → how many weights, their bytes, and their share of the model's bytes; the largest share first."""
    found: dict[str, tuple[int, int, float]] = {}
    for one in weights:
        count, size, share = found.get(one.kind, (0, 0, 0.0))
        found[one.kind] = (count + 1, size + one.size_bytes, share + one.share)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyReport:
    """What ``apply`` did.

    Attributes:
        applied: layer → scheme of every layer that is quantized now.
        unquantized: layers planned as ``none`` whose weight, as it is, runs in autoq's kernels now.
        skipped: layers the plan quantizes that were left alone, with the reason.
        unmatched: layers the plan names and the model lacks.
        missing: linear layers of the model the plan does not name; they stay as they are. None if it names no layer.
        stale: what the plan says of times and does not hold here, in sentences: measured on another device, with other
            threads, software or kernels.
        slow: schemes of the plan that have no kernel here, in sentences: their layers dequantize at every call.
        others: weights that no plan can quantize (experts, convolutions, …), with their share of the float model's
            bytes; embeddings are not among them.
        attention: what the plan gave a transformers model as its attention; None where it says nothing.
    """

    applied: Mapping[str, Scheme]
    unquantized: tuple[str, ...]
    skipped: tuple[SkippedLayer, ...]
    unmatched: tuple[str, ...]
    missing: tuple[str, ...]
    stale: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()
    others: tuple[OtherWeight, ...] = ()
    attention: str | None = None

    def __str__(self) -> str:
        lines = [f"{len(self.applied)} layers quantized"]
        if self.unquantized:
            lines.append(f"{len(self.unquantized)} layers unquantized in autoq's kernels")
        if self.attention is not None:
            lines.append(f"attention: {self.attention}'s")
        lines += [f"slow: {text}" for text in self.slow]
        lines += [f"stale: {text}" for text in self.stale]
        lines += [f"left alone: {one.name} ({one.scheme}): {one.reason}" for one in self.skipped]
        lines += [f"not in the model: {name}" for name in self.unmatched]
        lines += [f"not in the plan: {name}" for name in self.missing]
        lines += [
            f"as they are: {kind}, {share:.1%} of the model's bytes ({count} weight{'s' * (count > 1)})"
            for kind, (count, _, share) in by_kind(self.others).items()
        ]
        return "\n".join(lines)

    @property
    def differs(self) -> bool:
        """Whether anything is not as the plan says."""
        return bool(self.skipped or self.unmatched or self.missing or self.stale or self.slow)
