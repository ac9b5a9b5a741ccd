// The operators linear, dequantize and kernel_name on the CPU: checks, choice of the path, threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/Utils.h>
#include <ATen/ops/_int_mm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <memory>
#include <string>

#include "gradient.h"
#include "packed.h"
#include "quantize.h"
#include "scalar.h"

#ifndef AUTOQ_ISA
#error "compile with -DAUTOQ_ISA=<name>: it names the namespace of the operators"
#endif
#define AUTOQ_TEXT_OF(name) #name
#define AUTOQ_TEXT(name) AUTOQ_TEXT_OF(name)
#define AUTOQ_JOIN_OF(a, b) a##b
#define AUTOQ_JOIN(a, b) AUTOQ_JOIN_OF(a, b)
#define AUTOQ_NAMESPACE AUTOQ_JOIN(autoq_, AUTOQ_ISA)
// One more level, because torch's macros paste the name before it is expanded.
#define AUTOQ_LIBRARY(name, library) TORCH_LIBRARY(name, library)
#define AUTOQ_LIBRARY_IMPL(name, key, library) TORCH_LIBRARY_IMPL(name, key, library)

namespace autoq {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kThreadWork = 1 << 15;           // products below which a second thread costs more than it gives
constexpr int64_t kActivationBytes = int64_t{4} << 20;  // rounded x held at a time
constexpr int64_t kFloatWeightBytes = int64_t{4} << 20;  // float weight held at a time
constexpr int64_t kFloatGemmRows = 24;   // from here on float x is faster through a float weight and sgemm
constexpr int64_t kNativeGemmRows = 32;  // from here on bfloat16 or int8 instructions of the CPU are

enum class Path { kDense, kCodes, kFloatGemm, kBFloat16Gemm, kInt8Gemm };

bool has_bf16() {
  static const bool found = [] {
    const auto flags = at::cpu::get_cpu_capabilities();
    const auto flag = flags.find("avx512_bf16");
    return flag != flags.end() && flag->second.toBool();
  }();
  return found;
}

#ifdef __AVX512VNNI__
constexpr bool kHasVnni = true;
#else
constexpr bool kHasVnni = false;
#endif

Path choose(const Packed& w, int64_t m, DType dtype) {
  if (w.kind == Kind::kDense) return Path::kDense;
  if (w.dynamic()) return kHasVnni && m >= kNativeGemmRows ? Path::kInt8Gemm : Path::kCodes;
  if (dtype == DType::kFloat) return m >= kFloatGemmRows ? Path::kFloatGemm : Path::kCodes;
  if (dtype == DType::kBFloat16 && m >= kNativeGemmRows && has_bf16()) return Path::kBFloat16Gemm;
  return Path::kCodes;
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

Typed offset_rows(Typed a, int64_t elements) {
  const int64_t size = a.dtype == DType::kFloat ? 4 : 2;
  return {static_cast<char*>(a.data) + elements * size, a.dtype};
}

// Lays the three arrays of `a` into scratch memory; kernels may read 8 floats past the end.
void place(const Packed& w, Activation& a, bool needs_sums) {
  thread_local Scratch<float> scratch;
  const int64_t values = round_up(a.planes * a.m * a.k_padded, 2) / 2, scales = a.m * a.blocks + 8;
  const int64_t sums = needs_sums ? a.m * a.sum_stride : 0;
  float* memory = scratch.reserve(values + scales + sums);
  a.values = reinterpret_cast<int16_t*>(memory);
  a.scale = memory + values;
  a.group_sum = needs_sums ? memory + values + scales : nullptr;
}

int64_t grain(int64_t work_per_item) { return std::max<int64_t>(1, kThreadWork / std::max<int64_t>(1, work_per_item)); }

// Rounds x and multiplies by the codes themselves.
void run_codes(const Packed& w, Typed x, int64_t m, Typed bias, Typed y) {
  constexpr int64_t kRows = 4;  // of the weight, the kernels' unit
  Activation a = activation_form(w, 1, x.dtype);
  const int64_t fit = std::max<int64_t>(1, kActivationBytes / (2 * a.planes * a.k_padded));
  for (int64_t done = 0; done < m; done += fit) {
    a.m = std::min(fit, m - done);
    place(w, a, w.minimum != nullptr);
    const Typed x_part = offset_rows(x, done * w.k), y_part = offset_rows(y, done * w.n);
    at::parallel_for(0, a.m, grain(w.k), [&](int64_t begin, int64_t end) { round_activation(w, x_part, begin, end, a); });
    at::parallel_for(0, (w.n + kRows - 1) / kRows, grain(kRows * w.k * a.m), [&](int64_t begin, int64_t end) {
      multiply(w, a, bias, y_part, begin * kRows, std::min(end * kRows, w.n));
    });
  }
}

// Multiplies by the dequantized weight, some rows of it at a time. x is [M, K].
void run_dequantized(const Packed& w, const Tensor& x, const OptionalTensor& bias, Tensor& y) {
  const int64_t size = x.element_size();
  const int64_t rows = std::min(w.n, std::max<int64_t>(32, kFloatWeightBytes / (w.k * size)));
  Tensor part = at::empty({rows, w.k}, x.options());
  for (int64_t n = 0; n < w.n; n += rows) {
    const int64_t count = std::min(rows, w.n - n);
    Tensor weight = part.narrow(0, 0, count);
    at::parallel_for(0, count, grain(w.k), [&](int64_t begin, int64_t end) {
      dequantize(w, n + begin, n + end, offset_rows(typed(weight, "weight"), begin * w.k));
    });
    Tensor out = y.narrow(1, n, count);
    at::mm_out(out, x, weight.t());
  }
  if (bias) y.add_(*bias);
}

// Rounds x to int8 and multiplies with the int8 instructions ATen finds; sums are exact.
void run_int8(const Packed& w, Typed x, int64_t m, Typed bias, Typed y) {
  constexpr int64_t kColumns = 4096;
  Activation a = activation_form(w, m, x.dtype);
  place(w, a, false);
  const Tensor x_q = at::empty({m, w.k}, at::kChar);
  int8_t* q = x_q.mutable_data_ptr<int8_t>();
  at::parallel_for(0, m, grain(w.k), [&](int64_t begin, int64_t end) {
    round_activation(w, x, begin, end, a);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t k = 0; k < w.k; ++k) q[i * w.k + k] = static_cast<int8_t>(a.values[i * a.k_padded + k]);
    }
  });
  const Tensor codes = codes_view(w, at::kChar);
  const float* scale = static_cast<const float*>(w.scale);
  for (int64_t n = 0; n < w.n; n += kColumns) {
    const int64_t count = std::min(kColumns, w.n - n);
    const Tensor sums = at::_int_mm(x_q, codes.narrow(0, n, count).t());
    const int32_t* sum = sums.const_data_ptr<int32_t>();
    at::parallel_for(0, m, grain(count), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = 0; j < count; ++j) {
          const float v = static_cast<float>(sum[i * count + j]) * a.scale[i] * scale[n + j];
          store(y, i * w.n + n + j, v + (bias.data ? load(bias, n + j) : 0.0f));
        }
      }
    });
  }
}

Tensor linear(const Tensor& x, const Tensor& head, const OptionalTensor& bias, int64_t n) {
  TORCH_CHECK(x.dim() >= 1, "autoq: x must have at least one dimension");
  const Packed w = read(head);
  check_shape(w, n, x.size(-1));
  const DType dtype = dtype_of(x.scalar_type(), "x");
  if (w.kind == Kind::kDense) return at::linear(x, codes_view(w, dense_type(w)), bias);
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n), "autoq: bias must be [", n, "]");
  c10::SmallVector<int64_t, 5> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  Tensor y = at::empty(shape, x.options());
  const int64_t m = x.numel() / w.k;
  if (m == 0) return y;
  const Tensor rows = x.contiguous();
  const Tensor bias_row = bias ? bias->contiguous() : Tensor();
  const Typed bias_typed = bias ? typed(bias_row, "bias") : Typed{nullptr, DType::kFloat};
  switch (choose(w, m, dtype)) {
    case Path::kFloatGemm:
    case Path::kBFloat16Gemm: {
      Tensor y_MN = y.view({m, n});
      run_dequantized(w, rows.view({m, w.k}), bias, y_MN);
      break;
    }
    case Path::kInt8Gemm: run_int8(w, typed(rows, "x"), m, bias_typed, typed(y, "y")); break;
    default: run_codes(w, typed(rows, "x"), m, bias_typed, typed(y, "y"));
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
    dequantize(w, begin, end, offset_rows(out_typed, begin * k));
  });
  return out;
}

std::string scheme_name(const Packed& w) {
  switch (w.kind) {
    case Kind::kInt8: return w.dynamic() ? "int8dq" : "int8wo";
    case Kind::kFp6E3M2: return "fp6_e3m2";
    case Kind::kFp6E2M3: return "fp6_e2m3";
    default: return "int" + std::to_string(w.bits);
  }
}

std::string kernel_name(const Tensor& head, int64_t m, at::ScalarType type) {
  const Packed w = read(head);
  const std::string isa = AUTOQ_TEXT(AUTOQ_ISA);
  switch (choose(w, m, dtype_of(type, "x"))) {
    case Path::kDense: return "aten.linear";
    case Path::kFloatGemm: return isa + "." + scheme_name(w) + ".dequantize+gemm.fp32";
    case Path::kBFloat16Gemm: return isa + "." + scheme_name(w) + ".dequantize+gemm.bf16";
    case Path::kInt8Gemm: return isa + "." + scheme_name(w) + ".int_mm";
    default: return isa + "." + scheme_name(w) + (m == 1 ? ".gemv" : ".gemm");
  }
}

}  // namespace
}  // namespace autoq

AUTOQ_LIBRARY(AUTOQ_NAMESPACE, library) {
  library.def("linear(Tensor x, Tensor head, Tensor? bias, int n) -> Tensor");
  library.def("dequantize(Tensor head, int n, int k) -> Tensor");
  library.def("kernel_name(Tensor head, int m, ScalarType dtype) -> str");
  library.def("hqq(Tensor groups, int bits, float beta, float kappa, int iterations) -> (Tensor, Tensor, Tensor)");
}

AUTOQ_LIBRARY_IMPL(AUTOQ_NAMESPACE, CPU, library) {
  library.impl("linear", TORCH_FN(autoq::linear));
  library.impl("dequantize", TORCH_FN(autoq::dequantize_op));
  library.impl("kernel_name", TORCH_FN(autoq::kernel_name));
  library.impl("hqq", TORCH_FN(autoq::hqq));
}

// Makes this build the CPU implementation of autoq::linear and autoq::dequantize, until the process ends.
extern "C" __attribute__((visibility("default"))) void autoq_register_default() {
  using Library = torch::Library;
  static const auto* cpu = [] {
    auto* library = new Library(Library::IMPL, "autoq", c10::DispatchKey::CPU, __FILE__, __LINE__);
    library->impl("linear", TORCH_FN(autoq::linear));
    library->impl("dequantize", TORCH_FN(autoq::dequantize_op));
    return library;
  }();
  (void)cpu;
  autoq::register_gradient();
}
