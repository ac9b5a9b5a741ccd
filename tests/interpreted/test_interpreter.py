"""That the interpreter, as these tests use it, behaves like a GPU where it would not by itself."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _multiply(x, w, y, B: tl.constexpr):
    i, j = tl.arange(0, B)[:, None] * B, tl.arange(0, B)[None, :]
    tl.store(y + i + j, tl.dot(tl.load(x + i + j), tl.load(w + i + j), tl.zeros((B, B), tl.float32)))


@triton.jit
def _convert(x, y, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(y + at, tl.load(x + at).to(y.dtype.element_ty))


@triton.jit
def _double(x, y, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.store(y + at, tl.load(x + at) + tl.load(x + at))


@triton.jit
def _at_least(y, B: tl.constexpr):
    tl.store(y + tl.arange(0, B), tl.maximum(tl.load(y + tl.arange(0, B)), 2.0))


@triton.jit
def _copy(x, y, start, WIDE: tl.constexpr, STEP: tl.constexpr):
    if WIDE:
        x, y = x.to(tl.pointer_type(tl.int64)), y.to(tl.pointer_type(tl.int64))
    at = start + tl.arange(0, 4)
    tl.store(y + at // STEP, tl.load(x + at))


@triton.jit
def _shape(y, n):
    tl.store(y, n.to(tl.float32))


@triton.jit(do_not_specialize=["n"])
def _any_shape(y, n):
    tl.store(y, n.to(tl.float32))


def test_bfloat16_products_and_roundings():
    x, w, y = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    _multiply[(1,)](x, w, y, 16)
    assert torch.allclose(y, x.float() @ w.float(), atol=1e-5)
    for values in (torch.randn(64) * 100, torch.arange(-32, 32).to(torch.int8), torch.tensor([torch.nan, torch.inf])):
        rounded = torch.empty(len(values), dtype=torch.bfloat16)
        _convert[(1,)](values, rounded, len(values))
        assert torch.equal(rounded.view(torch.int16), values.bfloat16().view(torch.int16))
    with pytest.raises(InterpreterError, match="arithmetic on bfloat16"):
        _double[(1,)](rounded, rounded, 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 200.0, -200.0])
def test_floats_outside_an_integers_range_are_refused(value):
    with pytest.raises(InterpreterError, match="cannot become int8"):
        _convert[(1,)](torch.tensor([value, 1.0]), torch.empty(2, dtype=torch.int8), 2)


def test_loads_and_stores_stay_aligned_inside_tensors_and_apart():
    x, y = torch.arange(8).half(), torch.zeros(8).half()
    _copy[(1,)](x, y, 4, False, 1)
    assert torch.equal(y[4:], x[4:])
    for wrong, said in (
        ((x, y, 5, False, 1), "is not in one of"),
        ((x[:7], y, 4, False, 1), "is not in one of"),
        ((x, y[:7], 4, False, 1), "is not in one of"),
        ((x[1:], y, 0, True, 1), "not a multiple of 8"),
    ):
        with pytest.raises(InterpreterError, match=said):
            _copy[(1,)](*wrong)
    with pytest.raises(MemoryError, match="stored twice"):
        _copy[(1,)](x, y, 0, False, 2)


def test_the_larger_of_a_number_and_nan_is_the_number():
    y = torch.tensor([torch.nan, 1.0])
    _at_least[(1,)](y, 2)
    assert y.tolist() == [2.0, 2.0]


def test_an_argument_of_one_is_a_constant():
    y = torch.empty(1)
    _shape[(1,)](y, 2)
    assert y.item() == 2
    with pytest.raises(InterpreterError, match="'int' object has no attribute 'to'"):
        _shape[(1,)](y, 1)
    _any_shape[(1,)](y, 1)
    assert y.item() == 1


def test_new_tensors_hold_nan():
    assert torch.empty(3).new_empty(1000).isnan().all()
