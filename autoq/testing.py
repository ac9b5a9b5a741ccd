"""What a quantization scheme must do, as pytest classes: inherit them, and say which schemes they hold for.

    from autoq.testing import Conformance

    class TestMine(Conformance):
        candidates = MyScheme.variants()

:class:`Conformance` holds for every scheme. :class:`NearestCodes` holds for those that round each weight to the nearest
value of its grid, :class:`IndependentRows` for those that pack a row without looking at the others. All run on a CPU in
seconds and need nothing but pytest.

Legend: N outputs, K inputs, M rows of the activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import autoq_kernels.ops  # noqa: F401 - defines torch.ops.autoq
from autoq.applying import apply
from autoq.candidates import Candidate, LinearOp, Packed, parse
from autoq.checkpoint import load_quantized, save_quantized
from autoq.errors import CandidateError, InputError
from autoq.numerics import relative_rms
from autoq.plan import Plan
from autoq_kernels import layout

# Relative error of a product against the float64 reference: float32 sums, or the rounding of the output.
TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
)
MAX_ERROR = 0.25  # of a weight drawn from N(0, 1); three bits in groups of 128 lose 0.22

_IMPOSSIBLE: Mapping[str, tuple[Tensor, str]] = MappingProxyType(
    {
        "nan": (torch.tensor([[1.0, math.nan]]), "NaN"),
        "infinite": (torch.tensor([[1.0, -math.inf]]), "an infinity"),
        "1-D": (torch.zeros(3), "shape (3,)"),
        "empty": (torch.zeros(0, 32), "shape (0, 32)"),
        "meta": (torch.zeros(2, 32, device="meta"), "a meta tensor"),
        "float64": (torch.zeros(2, 32, dtype=torch.float64), "float64"),
        "sparse": (torch.eye(32).to_sparse(), "sparse_coo"),
    }
)
_CASES: Mapping[str, Sequence[Any]] = MappingProxyType(
    {
        "odd_shape": ((1, 33), (5, 100), (3, 32), (17, 1), (16, 129), (40, 64)),
        "shape": ((48, 128), (5, 100), (16, 33)),
        "rows": (1, 5),
        "dtype": tuple(TOLERANCE),
        "value": (1e-6, 0.437, -3.3, 1e4),
        "exponent": (-60, -20, 20, 60),
        "impossible": tuple(_IMPOSSIBLE),
    }
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """N(0, 1) in float32, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Suite:
    """Runs each of its tests for each scheme.

    Attributes:
        candidates: the schemes.
    """

    candidates: ClassVar[Sequence[Candidate]] = ()

    @classmethod
    def pytest_generate_tests(cls, metafunc: Any) -> None:
        """Called by pytest: one test per scheme and case.

        Raises:
            InputError: if the class names no schemes.
        """
        if not cls.candidates:
            raise InputError("candidates names the schemes to test", where=cls.__qualname__, got="none")
        if "candidate" in metafunc.fixturenames:
            metafunc.parametrize("candidate", cls.candidates, ids=str)
        if metafunc.function.__module__ == __name__:  # a subclass's own tests may mean something else by these names
            for name in sorted(_CASES.keys() & metafunc.fixturenames):
                metafunc.parametrize(name, _CASES[name], ids=str)


class Conformance(Suite):
    """What holds for every scheme."""

    def test_its_name_gives_it_back(self, candidate: Candidate) -> None:
        """Plans name schemes: display form, stored object and scheme lead to the class, once it is installed."""
        for form in (str(candidate), candidate.scheme, candidate.scheme.to_json()):
            found = parse(form)
            _holds(found == candidate, f"{form} is this scheme (is its package installed?)", type(found))

    def test_products_of_odd_shapes(self, candidate: Candidate, odd_shape: tuple[int, int], rows: int) -> None:
        """Any shape is packed, with a small error, and multiplied as the reference says."""
        n, k = odd_shape
        w, x, bias = gaussian(n, k), gaussian(rows, k, seed=1), gaussian(n, seed=2)
        p = candidate.pack(w)
        _holds(p.shape == (n, k), "the packed weight knows its shape", p.shape)
        _below(relative_rms(candidate.unpack(p), w), MAX_ERROR, "the error of the weight")
        y = candidate.linear(x, p, bias)
        _holds(y.shape == (rows, n), f"the product is [{rows}, {n}]", tuple(y.shape))
        _below(relative_rms(y, candidate.reference(x, p, bias)), TOLERANCE[torch.float32], "linear off reference")

    def test_activations_of_any_dtype_shape_and_stride(self, candidate: Candidate, dtype: torch.dtype) -> None:
        """The product has the activation's dtype and leading dimensions."""
        p, bias = candidate.pack(gaussian(48, 96).to(dtype)), gaussian(48, seed=2).to(dtype)
        for given in (
            gaussian(96, seed=1),
            gaussian(2, 3, 96, seed=1),
            gaussian(96, 7, seed=1).T,
            gaussian(7, 2, 96, seed=1)[:, 1],
            gaussian(0, 96),
        ):
            x = given.to(dtype)
            y = candidate.linear(x, p, bias)
            _holds((y.shape, y.dtype) == ((*x.shape[:-1], 48), dtype), f"[..., 48] in {dtype}", (y.shape, y.dtype))
            _below(relative_rms(y, candidate.reference(x, p, bias)), TOLERANCE[dtype], "linear off reference")

    def test_unpack_is_what_the_kernels_multiply_with(self, candidate: Candidate) -> None:
        """The kernels read the packed weight by themselves; ``unpack`` reads it alike."""
        p = candidate.pack(gaussian(40, 100))
        stored = torch.ops.autoq.dequantize(p.head, 40, 100)
        _below(relative_rms(candidate.unpack(p), stored), 1e-6, "unpack off the kernels' weight")

    def test_zero_weights_stay_zero(self, candidate: Candidate) -> None:
        """Rows of zeros give zeros."""
        w = gaussian(20, 100)
        w[7] = 0.0
        p = candidate.pack(w)
        _holds(not candidate.unpack(p)[7].any(), "a row of zeros unpacks as zeros", candidate.unpack(p)[7])
        _holds(not candidate.linear(gaussian(3, 100), p)[:, 7].any(), "its products are zero", "others")
        zeros = candidate.unpack(candidate.pack(torch.zeros(20, 100)))
        _holds(not zeros.any(), "a weight of zeros unpacks as zeros", zeros)

    def test_error_does_not_depend_on_the_magnitude(self, candidate: Candidate, exponent: int) -> None:
        """A weight times a power of two has the same codes: nothing over- or underflows."""
        w, factor = gaussian(32, 100) * 0.02, 2.0**exponent
        plain, scaled = candidate.pack(w), candidate.pack(w * factor)
        codes = plain.codes * factor if candidate.key == "none" else plain.codes
        _holds(torch.equal(scaled.codes, codes), f"the codes are those of the weight / 2**{exponent}", "others")
        errors = [relative_rms(candidate.unpack(plain), w), relative_rms(candidate.unpack(scaled), w * factor)]
        _holds(math.isclose(*errors, rel_tol=1e-4), f"the error is that of the weight / 2**{exponent}", errors)

    def test_half_precision_weights_pack_as_their_float32_values(self, candidate: Candidate) -> None:
        """Only the values count, not the dtype that they are stored in."""
        for dtype in (torch.bfloat16, torch.float16):
            w = gaussian(32, 100).to(dtype)
            p, wide = candidate.pack(w), candidate.pack(w.float())
            same = torch.equal(candidate.unpack(p), candidate.unpack(wide))
            same &= candidate.key == "none" or torch.equal(p.data, wide.data)
            _holds(same, f"{dtype} packs as its float32 values", "other bytes")

    def test_packing_is_deterministic_and_leaves_the_weight_alone(self, candidate: Candidate) -> None:
        """Strides and gradients do not matter, and the weight is not written to."""
        w = nn.Parameter(gaussian(100, 40).T)
        before = w.detach().clone()
        p = candidate.pack(w)
        _holds(torch.equal(p.data, candidate.pack(before.contiguous()).data), "equal weights pack alike", "other bytes")
        _holds(torch.equal(w, before), "packing does not write to the weight", "another weight")
        _holds(not p.data.requires_grad, "the packed weight needs no gradient", "one that does")

    def test_packing_in_inference_mode_gives_an_ordinary_tensor(self, candidate: Candidate) -> None:
        """So that gradients to the input still work afterwards."""
        w = gaussian(500, 96)
        with torch.inference_mode():
            p = candidate.pack(w.clone())
        _holds(not p.data.is_inference(), "the packed weight is an ordinary tensor", "an inference tensor")
        _holds(torch.equal(p.data, candidate.pack(w).data), "it is packed alike", "other bytes")

    def test_a_copied_buffer_gives_the_same_bits(self, candidate: Candidate) -> None:
        """The packed weight is all there is: nothing is kept elsewhere."""
        p, x = candidate.pack(gaussian(33, 96)), gaussian(4, 96)
        copy = Packed(p.data.clone())
        same = torch.equal(candidate.linear(x, copy), candidate.linear(x, p))
        _holds(same and torch.equal(candidate.unpack(copy), candidate.unpack(p)), "a copy gives the same", "others")

    def test_bytes_are_those_predicted(self, candidate: Candidate, shape: tuple[int, int]) -> None:
        """``weight_bytes_for`` is exact: budgets are held to it."""
        p = candidate.pack(gaussian(*shape).bfloat16())
        counted, predicted = candidate.weight_bytes(p), candidate.weight_bytes_for(*shape)
        _holds(counted == predicted, f"weight_bytes_for{shape} is {counted}", predicted)

    def test_its_headers_are_its_own(self, candidate: Candidate) -> None:
        """A checkpoint's weight is taken only if its header fits the scheme."""
        form = layout.header(candidate.pack(gaussian(16, 128)).data)
        _holds(candidate.fits(form), "the header is one that the scheme fits", form)
        other = layout.Kind.INT8 if form.kind is layout.Kind.DENSE else layout.Kind.DENSE
        _holds(
            not candidate.fits(form._replace(kind=other)), f"a header of kind {other.name} is not the scheme's", form
        )

    def test_impossible_weights_are_refused_by_layer_name(self, candidate: Candidate, impossible: str) -> None:
        """NaN, infinities, other shapes and dtypes."""
        weight, said = _IMPOSSIBLE[impossible]
        message = _refusal(lambda: candidate.pack(weight, layer="model.layers.3.up"))
        found = message.startswith("model.layers.3.up: ") and said in message
        _holds(found, f"the error names layer and reason ({said})", message)

    def test_operator(self, candidate: Candidate) -> None:
        """``torch.library.opcheck``: schema, shapes and gradient on this weight."""
        p = candidate.pack(gaussian(8, 64))
        # The whole buffer stands for its head: opcheck copies arguments, and a copied view has no weight behind it.
        args = (gaussian(3, 64).requires_grad_(), p.data, gaussian(8), 8)
        torch.library.opcheck(torch.ops.autoq.linear.default, args)

    def test_linear_traces_in_one_graph(self, candidate: Candidate) -> None:
        """``torch.compile(fullgraph=True)``, with the same bits."""
        torch.compiler.reset()  # every class of candidates is a recompilation of the same lambda
        p, x = candidate.pack(gaussian(16, 64)), gaussian(3, 64)
        compiled = torch.compile(lambda x: candidate.linear(x * 2, p), fullgraph=True, backend="aot_eager")
        _holds(torch.equal(compiled(x), candidate.linear(x * 2, p)), "compiled, the product is the same", "another")

    def test_input_gradient_is_that_of_the_unpacked_weight(self, candidate: Candidate) -> None:
        """Straight through the rounding of activations."""
        p, x = candidate.pack(gaussian(16, 64)), gaussian(3, 64).requires_grad_()
        y = candidate.linear(x, p)
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        wanted = torch.ones(3, 16, dtype=torch.float64) @ candidate.unpack(p).double()
        _below(relative_rms(gradient, wanted), TOLERANCE[torch.float32], "the gradient off that of the weight")

    def test_a_saved_layer_comes_back_bit_equal(self, candidate: Candidate, tmp_path: Path) -> None:
        """Applied to a model, saved, and loaded without its float weights."""
        linear = nn.Linear(160, 48)
        linear.weight.data = gaussian(48, 160, seed=4)
        model = nn.Sequential(linear).eval()
        report = apply(model, Plan(layers={"0": candidate.scheme}))
        _holds(not report.skipped, "the layer is quantized", report.skipped)
        save_quantized(model, tmp_path / "saved")
        loaded = load_quantized(lambda: nn.Sequential(nn.Linear(160, 48)), tmp_path / "saved")
        for rows in (1, 40):
            x = gaussian(rows, 160, seed=rows)
            _holds(torch.equal(loaded(x), model(x)), f"{rows} rows give the same bits after loading", "others")

    def test_ordinary_layers_are_not_refused(self, candidate: Candidate, dtype: torch.dtype) -> None:
        """``why_not`` is None."""
        reason = candidate.why_not(LinearOp(m=1, k=576, n=1536, dtype=dtype, device="cuda:0"))
        _holds(reason is None, f"576 × 1536 in {dtype} is not refused", reason)

    def test_what_cannot_run_is_refused_with_the_reason(self, candidate: Candidate) -> None:
        """Devices and dtypes without a kernel, and rows shorter than a block of codes."""
        op = LinearOp(m=1, k=576, n=1536, dtype=torch.bfloat16)
        cases: list[tuple[dict[str, Any], str]] = [
            ({"device": "mps"}, "device 'mps'"),
            ({"dtype": torch.float64}, "float64"),
        ]
        if candidate.key != "none":
            cases.append(({"k": 16}, "K=16"))
        for change, said in cases:
            reason = candidate.why_not(replace(op, **change))
            _holds(said in (reason or ""), f"{change} is refused, the reason with {said!r}", reason)


class NearestCodes(Suite):
    """What holds for schemes that round each weight to the nearest value of its row's or group's grid."""

    def test_every_code_is_the_nearest(self, candidate: Candidate) -> None:
        """No other code of the same scale and minimum is closer."""
        w = gaussian(24, 100)
        p = candidate.pack(w)
        error = (candidate.unpack(p).double() - w.double()).abs()
        nearest = error if candidate.key == "none" else (grid(p) - w.double()[:, :, None]).abs().amin(dim=2)
        _below(float((error - nearest).max()), 1e-6, "the largest distance beyond that of the nearest code")

    def test_constant_rows(self, candidate: Candidate, value: float) -> None:
        """A row of one value keeps it to float16's rounding, or half a step of int8."""
        w = gaussian(8, 100) * value  # 8 rows: with column factors a constant row is constant no longer
        w[3] = value
        p = candidate.pack(w)
        limit = 0.5 / 127 if layout.header(p.data).kind is layout.Kind.INT8 else 2**-11
        _below(float((candidate.unpack(p)[3] / value - 1).abs().max()), limit, f"the error of a row of {value}")


class IndependentRows(Suite):
    """What holds for schemes that pack each row by itself."""

    def test_rows_are_packed_alike_in_any_chunk(self, candidate: Candidate) -> None:
        """Where a row lies does not matter."""
        w = gaussian(700, 400)
        same = torch.equal(candidate.pack(w).codes[650:], candidate.pack(w[650:]).codes)
        _holds(same, "the last 50 of 700 rows have the codes that they have alone", "others")


def grid(p: Packed) -> Tensor:
    """The values that each weight could have been rounded to, from the header, the scales and the minima.

    Args:
        p: packed by any scheme but ``none``.

    Returns:
        float64 ``[N, K, codes]``.
    """
    form, (n, k) = layout.header(p.data), p.shape
    if p.scale is None:
        raise ValueError("an unquantized weight has no grid")
    if form.kind is not layout.Kind.AFFINE:
        codes = torch.arange(-128, 128) if form.kind is layout.Kind.INT8 else layout.fp6_values(form.kind)
        return (codes.double() * p.scale.double()[:, None, None]).expand(n, k, -1)
    group = torch.arange(k) // form.group_size
    values = torch.arange(2**form.bits).double() * p.scale.double()[:, group, None]
    if p.minimum is not None:
        values = values + p.minimum.double()[:, group, None]
    if p.row_scale is not None:
        values = values * p.row_scale.double()[:, None, None]
    return values if p.column_scale is None else values * p.column_scale.double()[:, None]


def _holds(fact: bool, rule: str, got: object) -> None:
    if not fact:
        raise AssertionError(f"{rule}; got {got}")


def _below(error: float, limit: float, what: str) -> None:
    _holds(error <= limit, f"{what} is at most {limit:g}", f"{error:g}")  # NaN is not


def _refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except CandidateError as problem:
        return str(problem)
    raise AssertionError("CandidateError is raised; got none")
