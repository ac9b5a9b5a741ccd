// The operators linear, dequantize, embedding and kernel_name on the CPU: checks, choice of the path, threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/Utils.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <string>

#include "attention.h"
#include "gradient.h"
#include "kv_rows.h"
#include "library.h"
#include "packed.h"
#include "scalar.h"

namespace autoq {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kThreadWork = 1 << 15;  // products below which a second thread costs more than it gives
constexpr int64_t kActivationBytes = int64_t{4} << 20;   // rounded x held at a time
constexpr int64_t kFloatWeightBytes = int64_t{4} << 20;  // float weight held at a time
constexpr int64_t kFloatGemmRows = 16;    // from here on float x is faster through a float weight and sgemm
constexpr int64_t kBFloat16GemmRows = 64;  // from here on bfloat16 is, where the CPU multiplies it

enum class Path { kStock, kDense, kCodes, kFloatGemm, kBFloat16Gemm };

bool cpu_has(const char* feature) {
  const auto flags = at::cpu::get_cpu_capabilities();
  const auto flag = flags.find(feature);
  return flag != flags.end() && flag->second.toBool();
}

// Whether the CPU multiplies the type, so that stock kernels are made for it.
bool multiplies(DType dtype) {
  static const bool bf16 = cpu_has("avx512_bf16"), half = cpu_has("avx512_fp16");
  return dtype == DType::kFloat || (dtype == DType::kBFloat16 ? bf16 : half);
}

Path choose(const Packed& w, int64_t m, DType dtype) {
  if (w.kind == Kind::kDense) {
    if (dtype != w.dense().dtype || dtype == DType::kFloat) return Path::kStock;
    if (m <= kDenseRows) return Path::kDense;
    return multiplies(dtype) ? Path::kStock : Path::kFloatGemm;
  }
  if (w.dynamic(m)) return Path::kCodes;
  if (dtype == DType::kFloat) return m >= kFloatGemmRows ? Path::kFloatGemm : Path::kCodes;
  return dtype == DType::kBFloat16 && m >= kBFloat16GemmRows && multiplies(dtype) ? Path::kBFloat16Gemm : Path::kCodes;
}

DType dtype_of(at::ScalarType type, const char* what) {
  switch (type) {
    case at::kFloat: return DType::kFloat;
    case at::kHalf: return DType::kHalf;
    case at::kBFloat16: return DType::kBFloat16;
    default: TORCH_CHECK(false, "autoq: ", what, " must be float32, bfloat16 or float16; got ", type);
  }
}

Packed read(const Tensor& head) {
  TORCH_CHECK(head.device().is_cpu() && head.scalar_type() == at::kByte && head.dim() == 1 && head.is_contiguous(),
              "autoq: head must be a contiguous 1-D uint8 tensor on the CPU; got ", head.toString(), " ", head.sizes());
  const auto available = static_cast<int64_t>(head.storage().nbytes()) - head.storage_offset();
  Packed w;
  const char* broken = parse(head.const_data_ptr<uint8_t>(), available, &w);
  TORCH_CHECK(broken == nullptr, "autoq: head is no packed weight: ", broken);
  return w;
}

void check_shape(const Packed& w, int64_t n, int64_t k) {
  TORCH_CHECK(w.n == n && w.k == k, "autoq: the packed weight is [", w.n, ", ", w.k, "]; the call says [", n, ", ", k, "]");
}

Typed typed(const Tensor& t, const char* what) { return {t.data_ptr(), dtype_of(t.scalar_type(), what)}; }

// A view of the codes section as a tensor; valid while the head is.
Tensor codes_view(const Packed& w, at::ScalarType type) {
  return at::from_blob(const_cast<uint8_t*>(w.codes), {w.n, w.k}, at::TensorOptions().dtype(type));
}

at::ScalarType dense_type(const Packed& w) {
  return w.bits == 16 ? at::kBFloat16 : w.bits == 17 ? at::kHalf : at::kFloat;
}

Tensor as_type(const Tensor& t, at::ScalarType type) { return t.scalar_type() == type ? t : t.to(type); }

// Multiplies a dense weight with stock kernels, which want one type: x's.
Tensor run_stock(const Packed& w, const Tensor& x, const OptionalTensor& bias) {
  const at::ScalarType type = x.scalar_type();
  const OptionalTensor typed_bias = bias ? OptionalTensor(as_type(*bias, type)) : bias;
  return at::linear(x, as_type(codes_view(w, dense_type(w)), type), typed_bias);
}

Typed offset(Typed a, int64_t elements) {
  const int64_t size = a.dtype == DType::kFloat ? 4 : 2;
  return {static_cast<char*>(a.data) + elements * size, a.dtype};
}

int64_t grain(int64_t work_per_item) { return std::max<int64_t>(1, kThreadWork / std::max<int64_t>(1, work_per_item)); }

// Rounds x, some rows at a time, and multiplies by the codes themselves.
void run_codes(const Packed& w, Typed x, int64_t m, Typed bias, Typed y) {
  thread_local Scratch<char> scratch;
  Activation a = activation_form(w, m, x.dtype);
  const int64_t fit = std::max<int64_t>(1, kActivationBytes / (2 * a.planes * a.k_padded)), unit = row_unit(a);
  for (int64_t done = 0; done < m; done += fit) {
    a.m = std::min(fit, m - done);
    place(w, scratch.reserve(activation_bytes(w, a)), a);
    const Typed x_part = offset(x, done * w.k), y_part = offset(y, done * w.n);
    at::parallel_for(0, a.m, grain(w.k), [&](int64_t begin, int64_t end) { round_activation(w, x_part, begin, end, a); });
    at::parallel_for(0, (w.n + unit - 1) / unit, grain(unit * w.k * a.m), [&](int64_t begin, int64_t end) {
      multiply(w, a, bias, y_part, begin * unit, std::min(end * unit, w.n));
    });
  }
}

// Multiplies a dense weight with few rows of x.
void run_dense(const Packed& w, Typed x, int64_t m, Typed bias, Typed y) {
  constexpr int64_t kUnit = 4;  // rows of the weight, worked on together
  thread_local Scratch<float> scratch;
  const int64_t stride = round_up(w.k, 16) + 16;
  float* rows = scratch.reserve(m * stride);
  for (int64_t i = 0; i < m; ++i) {
    convert(x, i * w.k, w.k, {rows + i * stride, DType::kFloat});
    std::fill(rows + i * stride + w.k, rows + (i + 1) * stride, 0.0f);
  }
  at::parallel_for(0, (w.n + kUnit - 1) / kUnit, grain(kUnit * w.k * m), [&](int64_t begin, int64_t end) {
    multiply_dense(w, rows, stride, m, bias, y, begin * kUnit, std::min(end * kUnit, w.n));
  });
}

// Multiplies by the dequantized weight in x's type, some rows of it at a time. x is [M, K].
void run_dequantized(const Packed& w, const Tensor& x, Tensor& y) {
  const int64_t size = x.element_size();
  const int64_t rows = std::min(w.n, std::max<int64_t>(32, kFloatWeightBytes / (w.k * size)));
  Tensor part = at::empty({rows, w.k}, x.options());
  for (int64_t n = 0; n < w.n; n += rows) {
    const int64_t count = std::min(rows, w.n - n);
    Tensor weight = part.narrow(0, 0, count);
    at::parallel_for(0, count, grain(w.k), [&](int64_t begin, int64_t end) {
      dequantize(w, n + begin, n + end, offset(typed(weight, "weight"), begin * w.k));
    });
    Tensor out = y.narrow(1, n, count);
    at::mm_out(out, x, weight.t());
  }
}

// The same in float, whatever x's type, and rounded once, with the bias, to y's.
void run_float(const Packed& w, const Tensor& x, const OptionalTensor& bias, Tensor& y) {
  Tensor sums = x.scalar_type() == at::kFloat ? y : at::empty(y.sizes(), x.options().dtype(at::kFloat));
  run_dequantized(w, x.to(at::kFloat), sums);
  if (bias) sums.add_(*bias);
  if (!sums.is_same(y)) y.copy_(sums);
}

Tensor linear(const Tensor& x, const Tensor& head, const OptionalTensor& bias, int64_t n) {
  TORCH_CHECK(x.dim() >= 1, "autoq: x must have at least one dimension");
  const Packed w = read(head);
  check_shape(w, n, x.size(-1));
  const DType dtype = dtype_of(x.scalar_type(), "x");
  const Path path = choose(w, x.numel() / w.k, dtype);
  if (path == Path::kStock) return run_stock(w, x, bias);
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n), "autoq: bias must be [", n, "]");
  c10::SmallVector<int64_t, 5> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  Tensor y = at::empty(shape, x.options());
  const int64_t m = x.numel() / w.k;
  if (m == 0) return y;
  const Tensor rows = x.contiguous();
  const Tensor bias_row = bias ? bias->contiguous() : Tensor();
  const Typed bias_typed = bias ? typed(bias_row, "bias") : Typed{nullptr, DType::kFloat};
  if (path == Path::kCodes) {
    run_codes(w, typed(rows, "x"), m, bias_typed, typed(y, "y"));
  } else if (path == Path::kDense) {
    run_dense(w, typed(rows, "x"), m, bias_typed, typed(y, "y"));
  } else {
    Tensor y_MN = y.view({m, n});
    if (path == Path::kFloatGemm) {
      run_float(w, rows.view({m, w.k}), bias, y_MN);
    } else {
      run_dequantized(w, rows.view({m, w.k}), y_MN);
      if (bias) y_MN.add_(*bias);
    }
  }
  return y;
}

Tensor dequantize_op(const Tensor& head, int64_t n, int64_t k) {
  const Packed w = read(head);
  check_shape(w, n, k);
  if (w.kind == Kind::kDense) return codes_view(w, dense_type(w)).to(at::kFloat, false, /*copy=*/true);
  const Tensor out = at::empty({n, k}, at::kFloat);
  const Typed out_typed = typed(out, "out");
  at::parallel_for(0, n, grain(k), [&](int64_t begin, int64_t end) {
    dequantize(w, begin, end, offset(out_typed, begin * k));
  });
  return out;
}

// Rows of the weight, in any of the dtypes.
Tensor embedding(const Tensor& indices, const Tensor& head, int64_t n, int64_t k, at::ScalarType type) {
  const Packed w = read(head);
  check_shape(w, n, k);
  TORCH_CHECK(indices.device().is_cpu() && (indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt),
              "autoq: indices must be int64 or int32 on the CPU; got ", indices.toString());
  const Tensor rows = indices.to(at::kLong).contiguous();
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const int64_t count = rows.numel();
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_INDEX(0 <= row[i] && row[i] < n, "autoq: indices must be in [0, ", n, "); got ", row[i]);
  }
  c10::SmallVector<int64_t, 5> shape(indices.sizes().begin(), indices.sizes().end());
  shape.push_back(k);
  const Tensor out = at::empty(shape, at::TensorOptions().dtype(type));
  const Typed out_typed = typed(out, "the result");
  at::parallel_for(0, count, grain(k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) dequantize(w, row[i], row[i] + 1, offset(out_typed, i * k));
  });
  return out;
}

std::string scheme_name(const Packed& w, int64_t m) {
  switch (w.kind) {
    case Kind::kDense: return w.bits == 16 ? "bf16" : w.bits == 17 ? "fp16" : "fp32";
    case Kind::kInt8: return w.dynamic(m) ? "int8dq" : "int8wo";
    case Kind::kFp6E3M2: return "fp6_e3m2";
    case Kind::kFp6E2M3: return "fp6_e2m3";
    default: return "int" + std::to_string(w.bits) + (w.dynamic(m) ? "dq" : "");
  }
}

std::string kernel_name(const Tensor& head, int64_t m, at::ScalarType type) {
  const Packed w = read(head);
  const DType dtype = dtype_of(type, "x");
  const std::string name = AUTOQ_TEXT(AUTOQ_ISA) "." + scheme_name(w, m);
  switch (choose(w, m, dtype)) {
    case Path::kStock: return "aten.linear";
    case Path::kDense: return name + ".gemv";
    case Path::kFloatGemm: return name + ".dequantize+gemm.fp32";
    case Path::kBFloat16Gemm: return name + ".dequantize+gemm.bf16";
    default: break;
  }
  if (m <= kFewRows) return name + ".gemv";
  return name + (activation_form(w, m, dtype).bytes ? ".gemm.int8" : ".gemm.int16");
}

}  // namespace
}  // namespace autoq

AUTOQ_LIBRARY(AUTOQ_NAMESPACE, library) {
  library.def("linear(Tensor x, Tensor head, Tensor? bias, int n) -> Tensor");
  library.def("dequantize(Tensor head, int n, int k) -> Tensor");
  library.def("embedding(Tensor indices, Tensor head, int n, int k, ScalarType dtype) -> Tensor");
  library.def("kernel_name(Tensor head, int m, ScalarType dtype) -> str");
}

AUTOQ_LIBRARY_IMPL(AUTOQ_NAMESPACE, CPU, library) {
  library.impl("linear", TORCH_FN(autoq::linear));
  library.impl("dequantize", TORCH_FN(autoq::dequantize_op));
  library.impl("embedding", TORCH_FN(autoq::embedding));
  library.impl("kernel_name", TORCH_FN(autoq::kernel_name));
}

// Makes this build the CPU implementation of the operators that autoq:: has, until the process ends.
extern "C" __attribute__((visibility("default"))) void autoq_register_default() {
  using Library = torch::Library;
  static const auto* cpu = [] {
    auto* library = new Library(Library::IMPL, "autoq", c10::DispatchKey::CPU, __FILE__, __LINE__);
    library->impl("linear", TORCH_FN(autoq::linear));
    library->impl("dequantize", TORCH_FN(autoq::dequantize_op));
    library->impl("embedding", TORCH_FN(autoq::embedding));
    library->impl("attention", TORCH_FN(autoq::attention));
    library->impl("store_kv", TORCH_FN(autoq::store_kv));
    return library;
  }();
  (void)cpu;
  autoq::register_gradient();
}
