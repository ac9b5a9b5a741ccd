// The kernel for a decoder of rows and a number of rows of x.
#pragma once

#include "gemm.h"

namespace autoq {

// The same as multiply for an affine weight, which is compiled by itself: half of the compiler's work.
void multiply_affine(const Packed& w, const Activation& a, Typed bias, Typed y, int64_t begin, int64_t end);

namespace {

constexpr int64_t kGemvRows = 4;      // of x, in one pass over the weight
constexpr int64_t kCachedRows = 16;  // of the weight, which the second pass finds in the L2 cache

// Rows [m, m + count) of x alone
inline Activation rows_of(const Activation& a, int64_t m, int64_t count) {
  Activation part = a;
  part.m = count;
  part.values = const_cast<int16_t*>(a.shorts(m));
  part.scale = a.scale + m * (a.per_row ? 1 : a.blocks);
  if (a.block_sum) part.block_sum = a.block_sum + m * a.sum_stride;
  return part;
}

inline Typed y_rows(Typed y, int64_t m, int64_t n) {
  return {static_cast<char*>(y.data) + m * n * (y.dtype == DType::kFloat ? 4 : 2), y.dtype};
}

template <class Rows, int kPlanes>
void gemv_rows(const Packed& w, const Activation& a, Typed bias, Typed y, int64_t begin, int64_t end) {
  switch (a.m) {
    case 1: return gemv<Rows, kPlanes, 1>(w, a, bias, y, begin, end);
    case 2: return gemv<Rows, kPlanes, 2>(w, a, bias, y, begin, end);
    case 3: return gemv<Rows, kPlanes, 3>(w, a, bias, y, begin, end);
    default: return gemv<Rows, kPlanes, 4>(w, a, bias, y, begin, end);
  }
}

template <class Rows, int kPlanes>
void multiply_planes(const Packed& w, const Activation& a, Typed bias, Typed y, int64_t begin, int64_t end) {
  if (a.m <= kGemvRows) return gemv_rows<Rows, kPlanes>(w, a, bias, y, begin, end);
  if (a.m > kFewRows) {
    if constexpr (std::is_same_v<Rows, Int8Rows> && kPlanes == 1) {
      if (a.per_row) return Gemm<Int8Rows, Shorts, 1, true>(w, a, bias, y).run(begin, end);
    }
    return Gemm<Rows, Shorts, kPlanes, false>(w, a, bias, y).run(begin, end);
  }
  for (int64_t n = begin; n < end; n += kCachedRows) {
    for (int64_t m = 0; m < a.m; m += kGemvRows) {
      const Activation part = rows_of(a, m, std::min(kGemvRows, a.m - m));
      gemv_rows<Rows, kPlanes>(w, part, bias, y_rows(y, m, w.n), n, std::min(n + kCachedRows, end));
    }
  }
}

template <class Rows>
void multiply_rows(const Packed& w, const Activation& a, Typed bias, Typed y, int64_t begin, int64_t end) {
  a.planes == 2 ? multiply_planes<Rows, 2>(w, a, bias, y, begin, end)
                : multiply_planes<Rows, 1>(w, a, bias, y, begin, end);
}

}  // namespace
}  // namespace autoq
