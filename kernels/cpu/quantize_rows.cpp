// Rows of a float weight to codes and scales, each row read once and written once, straight into the bit planes.
#include "quantize_rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

namespace autoq {
namespace {

constexpr float kTiny = std::numeric_limits<float>::min();
constexpr float kInt8Range = 127.5f;

struct FloatFormat {
  int mantissa_bits, bias;
  float max;
};

float int8_row(const float* w, int64_t count, int8_t* codes) {
  const float scale = std::max(largest_magnitude(w, count) / kInt8Range, kTiny);
  for (int64_t i = 0; i < count; ++i) {
    const float whole = (w[i] / scale + kNoFraction) - kNoFraction;
    codes[i] = static_cast<int8_t>(static_cast<int>(std::min(127.0f, std::max(-128.0f, whole))));
  }
  return scale;
}

float fp6_row(const float* w, int64_t count, const FloatFormat& form, uint8_t* codes) {
  const float top = form.max, scale = std::max(largest_magnitude(w, count) / top, kTiny);
  const int lowest = 1 - form.bias, mantissa_bits = form.mantissa_bits;
  for (int64_t i = 0; i < count; ++i) {
    const float v = w[i] / scale, magnitude = std::min(top, std::fabs(v));
    const int exponent = std::max((std::bit_cast<int32_t>(magnitude) >> 23) - 127, lowest);
    const float inverse_spacing = std::bit_cast<float>((127 + mantissa_bits - exponent) << 23);  // a power of two
    const int steps = static_cast<int>((magnitude * inverse_spacing + kNoFraction) - kNoFraction);
    const int sign = (std::bit_cast<int32_t>(v) >> 26) & 32;
    codes[i] = static_cast<uint8_t>((steps + ((exponent - lowest) << mantissa_bits)) | sign);
  }
  return scale;
}

// w = (w - from)·inverse
[[gnu::noinline]] void to_offsets(float* w, int64_t count, float from, float inverse) {
  for (int64_t i = 0; i < count; ++i) w[i] = (w[i] - from) * inverse;
}

[[gnu::noinline]] void round_codes(const float* offset, int64_t count, float top, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(static_cast<int>(rounded(offset[i], top)));
}

void affine_row(const Packed& out, int64_t n, float* w, uint8_t* codes) {
  const auto top = static_cast<float>((1 << out.bits) - 1);
  uint16_t *scale = scales_of_row(out, n), *minimum = minima_of_row(out, n);
  for (int64_t g = 0; g < out.groups; ++g) {
    const int64_t first = g * out.group_size, size = std::min(out.group_size, out.k - first);
    const Grid grid = enclosing_grid(extremes(w + first, size), top);
    scale[g] = grid.scale;
    minimum[g] = grid.minimum;
    to_offsets(w + first, size, grid.from, grid.inverse);
  }
  round_codes(w, out.k, top, codes);
}

}  // namespace

void round_rows(const Source& w, const Packed& out, int64_t begin, int64_t end) {
  std::vector<float> row(out.k_padded);
  std::vector<uint8_t> codes(out.k_padded);  // the pads stay 0
  float* scale = static_cast<float*>(const_cast<void*>(out.scale));
  for (int64_t n = begin; n < end; ++n) {
    if (out.kind == Kind::kAffine) {
      read_scaled_row(w, out, n, row.data());
      affine_row(out, n, row.data(), codes.data());
      write_planes(out, n, codes.data());
      continue;
    }
    read_row(w, n, 0, out.k, row.data());
    if (out.kind == Kind::kInt8) {
      scale[n] = int8_row(row.data(), out.k, reinterpret_cast<int8_t*>(const_cast<uint8_t*>(out.codes)) + n * out.k);
    } else {
      const FloatFormat form = out.kind == Kind::kFp6E3M2 ? FloatFormat{2, 3, 28.0f} : FloatFormat{3, 1, 7.5f};
      scale[n] = fp6_row(row.data(), out.k, form, codes.data());
      write_planes(out, n, codes.data());
    }
  }
}

}  // namespace autoq
