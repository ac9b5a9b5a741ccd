#pragma once

#include <ATen/core/TensorBody.h>

#include <tuple>

namespace autoq {

// Codes uint8 [..., g], scales and minima float16 [...] of float32 groups [..., g]; see kernels/ops.py.
std::tuple<at::Tensor, at::Tensor, at::Tensor> hqq(const at::Tensor& groups, int64_t bits, double beta, double kappa,
                                                   int64_t iterations);

}  // namespace autoq
