// What the quantization of rows shares: rounding, the grid of a group, the factor of a row, and the bit planes.
//
// What must round as the reference does is split into functions that are not inlined: the compiler may fuse a
// product and a sum that it sees together, and then they round once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "packed.h"
#include "quantize_source.h"

namespace autoq {

struct HqqForm {
  int64_t iterations;
  float beta, kappa;  // strength of the penalty, and its growth per iteration
};

namespace {

constexpr float kNoFraction = 12582912.0f;  // 1.5·2^23: adding it rounds |v| < 2^22 half to even
constexpr int kRowExponent = 12;            // rows are scaled to |w| < 2^12, see autoq.numerics
constexpr int kMaxExponent = 126;

// The nearest code; 0 for NaN.
inline float rounded(float v, float top) {
  const float whole = (v + kNoFraction) - kNoFraction;
  return std::min(top, std::max(0.0f, whole));
}

// The next half below (-1) or above (+1).
inline uint16_t neighbour(uint16_t half, int direction) {
  if ((half & 0x7fff) == 0) return direction > 0 ? 0x0001 : 0x8001;
  const bool grows = ((half & 0x8000) == 0) == (direction > 0);
  return static_cast<uint16_t>(half + (grows ? 1 : -1));
}

struct Grid {
  uint16_t minimum, scale;  // half
  float from, inverse;      // the minimum, and 1 / scale or 0
};

// From the smallest to the largest number of a group, both rounded outwards.
inline Grid enclosing_grid(Extremes range, float top) {
  Grid grid;
  grid.minimum = half_bits(range.low);
  if (half_value(grid.minimum) > range.low) grid.minimum = neighbour(grid.minimum, -1);
  grid.from = half_value(grid.minimum);
  const float span = (range.high - grid.from) / top;
  grid.scale = half_bits(span);
  if (half_value(grid.scale) < span) grid.scale = neighbour(grid.scale, +1);
  const float step = half_value(grid.scale);
  grid.inverse = step > 0.0f ? 1.0f / step : 0.0f;
  return grid;
}

// The power of two that brings the largest magnitude into [2^11, 2^12); 1 for a zero row.
inline float row_factor(float largest) {
  if (!(largest > 0.0f)) return 1.0f;
  int exponent;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0f, std::clamp(exponent - kRowExponent, -kMaxExponent, kMaxExponent));
}

// Reads row n, divides it by the column scale and by the row factor, which it stores.
inline void read_scaled_row(const Source& source, const Packed& out, int64_t n, float* w) {
  read_row(source, n, 0, out.k, w);
  if (const float* column = out.column_scale) {
    for (int64_t k = 0; k < out.k; ++k) w[k] /= column[k];
  }
  const float factor = row_factor(largest_magnitude(w, out.k)), inverse = 1.0f / factor;  // powers of two: exact
  const_cast<float*>(out.row_scale)[n] = factor;
  for (int64_t k = 0; k < out.k; ++k) w[k] *= inverse;
}

inline uint16_t* scales_of_row(const Packed& out, int64_t n) {
  return static_cast<uint16_t*>(const_cast<void*>(out.scale)) + n * out.groups;
}

inline uint16_t* minima_of_row(const Packed& out, int64_t n) {
  return const_cast<uint16_t*>(out.minimum) + n * out.groups;
}

inline void pack_nibbles(const uint8_t* codes, int64_t count, uint8_t* out) {
  for (int64_t k = 0; k < count; k += kBlock, out += 16) {
    for (int64_t j = 0; j < 16; ++j) out[j] = static_cast<uint8_t>((codes[k + j] & 15) | (codes[k + j + 16] << 4));
  }
}

inline void pack_pairs(const uint8_t* codes, int64_t count, int shift, uint8_t* out) {
  for (int64_t k = 0; k < count; k += kBlock, out += 8) {
    uint64_t part[4], packed = 0;
    std::memcpy(part, codes + k, sizeof part);
    for (int i = 0; i < 4; ++i) packed |= ((part[i] >> shift) & 0x0303030303030303) << (2 * i);
    std::memcpy(out, &packed, sizeof packed);
  }
}

inline void pack_bits(const uint8_t* codes, int64_t count, int shift, uint8_t* out) {
  constexpr uint64_t gather = 0x0102040810204080;  // brings bit 0 of byte i to bit 56 + i
  for (int64_t k = 0; k < count; k += 8) {
    uint64_t part;
    std::memcpy(&part, codes + k, sizeof part);
    out[k / 8] = static_cast<uint8_t>((((part >> shift) & 0x0101010101010101) * gather) >> 56);
  }
}

// Writes the codes [K_pad] of row n into the bit planes.
inline void write_planes(const Packed& w, int64_t n, const uint8_t* codes) {
  auto* plane = const_cast<uint8_t*>(w.codes);
  int shift = 0;
  for (const int bits : {8, 4, 2, 1}) {
    if (!(w.bits & bits)) continue;
    const int64_t row_bytes = w.k_padded * bits / 8;
    uint8_t* out = plane + n * row_bytes;
    switch (bits) {
      case 8: std::copy_n(codes, w.k_padded, out); break;
      case 4: pack_nibbles(codes, w.k_padded, out); break;
      case 2: pack_pairs(codes, w.k_padded, shift, out); break;
      default: pack_bits(codes, w.k_padded, shift, out);
    }
    plane += w.n * row_bytes;
    shift += bits;
  }
}

}  // namespace
}  // namespace autoq
