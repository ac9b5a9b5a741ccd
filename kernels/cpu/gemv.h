// A few rows of x: the weight is read once, in order, and each block of codes multiplied as it is decoded.
#pragma once

#include <algorithm>

#include "decode.h"
#include "scalar.h"

namespace autoq {
namespace {

constexpr int kMostRows = 4;  // of the weight, worked on together

// out[r, b] = scale[n + r, group of b] · x scale[b] for kRows rows and every block b of x
template <int kRows>
inline void block_scales(const Packed& w, const Activation& a, const float* x_scale, int64_t n, int64_t stride, float* out) {
  const uint16_t* scale = static_cast<const uint16_t*>(w.scale) + n * w.groups;
  if (a.block == w.group_size) {
    for (int64_t b = 0; b < a.blocks; b += kFloats) {
      const F32 x = load_f32(x_scale + b);
      for (int r = 0; r < kRows; ++r) store_f32(out + r * stride + b, mul(load_half(scale + r * w.groups + b), x));
    }
    return;
  }
  const int64_t per_group = w.group_size / a.block;
  for (int64_t b = 0; b < a.blocks; ++b) {
    for (int r = 0; r < kRows; ++r) out[r * stride + b] = half_to_float(scale[r * w.groups + b / per_group]) * x_scale[b];
  }
}

// sum[r] += minimum[n + r, group of b] · (sum of x over block b), spread over the lanes
template <int kRows>
inline void add_minimum(const Packed& w, const Activation& a, const float* block_sum, int64_t n, F32 (&sum)[kMostRows]) {
  const uint16_t* minimum = w.minimum + n * w.groups;
  int64_t b = 0;
  if (a.block != w.group_size) {
    const int64_t per_group = w.group_size / a.block;
    for (; b < a.blocks; ++b) {
      const F32 x = splat(block_sum[b] / kFloats);
      for (int r = 0; r < kRows; ++r) sum[r] = fma(splat(half_to_float(minimum[r * w.groups + b / per_group])), x, sum[r]);
    }
    return;
  }
  for (; b + kFloats <= a.blocks; b += kFloats) {
    const F32 x = load_f32(block_sum + b);
    for (int r = 0; r < kRows; ++r) sum[r] = fma(load_half(minimum + r * w.groups + b), x, sum[r]);
  }
  if (b == a.blocks) return;
  // What lies behind a row may be NaN when read as half.
  const F32 lanes = first_lanes(a.blocks - b), x = load_f32(block_sum + b);
  for (int r = 0; r < kRows; ++r) sum[r] = fma(keep(load_half(minimum + r * w.groups + b), lanes), x, sum[r]);
}

// What the sums over k of row n still have to be multiplied by.
template <class Rows>
float row_factor(const Packed& w, int64_t n) {
  if (w.affine()) return w.row_scale ? w.row_scale[n] : 1.0f;
  return static_cast<const float*>(w.scale)[n] * Rows::kUnit;
}

// Decodes blocks [begin, end) of kRows rows and adds their products with kM rows of x to whole numbers.
template <class Rows, int kPlanes, int kRows, int kM>
inline __attribute__((always_inline)) void add_products(const Rows& rows, const Activation& a, uint64_t begin,
                                                        uint64_t end, I32 (&acc)[kM][kRows][kPlanes]) {
  const int16_t* x = a.shorts(0);
  for (uint64_t i = begin; i < end; ++i) {
    if (i % Rows::kLineBlocks == 0) {
      for (int r = 0; r < kRows; ++r) rows.prefetch(r + kRows, i);
    }
    I16 x_part[kPlanes][kParts];
    for (int p = 0; p < kPlanes && kM == 1; ++p) {
      for (int j = 0; j < kParts; ++j) x_part[p][j] = load_i16(x + p * a.plane_stride + i * kBlock + j * kShorts);
    }
    for (int r = 0; r < kRows; ++r) {
      const Block q = rows(r, i);
      for (int m = 0; m < kM; ++m) {
        for (int p = 0; p < kPlanes; ++p) {
          for (int j = 0; j < kParts; ++j) {
            const I16 v = kM == 1 ? x_part[p][j] : load_i16(x + p * a.plane_stride + m * a.stride + i * kBlock + j * kShorts);
            acc[m][r][p] = madd(acc[m][r][p], q.part[j], v);
          }
        }
      }
    }
  }
}

// A block's whole numbers as float, times its scales, added to the sums.
template <class Rows, int kPlanes, int kRows, int kM>
inline __attribute__((always_inline)) void add_block(const Rows& rows, const Activation& a, uint64_t begin,
                                                     uint64_t end, const float* scale, int64_t row_stride,
                                                     int64_t m_stride, F32 (&sum)[kM][kMostRows]) {
  I32 acc[kM][kRows][kPlanes];
  for (int i = 0; i < kM * kRows * kPlanes; ++i) (&acc[0][0][0])[i] = zero_i32();
  add_products<Rows, kPlanes, kRows, kM>(rows, a, begin, end, acc);
  for (int m = 0; m < kM; ++m) {
    for (int r = 0; r < kRows; ++r) {
      F32 value = to_float(acc[m][r][0]);
      if constexpr (kPlanes == 2) value = fma(to_float(acc[m][r][1]), splat(1.0f / 32768), value);
      sum[m][r] = fma(value, splat(scale[m * m_stride + r * row_stride]), sum[m][r]);
    }
  }
}

// y[m, r] for rows [n, n + kRows) of a weight, where x has a scale per block.
template <class Rows, int kPlanes, int kRows, int kM>
void rows_scaled(const Packed& w, const Activation& a, int64_t n, float* scales, float (&y)[kM][kMostRows]) {
  const Rows rows(w, n);
  const int64_t row_stride = Rows::kGrouped ? round_up(a.blocks, kFloats) : 0;
  const int64_t m_stride = Rows::kGrouped ? kMostRows * row_stride : a.blocks;
  if constexpr (Rows::kGrouped) {
    for (int m = 0; m < kM; ++m) block_scales<kRows>(w, a, a.scale + m * a.blocks, n, row_stride, scales + m * m_stride);
  } else {
    scales = a.scale;
  }
  F32 sum[kM][kMostRows];
  for (int i = 0; i < kM * kMostRows; ++i) (&sum[0][0])[i] = zero_f32();
  const uint64_t step = a.block / kBlock, packed_blocks = a.k_padded / kBlock;
  uint64_t i = 0;
  const auto add = [&](uint64_t count) __attribute__((always_inline)) {
    add_block<Rows, kPlanes, kRows, kM>(rows, a, i, i + count, scales++, row_stride, m_stride, sum);
    i += count;
  };
  if (step == 2) {  // group size 64, the common one: the compiler unrolls it
    while (i + 2 <= packed_blocks) add(2);
  } else {
    while (i + step <= packed_blocks) add(step);
  }
  if (i < packed_blocks) add(packed_blocks - i);
  for (int m = 0; m < kM; ++m) {
    if (w.minimum) add_minimum<kRows>(w, a, a.block_sum + m * a.sum_stride, n, sum[m]);
    add_lane_sums(sum[m], y[m]);
    for (int r = 0; r < kRows; ++r) y[m][r] *= row_factor<Rows>(w, n + r);
  }
}

// The same for an int8 weight and one scale per row of x: the sum of the products is exact.
template <int kRows, int kM>
void rows_exact(const Packed& w, const Activation& a, int64_t n, float (&y)[kM][kMostRows]) {
  const Int8Rows rows(w, n);
  I32 acc[kM][kRows][1];
  for (int i = 0; i < kM * kRows; ++i) (&acc[0][0][0])[i] = zero_i32();
  add_products<Int8Rows, 1, kRows, kM>(rows, a, 0, a.k_padded / kBlock, acc);
  for (int m = 0; m < kM; ++m) {
    for (int r = 0; r < kRows; ++r) {
      y[m][r] = static_cast<float>(lane_sum(acc[m][r][0])) * a.scale[m] * row_factor<Int8Rows>(w, n + r);
    }
  }
}

// Rows of the weight whose sums, with kM rows of x, still fit into the registers.
template <int kPlanes, int kM>
constexpr int rows_together() {
  const int sums = kShorts == 32 ? 16 : 8;
  return std::clamp(sums / (kM * kPlanes), 1, kMostRows);
}

// y[:, begin:end] for all kM rows of x
template <class Rows, int kPlanes, int kM>
void gemv(const Packed& w, const Activation& a, Typed bias, Typed y, int64_t begin, int64_t end) {
  constexpr int kRows = rows_together<kPlanes, kM>();
  thread_local Scratch<float> scratch;
  float* scales = Rows::kGrouped ? scratch.reserve(kM * kMostRows * round_up(a.blocks, kFloats)) : nullptr;
  for (int64_t n = begin; n < end;) {
    float sums[kM][kMostRows] = {};
    const int count = n + kRows <= end ? kRows : 1;
    if (a.per_row) {
      count == kRows ? rows_exact<kRows, kM>(w, a, n, sums) : rows_exact<1, kM>(w, a, n, sums);
    } else {
      count == kRows ? rows_scaled<Rows, kPlanes, kRows, kM>(w, a, n, scales, sums)
                     : rows_scaled<Rows, kPlanes, 1, kM>(w, a, n, scales, sums);
    }
    for (int m = 0; m < kM; ++m) {
      for (int r = 0; r < count; ++r) store(y, m * w.n + n + r, sums[m][r] + (bias.data ? load(bias, n + r) : 0.0f));
    }
    n += count;
  }
}

}  // namespace
}  // namespace autoq
