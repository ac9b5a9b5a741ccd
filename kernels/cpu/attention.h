#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace autoq {

// See ops.py. Heads are multiples of 16 numbers long.
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& mask,
                     double scale, bool causal);

}  // namespace autoq
