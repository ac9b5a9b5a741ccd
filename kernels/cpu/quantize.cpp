// The operators quantize and sinkhorn on the CPU: checks and threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "library.h"
#include "packed.h"
#include "quantize_rows.h"
#include "sinkhorn.h"

namespace autoq {
namespace {

using at::Tensor;

constexpr int64_t kThreadWork = 1 << 15;  // weights below which a second thread costs more than it gives

Source source(const Tensor& w) {
  TORCH_CHECK(w.device().is_cpu() && w.layout() == at::kStrided && w.dim() == 2 && w.numel() > 0,
              "autoq: weight must be a matrix on the CPU; got ", w.toString(), " ", w.sizes());
  const auto dtype = [&] {
    switch (w.scalar_type()) {
      case at::kFloat: return DType::kFloat;
      case at::kHalf: return DType::kHalf;
      case at::kBFloat16: return DType::kBFloat16;
      default: TORCH_CHECK(false, "autoq: weight must be float32, bfloat16 or float16; got ", w.scalar_type());
    }
  }();
  return {w.const_data_ptr(), dtype, w.stride(0), w.stride(1)};
}

// The sections of a buffer that is to be filled; `parse` has seen that all of them lie within it.
Packed sections(const Tensor& buffer) {
  TORCH_CHECK(buffer.device().is_cpu() && buffer.scalar_type() == at::kByte && buffer.dim() == 1 && buffer.is_contiguous(),
              "autoq: buffer must be a contiguous 1-D uint8 tensor on the CPU; got ", buffer.toString(), " ", buffer.sizes());
  Packed out;
  const char* broken = parse(buffer.mutable_data_ptr<uint8_t>(), buffer.numel(), &out);
  TORCH_CHECK(broken == nullptr, "autoq: buffer is no packed weight: ", broken);
  TORCH_CHECK(out.kind != Kind::kDense, "autoq: a dense weight is not quantized");
  TORCH_CHECK(out.kind != Kind::kAffine || (out.minimum && out.row_scale), "autoq: buffer needs a minimum and a row scale");
  return out;
}

void quantize(const Tensor& weight, Tensor buffer, std::string_view method, const std::optional<Tensor>& column_scale,
              double beta, double kappa, int64_t iterations) {
  const Source w = source(weight);
  const Packed out = sections(buffer);
  TORCH_CHECK(weight.size(0) == out.n && weight.size(1) == out.k, "autoq: weight must be [", out.n, ", ", out.k,
              "], as the buffer says; got ", weight.sizes());
  TORCH_CHECK(column_scale.has_value() == (out.column_scale != nullptr),
              "autoq: column_scale must be given exactly where the buffer has one");
  const bool hqq = method == "hqq";
  TORCH_CHECK(hqq || method == "rtn", "autoq: method must be rtn or hqq; got ", method);
  TORCH_CHECK(!hqq || (out.kind == Kind::kAffine && iterations >= 1), "autoq: hqq needs an affine buffer and an iteration");
  const HqqForm form{iterations, static_cast<float>(beta), static_cast<float>(kappa)};
  if (column_scale) {
    TORCH_CHECK(column_scale->device().is_cpu() && column_scale->scalar_type() == at::kFloat &&
                column_scale->dim() == 1 && column_scale->size(0) == out.k, "autoq: column_scale must be float32 [", out.k, "]");
    const Tensor scale = column_scale->contiguous();
    std::copy_n(scale.const_data_ptr<float>(), out.k, const_cast<float*>(out.column_scale));
  }
  at::parallel_for(0, out.n, std::max<int64_t>(1, kThreadWork / out.k), [&](int64_t begin, int64_t end) {
    hqq ? hqq_rows(w, out, form, begin, end) : round_rows(w, out, begin, end);
  });
}

Tensor sinkhorn(const Tensor& weight, int64_t group_size, int64_t iterations) {
  const Source w = source(weight);
  TORCH_CHECK(group_size >= 1, "autoq: group_size must be at least 1; got ", group_size);
  const int64_t n = weight.size(0), k = weight.size(1), tiles = (k + group_size - 1) / group_size;
  const Tensor t = at::empty({k}, at::kFloat);
  float* factors = t.mutable_data_ptr<float>();
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * group_size; first < std::min(k, end * group_size); first += group_size) {
      sinkhorn_tile(w, n, first, std::min(group_size, k - first), iterations, factors + first);
    }
  });
  return t;
}

}  // namespace
}  // namespace autoq

AUTOQ_LIBRARY_FRAGMENT(AUTOQ_NAMESPACE, library) {
  library.def(
      "quantize(Tensor weight, Tensor(a!) buffer, str method, Tensor? column_scale, float beta, float kappa, "
      "int iterations) -> ()");
  library.def("sinkhorn(Tensor weight, int group_size, int iterations) -> Tensor");
}

AUTOQ_LIBRARY_IMPL(AUTOQ_NAMESPACE, CPU, library) {
  library.impl("quantize", TORCH_FN(autoq::quantize));
  library.impl("sinkhorn", TORCH_FN(autoq::sinkhorn));
}
