// The arithmetic of attention over one tile of keys: scores, 2^x, and sums of values.
//
// Legend: D and E, lengths of keys and values; a row is one query of one head.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kv_rows.h"
#include "vec.h"

namespace autoq {
namespace {

constexpr int kKeys = 64;           // of a tile
constexpr int kRowsAtOnce = 3;      // rows whose sums stay in registers, with 4 keys or 4 vectors of values
constexpr int kColumnRows = 6;      // the same with 2 vectors of keys or values
constexpr int kPanel = 2 * kFloats;  // keys that are transposed together

template <RowKind T>
inline F32 load_at(const void* p, int64_t i) {
  if constexpr (T == RowKind::kFloat) return load_f32(static_cast<const float*>(p) + i);
  if constexpr (T == RowKind::kHalf) return load_half(static_cast<const uint16_t*>(p) + i);
  return load_bf16(static_cast<const uint16_t*>(p) + i);
}

// 2^x for x ≤ 0 within 2 ulp (a minimax polynomial, 1 at 0); NaN stays one, and nothing is below 2^-126.
inline F32 exp2_negative(F32 x) {
  x = max(splat(-126.0f), x);
  const I32 n = round_to_int(x);
  const F32 r = sub(x, to_float(n));
  F32 p = splat(1.326472719e-3f);
  p = fma(p, r, splat(9.671512640e-3f));
  p = fma(p, r, splat(5.550733743e-2f));
  p = fma(p, r, splat(2.402224209e-1f));
  p = fma(p, r, splat(6.931469776e-1f));
  p = fma(p, r, splat(1.0f));
  return mul(p, power_of_two(n));
}

// scores[r, j] = queries[r] · key j; the keys' rows are `stride` bytes apart.
template <RowKind T, int kR>
void score_keys(const float* queries, int64_t d, const char* keys, int64_t stride, int count, float* scores) {
  for (int j = 0; j < count; j += 4) {
    const char* key[4];
    for (int i = 0; i < 4; ++i) key[i] = keys + std::min(j + i, count - 1) * stride;
    F32 sum[kR][4];
    for (int r = 0; r < kR; ++r) {
      for (int i = 0; i < 4; ++i) sum[r][i] = zero_f32();
    }
    for (int64_t c = 0; c < d; c += kFloats) {
      F32 query[kR];
      for (int r = 0; r < kR; ++r) query[r] = load_f32(queries + r * d + c);
      for (int i = 0; i < 4; ++i) {
        const F32 part = load_at<T>(key[i], c);
        for (int r = 0; r < kR; ++r) sum[r][i] = fma(part, query[r], sum[r][i]);
      }
    }
    for (int r = 0; r < kR; ++r) {
      float* out = scores + r * kKeys + j;
      std::fill_n(out, 4, 0.0f);
      add_lane_sums(sum[r], out);
    }
  }
}

// The same for a tile of keys, transposed by panels: keys[panel, c, j] is number c of the panel's key j.
template <int kR>
void score_columns(const float* queries, int64_t d, const float* keys, int count, float* scores) {
  for (int j = 0; j < count; j += kPanel, keys += d * kPanel) {
    F32 sum[kR][2];
    for (int r = 0; r < kR; ++r) sum[r][0] = sum[r][1] = zero_f32();
    for (int64_t c = 0; c < d; ++c) {
      const F32 first = load_f32(keys + c * kPanel), second = load_f32(keys + c * kPanel + kFloats);
      for (int r = 0; r < kR; ++r) {
        const F32 query = splat(queries[r * d + c]);
        sum[r][0] = fma(first, query, sum[r][0]);
        sum[r][1] = fma(second, query, sum[r][1]);
      }
    }
    for (int r = 0; r < kR; ++r) {
      store_f32(scores + r * kKeys + j, sum[r][0]);
      store_f32(scores + r * kKeys + j + kFloats, sum[r][1]);
    }
  }
}

// sums[r, c] += Σ_j weights[r, j] · value j [c], for kV vectors of columns from c on
template <RowKind T, int kR, int kV>
void add_columns(const float* weights, const char* values, int64_t stride, int count, int64_t c, int64_t e, float* sums) {
  F32 sum[kR][kV];
  for (int r = 0; r < kR; ++r) {
    for (int v = 0; v < kV; ++v) sum[r][v] = load_f32(sums + r * e + c + v * kFloats);
  }
  for (int j = 0; j < count; ++j) {
    if constexpr (kR > kV) {  // what there are fewer of stays in registers
      F32 value[kV];
      for (int v = 0; v < kV; ++v) value[v] = load_at<T>(values + j * stride, c + v * kFloats);
      for (int r = 0; r < kR; ++r) {
        const F32 weight = splat(weights[r * kKeys + j]);
        for (int v = 0; v < kV; ++v) sum[r][v] = fma(value[v], weight, sum[r][v]);
      }
    } else {
      F32 weight[kR];
      for (int r = 0; r < kR; ++r) weight[r] = splat(weights[r * kKeys + j]);
      for (int v = 0; v < kV; ++v) {
        const F32 value = load_at<T>(values + j * stride, c + v * kFloats);
        for (int r = 0; r < kR; ++r) sum[r][v] = fma(value, weight[r], sum[r][v]);
      }
    }
  }
  for (int r = 0; r < kR; ++r) {
    for (int v = 0; v < kV; ++v) store_f32(sums + r * e + c + v * kFloats, sum[r][v]);
  }
}

template <RowKind T, int kR>
void add_values(const float* weights, const char* values, int64_t stride, int count, int64_t e, float* sums) {
  int64_t c = 0;
  constexpr int kV = kR > kRowsAtOnce ? 2 : 4;
  for (; c + kV * kFloats <= e; c += kV * kFloats) add_columns<T, kR, kV>(weights, values, stride, count, c, e, sums);
  for (; c < e; c += kFloats) add_columns<T, kR, 1>(weights, values, stride, count, c, e, sums);
}

// Calls f with kMost, 3, 2 or 1 rows as a constant, until all are done.
template <int kMost, class F>
void by_rows(int64_t rows, F&& f) {
  int64_t r = 0;
  for (; r + kMost <= rows; r += kMost) f(r, std::integral_constant<int, kMost>());
  if constexpr (kMost > 3) {
    for (; r + 3 <= rows; r += 3) f(r, std::integral_constant<int, 3>());
  }
  if (rows - r == 2) f(r, std::integral_constant<int, 2>());
  if (rows - r == 1) f(r, std::integral_constant<int, 1>());
}

}  // namespace
}  // namespace autoq
