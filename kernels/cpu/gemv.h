// One row of x: each code is read once, decoded in registers and multiplied at once. Bound by memory.
#pragma once

#include "decode.h"
#include "scalar.h"

namespace autoq {
namespace {

// out[r, b] = scale[n + r, group of b] · x scale[b] for kRows rows and every block b of x
template <int kRows>
inline void block_scales(const Packed& w, const Activation& a, int64_t n, int64_t stride, float* out) {
  const uint16_t* scale = static_cast<const uint16_t*>(w.scale) + n * w.groups;
  if (a.block == w.group_size) {
    for (int64_t b = 0; b < a.blocks; b += 8) {
      const F32 x_scale = load_f32(a.scale + b);
      for (int r = 0; r < kRows; ++r) store_f32(out + r * stride + b, mul(load_half(scale + r * w.groups + b), x_scale));
    }
    return;
  }
  const int64_t per_group = w.group_size / a.block;
  for (int64_t b = 0; b < a.blocks; ++b) {
    for (int r = 0; r < kRows; ++r) out[r * stride + b] = half_to_float(scale[r * w.groups + b / per_group]) * a.scale[b];
  }
}

// sum[r] += minimum[n + r, g] · (sum of x over group g), spread over the lanes
template <int kRows>
inline void add_minimum(const Packed& w, const float* group_sum, int64_t n, F32 (&sum)[4]) {
  const uint16_t* minimum = w.minimum + n * w.groups;
  int64_t g = 0;
  for (; g + 8 <= w.groups; g += 8) {
    const F32 x = load_f32(group_sum + g);
    for (int r = 0; r < kRows; ++r) sum[r] = fma(load_half(minimum + r * w.groups + g), x, sum[r]);
  }
  if (g == w.groups) return;
  // What lies behind a row may be NaN when read as half.
  const F32 lanes = first_lanes(w.groups - g), x = load_f32(group_sum + g);
  for (int r = 0; r < kRows; ++r) sum[r] = fma(keep(load_half(minimum + r * w.groups + g), lanes), x, sum[r]);
}

// What the sums over k of row n still have to be multiplied by.
template <class Rows>
float row_factor(const Packed& w, int64_t n) {
  if (w.affine()) return w.row_scale ? w.row_scale[n] : 1.0f;
  return static_cast<const float*>(w.scale)[n] * Rows::kUnit;
}

// Products of kRows rows with the packed blocks [begin, end) of x, added up in whole numbers, then scaled.
template <class Rows, int kPlanes, int kRows>
inline __attribute__((always_inline)) void add_block(const Rows& rows, const Activation& a, uint64_t begin,
                                                     uint64_t end, const float* scale, int64_t scale_stride,
                                                     F32 (&sum)[4]) {
  I32 acc[kRows][kPlanes];
  for (int i = 0; i < kRows * kPlanes; ++i) (&acc[0][0])[i] = zero_i32();
  const int16_t* x = a.values + begin * kBlock;
  for (uint64_t i = begin; i < end; ++i, x += kBlock) {
    I16 low[kPlanes], high[kPlanes];
    for (int p = 0; p < kPlanes; ++p) {
      low[p] = load_i16(x + p * a.k_padded);
      high[p] = load_i16(x + p * a.k_padded + 16);
    }
    for (int r = 0; r < kRows; ++r) {
      const Block q = rows(r, i);
      for (int p = 0; p < kPlanes; ++p) acc[r][p] = madd(madd(acc[r][p], q.low, low[p]), q.high, high[p]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    F32 value = to_float(acc[r][0]);
    if constexpr (kPlanes == 2) value = fma(to_float(acc[r][1]), splat(1.0f / 32768), value);
    sum[r] = fma(value, splat(scale[r * scale_stride]), sum[r]);
  }
}

// Rows [n, n + kRows) of a weight whose x has a scale per block.
template <class Rows, int kPlanes, int kRows>
void gemv_rows(const Packed& w, const Activation& a, int64_t n, float* scales, float* y) {
  const Rows rows(w, n);
  const int64_t stride = Rows::kGrouped ? round_up(a.blocks, 8) : 0;
  if constexpr (Rows::kGrouped) {
    block_scales<kRows>(w, a, n, stride, scales);
  } else {
    scales = a.scale;
  }
  F32 sum[4] = {zero_f32(), zero_f32(), zero_f32(), zero_f32()};
  const uint64_t step = a.block / kBlock, packed_blocks = a.k_padded / kBlock;
  uint64_t i = 0;
  if (step == 2) {  // group size 64, the common one: the compiler unrolls it
    for (; i + 2 <= packed_blocks; i += 2) add_block<Rows, kPlanes, kRows>(rows, a, i, i + 2, scales++, stride, sum);
  } else {
    for (; i + step <= packed_blocks; i += step) {
      add_block<Rows, kPlanes, kRows>(rows, a, i, i + step, scales++, stride, sum);
    }
  }
  if (i < packed_blocks) add_block<Rows, kPlanes, kRows>(rows, a, i, packed_blocks, scales, stride, sum);
  if (w.minimum) add_minimum<kRows>(w, a.group_sum, n, sum);
  add_lane_sums(sum, y);
  for (int r = 0; r < kRows; ++r) y[r] *= row_factor<Rows>(w, n + r);
}

// Rows of an int8 weight whose x has one scale: the sum of the products is exact.
template <int kRows>
void gemv_rows_exact(const Packed& w, const Activation& a, int64_t n, float* y) {
  const Int8Rows rows(w, n);
  I32 acc[4] = {zero_i32(), zero_i32(), zero_i32(), zero_i32()};
  const uint64_t packed_blocks = a.k_padded / kBlock;
  for (uint64_t i = 0; i < packed_blocks; ++i) {
    const I16 low = load_i16(a.values + i * kBlock), high = load_i16(a.values + i * kBlock + 16);
    for (int r = 0; r < kRows; ++r) {
      const Block q = rows(r, i);
      acc[r] = madd(madd(acc[r], q.low, low), q.high, high);
    }
  }
  int32_t sums[4] = {0, 0, 0, 0};
  add_lane_sums(acc, sums);
  for (int r = 0; r < kRows; ++r) y[r] = static_cast<float>(sums[r]) * a.scale[0] * row_factor<Int8Rows>(w, n + r);
}

template <class Rows, int kPlanes>
void gemv(const Packed& w, const Activation& a, Typed bias, Typed y, int64_t begin, int64_t end) {
  constexpr int kRows = 4;
  thread_local Scratch<float> scratch;
  float* scales = scratch.reserve(kRows * round_up(a.blocks, 8));
  for (int64_t n = begin; n < end;) {
    float sums[kRows] = {0.0f, 0.0f, 0.0f, 0.0f};
    const int count = n + kRows <= end ? kRows : 1;
    if (w.dynamic()) {
      count == kRows ? gemv_rows_exact<kRows>(w, a, n, sums) : gemv_rows_exact<1>(w, a, n, sums);
    } else {
      count == kRows ? gemv_rows<Rows, kPlanes, kRows>(w, a, n, scales, sums)
                     : gemv_rows<Rows, kPlanes, 1>(w, a, n, scales, sums);
    }
    for (int r = 0; r < count; ++r) store(y, n + r, sums[r] + (bias.data ? load(bias, n + r) : 0.0f));
    n += count;
  }
}

}  // namespace
}  // namespace autoq
