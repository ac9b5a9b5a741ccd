// The rows of a KV cache: the numbers of one token and head, as floats or as codes followed by what they stand for.
// kernels/kv_rows.py is the definition.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "packed.h"

namespace autoq {

enum class RowKind { kFloat, kHalf, kBFloat16, kInt8, kInt4 };

inline bool quantized(RowKind kind) { return kind == RowKind::kInt8 || kind == RowKind::kInt4; }

constexpr int64_t kInt8Extra = 4;  // bytes behind the codes: a float scale
constexpr int64_t kInt4Extra = 4;  // half scale, half minimum

// The kind of rows of `bytes` bytes that hold d codes; refuses other lengths.
RowKind quantized_kind(int64_t bytes, int64_t d);

// The row as d floats; keys of kInt4 stay rotated.
void load_row(RowKind kind, const char* row, int64_t d, float* out);

// The Hadamard transform of each block of as many numbers as the largest power of two that divides d; its own inverse.
void rotate(float* x, int64_t d);

// See ops.py: writes k and v [B, G, Q, ·] to their places in the cache, from `start` on.
void store_kv(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& k, const at::Tensor& v, const at::Tensor& start);

}  // namespace autoq
