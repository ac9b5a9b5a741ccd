"""The quantized linear layer: one packed buffer, one operator for every scheme.

Shapes: N outputs, K inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from autoq.candidates import Candidate, Packed
from autoq.candidates.base import load_kernels, settle
from autoq.dequantized import guarded
from autoq.errors import AutoqError, ModelError
from autoq.sections import HEADER, SCHEME, assemble
from autoq_kernels import layout


class PackedModule(nn.Module):
    """A module around one packed weight, which is a buffer; ``head`` is a view of its first bytes.

    Conversions of dtype touch only an unquantized weight; moves between devices move the codes.

    Attributes:
        candidate: the implementation of the weight's scheme.
        dtype: the compute dtype.
    """

    head: Tensor
    packed: Tensor
    candidate: Candidate
    dtype: torch.dtype

    def _set_buffer(self, data: Tensor) -> None:
        load_kernels(data.device)
        self.register_buffer("packed", data, persistent=False)
        # Of the same storage, but no autograd view: Dynamo would guard on a view's base and so on the scheme's size.
        # A buffer too, because CUDA graphs copy inputs that are no buffers, and the copy would hold 128 bytes.
        # Never made in inference mode: the gradient saves it.
        with torch.inference_mode(False):
            head = torch.empty(0, dtype=torch.uint8, device=data.device)
            head.set_(data.untyped_storage(), data.storage_offset(), (layout.HEADER_BYTES,), (1,))
        self.register_buffer("head", head, persistent=False)
        settle(head)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        data = self.packed
        del self.packed, self.head
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            moved = fn(data)
            # What dtype a floating-point weight would have now; the codes themselves keep theirs.
            self.dtype = fn(torch.empty(0, dtype=self.dtype, device=data.device)).dtype
            if moved.dtype != torch.uint8:  # Module.type() converts every tensor
                moved = data.to(moved.device)
            if moved is not data and not moved.is_meta and not _same_header(moved, data):
                moved[: layout.HEADER_BYTES] = 0  # to_empty(): the kernel refuses an empty header until one is loaded
            elif not moved.is_meta and self.candidate.key == "none":
                moved = _converted(moved, self.dtype)
        except BaseException:
            self._set_buffer(data)
            raise
        self._set_buffer(moved)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        # Pickled apart, head would come back as a tensor with a storage of its own.
        state["_buffers"] = {name: one for name, one in state["_buffers"].items() if name != "head"}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._set_buffer(self.packed)


class QuantLinear(PackedModule):
    """A linear layer whose weight is one packed buffer, whatever the scheme.

    The kernel sees only ``head``, the buffer's first 128 bytes, which lead it to the rest. A graph traced by
    ``torch.compile`` therefore does not depend on the scheme: ``set_packed`` changes it without recompilation.

    ``state_dict`` holds the canonical sections by name (``weight_header``, ``weight_scheme``, ``weight_codes_4``,
    ``weight_scale``, …) and ``bias``. Conversions of dtype touch only the bias and an unquantized weight; moves between
    devices move the codes.

    Args:
        candidate: the scheme's implementation.
        packed: the packed weight [N, K].
        bias: the original layer's parameter [N], shared, or None.
        in_features: K.
        out_features: N.
        dtype: the compute dtype, which ``weight`` has.
        original: the float layer when it is kept for ``autoq.restore``.

    Attributes:
        plan_json: JSON text of the plan that was applied, kept on one layer of the model; None on the others.
        under_adapter: whether it is the base layer of an adapter of PEFT.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        candidate: Candidate,
        packed: Packed,
        bias: nn.Parameter | None,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        original: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.plan_json: str | None = None
        self.under_adapter = False
        # In a tuple, so that it is neither a submodule nor in the state_dict.
        self._original = (original,)
        self.register_parameter("bias", bias)
        self.register_buffer("packed", packed.data, persistent=False)
        self.set_packed(packed, candidate)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [..., N] for an activation [..., K], in the activation's dtype."""
        result: Tensor = torch.ops.autoq.linear(x, self.head, self.bias, self.out_features)
        return result

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [N, K] in the compute dtype, computed anew at each access: slow.

        For model code that looks at a layer's weight, most often only at its dtype or device. It is no parameter, and
        writing to it changes nothing; under an adapter of PEFT, whose merging does that, it is refused.
        """
        weight: Tensor = torch.ops.autoq.dequantize(self.head, self.out_features, self.in_features)
        weight = weight.to(self.dtype)
        return guarded(weight) if self.under_adapter else weight

    @property
    def scheme(self) -> str:
        """The scheme's display form, such as ``int4wo-hqq(group_size=64)``."""
        return str(self.candidate.scheme)

    @property
    def original(self) -> nn.Module | None:
        """The float layer as it was before quantization, if it was kept."""
        return self._original[0]

    def set_packed(self, packed: Packed, candidate: Candidate) -> None:
        """Swap the weight and its scheme in place; compiled graphs stay valid.

        Raises:
            ModelError: if the packed weight has another shape than the layer.
        """
        shape = tuple(packed.shape)
        if shape != (self.out_features, self.in_features):
            raise ModelError(f"the packed weight has shape [{self.out_features}, {self.in_features}]", got=list(shape))
        self.candidate = candidate
        data = packed.data
        self._set_buffer(data if self.packed.is_meta else data.to(self.packed.device))

    def sections(self) -> dict[str, Tensor]:
        """The weight's canonical sections as named views of the buffer, with header and scheme: what is saved."""
        found = {HEADER: self.packed[: layout.HEADER_BYTES], SCHEME: self._scheme_bytes()}
        return found | {f"weight_{name}": one for name, one in layout.sections(self.packed).items()}

    def _scheme_bytes(self) -> Tensor:
        text = json.dumps(self.candidate.scheme.to_json()).encode()
        return torch.tensor(list(text), dtype=torch.uint8)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Of one storage torch.save takes views of one dtype only: the codes stay views, the small rest is copied.
        found = {name: one if _is_codes(name) else one.clone() for name, one in self.sections().items()}
        destination.update({prefix + name: one for name, one in found.items()})

    def _load_from_state_dict(  # noqa: PLR0917 (torch's signature)
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        where, start = prefix.rstrip("."), f"{prefix}weight_"
        if f"{prefix}weight" in state_dict:
            unexpected_keys[:] = [key for key in unexpected_keys if key != f"{prefix}weight"]
            error_msgs.append(
                f"{where}: a float weight cannot be loaded into a layer quantized as {self.scheme}. Load it into the "
                "float model and apply the plan to that, or use autoq.load_quantized."
            )
            return
        found = {key.removeprefix(prefix): one for key, one in state_dict.items() if key.startswith(start)}
        unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(start)]
        if not found:
            missing_keys.append(prefix + HEADER)
            return
        try:
            packed, candidate = assemble(found, where=where)
            if candidate.key == "none" and not local_metadata.get("assign_to_params_buffers", False):
                packed = Packed(_converted(packed.data, self.dtype))
            self.set_packed(packed, candidate)
        except AutoqError as problem:
            error_msgs.append(str(problem))

    def extra_repr(self) -> str:
        """Shape and scheme, as ``print(model)`` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme}"
        )


def _is_codes(section: str) -> bool:
    return section.startswith("weight_codes")


def _converted(data: Tensor, dtype: torch.dtype) -> Tensor:
    """The buffer of a float weight in another dtype, as conversions of ``nn.Linear`` round it."""
    form = layout.header(data)
    bits = layout.DENSE_BITS.get(dtype, form.bits)
    if bits == form.bits:
        return data
    new: Tensor = layout.build(kind=form.kind, bits=bits, n=form.n, k=form.k, codes=layout.codes(data).to(dtype))
    return new


def _same_header(one: Tensor, other: Tensor) -> bool:
    if other.is_meta:
        return False
    return torch.equal(one[: layout.HEADER_BYTES].cpu(), other[: layout.HEADER_BYTES].cpu())
