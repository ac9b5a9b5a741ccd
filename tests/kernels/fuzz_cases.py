"""The cases of `fuzz`: drawn at random, run on exactly as much memory as they are entitled to.

A case is a dict that JSON holds; with its own seed it says everything, so a printed case can be run again.
"""

import ctypes
import math
import struct
from unittest import mock

import torch

from autoq import candidates
from autoq_kernels import layout, ops
from autoq_kernels.cpu import build, probe
from autoq_kernels.layout import Kind

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROWS = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 70, 129, 255, 256, 257, 300)
GROUP_SIZES = (32, 64, 96, 128, 160, 288, 512)
MAX_WORK = 3_000_000  # products of a case
FIELDS = 16  # int64 of a header
MAGIC, VERSION, N_FIELD, K_FIELD = 0, 1, 4, 5
BROKEN = ("fields", "fields", "fields", "copied", "truncated", "short", "signed", "strided", "shape", "bias", "x")


class Memory:
    """Blocks of an exact size, which the sanitizer guards on both sides; freed on exit."""

    def __init__(self):
        self._libc = ctypes.CDLL(None)  # the sanitizer's, which was loaded first
        self._blocks = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for address, poisoned in self._blocks:
            self.allow(address, poisoned)
            self._libc.free(ctypes.c_void_p(address))

    def block(self, size, offset=0):
        """uint8 [size] that starts `offset` bytes after a multiple of 64; both neighbours are poisoned."""
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        address = ctypes.c_void_p()
        if self._libc.posix_memalign(ctypes.byref(address), ctypes.c_size_t(64), ctypes.c_size_t(offset + size)):
            raise MemoryError(size)
        poisoned = offset // 8 * 8  # the sanitizer's unit
        self._blocks.append((address.value, poisoned))
        everything = (ctypes.c_uint8 * (offset + size)).from_address(address.value)
        self.forbid(address.value, poisoned)
        return torch.frombuffer(everything, dtype=torch.uint8)[offset:]

    def copy(self, tensor, offset=0):
        """The tensor, contiguous, in a block of its own."""
        copied = self.block(tensor.numel() * tensor.element_size(), offset).view(tensor.dtype).view(tensor.shape)
        return copied.copy_(tensor)

    def strided(self, values, form, offset=0):
        """The values with the strides of a form; what lies between them is NaN, what lies behind is poisoned."""
        sizes = [1 if dim in form["expanded"] else size for dim, size in enumerate(values.shape)]
        strides, step = [0] * len(sizes), form["step"]
        for dim in sorted(range(len(sizes)), key=lambda dim: form["order"][dim]):
            strides[dim] = step
            step = step * sizes[dim] + form["gap"]
        extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if values.numel() == 0:
            return values
        base = self.block(extent * values.element_size(), offset * values.element_size()).view(values.dtype)
        base.fill_(math.nan)
        first = values[tuple(slice(0, size) for size in sizes)]
        return base.as_strided(sizes, strides, base.storage_offset()).copy_(first).expand(values.shape)

    def forbid(self, address, size):
        """Any access of instrumented code ends the process."""
        self._libc["__asan_poison_memory_region"](ctypes.c_void_p(address), ctypes.c_size_t(size))

    def allow(self, address, size):
        self._libc["__asan_unpoison_memory_region"](ctypes.c_void_p(address), ctypes.c_size_t(size))


def weight_forms():
    """Every combination of kind, bits, activation bits and m_switch that the layout knows."""
    forms = []
    for kind in Kind:
        for bits in sorted({*layout.PLANES, *layout.DENSE_BITS.values()}):
            for activation_bits, m_switch in ((0, 0), (8, 0), (8, 5)):
                form = {"kind": int(kind), "bits": bits, "activation_bits": activation_bits, "m_switch": m_switch}
                weight = {**form, "n": 2, "k": 40, "group_size": 32, "optional": []}
                try:
                    layout.header(packed(weight, torch.Generator().manual_seed(0)))
                except layout.LayoutError:
                    continue
                forms.append(form)
    return forms


def packed(weight, g):
    """The buffer of a random weight."""
    kind, bits, n, k = Kind(weight["kind"]), weight["bits"], weight["n"], weight["k"]
    group_size = weight["group_size"] if kind is Kind.AFFINE else 0
    groups = -(-k // group_size) if group_size else 0
    fields = {"kind": kind, "bits": bits, "n": n, "k": k, "group_size": group_size}
    fields |= {"activation_bits": weight["activation_bits"], "m_switch": weight["m_switch"]}
    if kind is Kind.DENSE:
        dtype = {bits: dtype for dtype, bits in layout.DENSE_BITS.items()}.get(bits, torch.float32)
        return layout.build(**fields, codes=torch.randn(n, k, generator=g).to(dtype))
    if kind is Kind.INT8:
        codes = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
        return layout.build(**fields, codes=codes, scale=(torch.rand(n, generator=g) + 0.5) / 64)
    columns = groups * group_size if kind is Kind.AFFINE else -(-k // layout.BLOCK) * layout.BLOCK
    codes = torch.randint(0, 1 << min(bits, 8), (n, columns), generator=g, dtype=torch.uint8)
    if kind is not Kind.AFFINE:
        return layout.build(**fields, codes=codes, scale=torch.rand(n, generator=g) + 0.5)
    step = 0.5**bits  # of a weight in [0, 1.5], or in [-0.5, 1] with a minimum: no sum overflows float16
    parts = {
        "minimum": (torch.randn(n, groups, generator=g) * 0.1 - 0.5).half(),
        "row_scale": torch.exp2(torch.randint(-8, 0, (n,), generator=g).float()),
        "column_scale": torch.rand(k, generator=g) + 0.5,
    }
    scale = (step * (torch.rand(n, groups, generator=g) + 0.5)).half()
    return layout.build(**fields, codes=codes, scale=scale, **{name: parts[name] for name in weight["optional"]})


def draw(rng, isa, forms):
    """A random case."""
    case = {"isa": isa, "seed": rng.getrandbits(40), "threads": rng.choice((1, 2))}
    case["op"] = op = rng.choices(("linear", "dequantize", "broken", "pack"), weights=(60, 8, 20, 12))[0]
    if op == "pack":
        n, k = rng.choice((1, 2, 7, 33, rng.randint(1, 80))), rng.choice((1, 31, 32, 33, 96, rng.randint(1, 400)))
        values = rng.choice(("normal", "normal", "constant", "zero_row", "outlier"))
        case |= {"scheme": str(rng.choice(candidates.ALL)), "n": n, "k": k, "values": values}
        return case | _placing(rng, (n, k))
    n = rng.choice((1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 64, rng.randint(1, 200)))
    k = rng.choice((1, 2, 31, 32, 33, 63, 64, 65, 75, 128, 256, 257, rng.randint(1, 700), rng.randint(1, 5000)))
    optional = [name for name in ("minimum", "row_scale", "column_scale") if rng.random() < 0.6]
    weight = {**rng.choice(forms), "n": n, "k": k, "group_size": rng.choice(GROUP_SIZES), "optional": optional}
    case |= {"weight": weight, "data_offset": rng.choice((0, 0, 64, 8, 16, 24, 32, 40))}
    rows = [m for m in ROWS if m * n * k <= MAX_WORK]
    m, several = rng.choice(rows), rng.randint(1, 3)
    lead = rng.choice(([], [m], [m], [several, m // several], [1, several, m // several]))
    dense = {16: "bfloat16", 17: "float16", 32: "float32"}.get(weight["bits"])
    dtype = dense or rng.choice(list(DTYPES))
    case |= {"lead": lead, "dtype": dtype, "bias": rng.choice((None, dense) if dense else (None, dtype, *DTYPES))}
    case |= {"bias_step": rng.choice((0, 1, 1, 2, 3)), "bias_offset": rng.randint(0, 15)}
    case["values"] = rng.choice(("normal",) * 6 + ("zero_row", "huge", "tiny", "nan", "inf"))
    if op == "broken":
        case["fault"] = fault = rng.choice(BROKEN)
        case["fields"] = [_field(rng) for _ in range(rng.randint(1, 3))] if fault == "fields" else []
        case["missing"] = rng.choice((1, 8, 63, 64, 65, rng.randint(1, 4000)))
    return case | _placing(rng, (*lead, k))


def _placing(rng, sizes):
    """Strides and alignment of a tensor whose innermost dimension is usually, and often the only, dense one."""
    order = list(range(len(sizes)))[::-1]
    if rng.random() < 0.2:
        rng.shuffle(order)
    expanded = [dim for dim in range(len(sizes)) if rng.random() < 0.08]
    step, gap = rng.choice((1, 1, 1, 2, 3)), rng.choice((0, 0, 0, 1, 5, 64))
    dtype = rng.choice(list(DTYPES))
    form = {"order": order, "expanded": expanded, "step": step, "gap": gap}
    return {"x_form": form, "x_offset": rng.randint(0, 31), "w_dtype": dtype}


def _field(rng):
    """A header's field and what it becomes: an offset to the old value, or another value."""
    extreme = rng.choice((-(2**63), 2**63 - 1, -1, 2**31, 2**32, 2**40, 2**62, 0, 1))
    value = rng.choice((extreme, rng.getrandbits(63), rng.randint(0, 300), 64 * rng.randint(0, 64)))
    change = rng.choice((-64, -1, 1, 32, 64, 4096))
    return [rng.randrange(FIELDS), *(("add", change) if rng.random() < 0.4 else ("set", value))]


def run(case):
    """What is wrong with a case's results, or None; a wrong access does not return."""
    torch.set_num_threads(case["threads"])
    g = torch.Generator().manual_seed(case["seed"])
    with Memory() as memory:
        return {"linear": _linear, "dequantize": _dequantize, "broken": _broken, "pack": _pack}[case["op"]](
            case, g, memory
        )


def _inputs(case, g, memory):
    weight, dtype = case["weight"], DTYPES[case["dtype"]]
    data = memory.copy(packed(weight, g), case["data_offset"])
    x = torch.randn(*case["lead"], weight["k"], generator=g)
    factor = {"huge": 1e20, "tiny": 1e-20}.get(case["values"], 1.0) if dtype != torch.float16 else 1.0
    x = x * factor
    if case["values"] in ("zero_row", "nan", "inf") and x.numel():
        rows = x.view(-1, weight["k"])
        spot = int(torch.randint(weight["k"], (), generator=g))
        if case["values"] == "zero_row":
            rows[-1] = 0
        else:
            rows[-1, spot] = float(case["values"])
    x = memory.strided(x.to(dtype), case["x_form"], case["x_offset"])
    bias = None
    if case["bias"]:
        step = case["bias_step"]
        form = {"order": [0], "expanded": [] if step else [0], "step": step or 1, "gap": 0}
        values = (factor * torch.randn(weight["n"], generator=g)).to(DTYPES[case["bias"]])
        if values.isfinite().all():
            bias = memory.strided(values, form, case["bias_offset"])
    return data[: layout.HEADER_BYTES], x, bias


def _linear(case, g, memory):
    head, x, bias = _inputs(case, g, memory)
    n, k = case["weight"]["n"], case["weight"]["k"]
    got = getattr(torch.ops, f"autoq_{case['isa']}").linear(x, head, bias, n)
    if got.shape != (*x.shape[:-1], n) or got.dtype != x.dtype:
        return f"the result is {got.dtype} {list(got.shape)}"
    x_MK, got_MN = x.reshape(-1, k), got.reshape(-1, n).double()
    w_NK = ops.dequantize(head, n, k).double()
    offset_N = torch.zeros(n) if bias is None else bias
    if Kind(case["weight"]["kind"]) is Kind.DENSE:
        expected_MN = x_MK.double() @ w_NK.T + offset_N.double()
    else:
        expected_MN = ops.linear(x_MK.float(), head, bias, n).double()
    good_M = x_MK.isfinite().all(dim=1)
    if case["values"] in ("nan", "inf") and bool(got_MN[~good_M].isfinite().any()):
        return "a row of x that is not finite gave finite results"
    # What rounding errors are proportional to where the terms of a sum cancel.
    size_MN = expected_MN.square() + x_MK.double().square() @ w_NK.square().T + offset_N.double().square()
    scale = float(size_MN[good_M].sum().sqrt())
    error = float((got_MN - expected_MN)[good_M].norm())
    tolerance = probe.TOLERANCE[x.dtype]
    if got.numel() < 64:  # few results: the rounding of each may be the worst
        tolerance += torch.finfo(x.dtype).eps / 2
    return None if error <= tolerance * scale else f"relative error {error / scale:.2e}, at most {tolerance:.1e}"


def _dequantize(case, g, memory):
    head, _, _ = _inputs(case, g, memory)
    n, k = case["weight"]["n"], case["weight"]["k"]
    got = getattr(torch.ops, f"autoq_{case['isa']}").dequantize(head, n, k)
    error = probe.relative_rms(got, ops.dequantize(head, n, k))
    return None if error <= 1e-6 else f"relative error {error:.2e}"


def _broken(case, g, memory):
    """A fault must be refused; a changed header may still describe a weight within the buffer, and then runs."""
    head, x, bias = _inputs(case, g, memory)
    n, k, fault = case["weight"]["n"], case["weight"]["k"], case["fault"]
    data, must_refuse = layout.buffer(head), True
    if fault == "fields":
        numbers = list(struct.unpack(f"<{FIELDS}q", bytes(head.tolist())))
        old = list(numbers)
        for index, how, value in case["fields"]:
            numbers[index] = value if how == "set" else (numbers[index] + value + 2**63) % 2**64 - 2**63
        head.copy_(torch.tensor(list(struct.pack(f"<{FIELDS}q", *numbers)), dtype=torch.uint8))
        must_refuse = any(numbers[i] != old[i] for i in (MAGIC, VERSION, N_FIELD, K_FIELD))
    elif fault == "copied":
        head = memory.copy(head)
    elif fault == "truncated":
        head = memory.copy(data[: max(layout.HEADER_BYTES, len(data) - case["missing"])])[: layout.HEADER_BYTES]
    elif fault == "short":
        head = memory.copy(data[: layout.HEADER_BYTES - 1])
    elif fault == "signed":
        head = head.view(torch.int8)
    elif fault == "strided":
        head = data[: 2 * layout.HEADER_BYTES : 2]
    elif fault == "shape":
        n, k = n + case["seed"] % 2, k + 1
        x = torch.cat([x, x[..., :1]], dim=-1)
    elif fault == "bias":
        bias = memory.copy(torch.zeros(n + 1 if n > 1 else 3, dtype=x.dtype))
    else:
        x = x.double()
    return _refusals(case, (x, head, bias, n), None if fault in ("bias", "x") else (head, n, k), must_refuse)


def _refusals(case, linear, dequantize, must_refuse):
    operators = getattr(torch.ops, f"autoq_{case['isa']}")
    for name, arguments in (("linear", linear), ("dequantize", dequantize)):
        if arguments is None:
            continue
        try:
            getattr(operators, name)(*arguments)
        except RuntimeError:
            continue
        if must_refuse:
            return f"{name} took it"
    return None


def _pack(case, g, memory):
    candidate = candidates.parse(case["scheme"])
    w = torch.randn(case["n"], case["k"], generator=g)
    if case["values"] == "constant":
        w = torch.full_like(w, 0.37)
    elif case["values"] == "zero_row":
        w[0] = 0
    elif case["values"] == "outlier":
        w[0, 0] = 1000
    w_NK = memory.strided(w.to(DTYPES[case["w_dtype"]]), case["x_form"], case["x_offset"])
    got = candidate.pack(w_NK)
    if not torch.equal(got.data, candidate.pack(w_NK.clone(memory_format=torch.contiguous_format)).data):
        return "the packed weight depends on the strides"
    none = build.BuildStatus(isa=None, path=None, operators=(), reason="to compare with")
    with mock.patch.multiple(build, status=mock.Mock(return_value=none), load=mock.Mock(return_value=none)):
        expected = candidate.pack(w_NK)
    errors = [float((candidate.unpack(p) - w_NK.float()).norm()) for p in (got, expected)]
    if not errors[0] <= 1.01 * errors[1] + 1e-5 * float(w_NK.float().norm()):
        return f"error {errors[0]:.4e}; the definition's is {errors[1]:.4e}"
    return None
