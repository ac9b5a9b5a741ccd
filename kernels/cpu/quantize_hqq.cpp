// Half-quadratic quantization. Sixteen rows go through the iterations side by side, one a lane, so that sums are
// vertical and what is done once per group is done for sixteen.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <vector>

#include "quantize_rows.h"

namespace autoq {
namespace {

constexpr int kLanes = 16;
using Lanes = std::array<float, kLanes>;

[[gnu::noinline]] Lanes product(const Lanes& a, const Lanes& b) {
  Lanes c;
  for (int j = 0; j < kLanes; ++j) c[j] = a[j] * b[j];
  return c;
}

// One group of sixteen rows.
struct Group {
  int64_t size;
  float top;
  float* offset;  // [size, kLanes]: the weights, then (w - from)·inverse
  Lanes from, step, inverse;
  std::array<uint16_t, kLanes> scale;
};

// Highest power first; a fold and no loop, because a loop within a vectorized loop would stay scalar.
template <class... Rest>
inline float polynomial(float x, float highest, Rest... rest) {
  float value = highest;
  ((value = value * x + rest), ...);
  return value;
}

// x^-0.3 as the reference approximates it, to a relative error of 2e-6 for 2^-7 < x < 16, without its square roots:
// the square of a polynomial in log2(x). Where x < 2^-7 it is constant, and exceeds x times any penalty below 500.
inline float power(float x) {
  constexpr int32_t kRootHalf = 0x3f3504f3, kExponent = ~0x7fffff;
  constexpr auto kSmallest = std::bit_cast<int32_t>(0x1p-7f), kLargest = std::bit_cast<int32_t>(16.0f);
  const int32_t bits = std::clamp(std::bit_cast<int32_t>(x), kSmallest, kLargest);
  const int32_t exponent = (bits - kRootHalf) & kExponent;  // x = 2^exponent·(1 + t) with 1 + t around 1
  const float t = std::bit_cast<float>(bits - exponent) - 1.0f;
  const float log2_over_t =
      polynomial(t, -0.206591221f, 0.322154658f, -0.367490055f, 0.479348033f, -0.721131855f, 1.44271348f);
  const float log2 = log2_over_t * t + static_cast<float>(exponent) * 0x1p-23f;
  const float root = polynomial(log2, -7.88203204e-08f, 3.68676194e-06f, -0.00016322331f, 0.00553320267f,
                                -0.103822881f, 1.00002461f);
  return root * root;
}

struct Sums {
  Lanes error, move;
};

void add(Sums& to, const Sums& from) {
  for (int j = 0; j < kLanes; ++j) {
    to.error[j] += from.error[j];
    to.move[j] += from.move[j];
  }
}

// One pass over the groups at the offsets z: sums of |r|, and of the moves. Iterates are often equally good up to
// rounding, so the parts are those in which torch sums with vectors of eight, four at a time.
Sums pass(const Group& group, const Lanes& z, float factor) {
  constexpr int64_t kVector = 8, kParts = 4 * kVector;
  std::array<Sums, kParts> parts{};
  for (int64_t i = 0; i < group.size; ++i) {
    const float* offset = group.offset + i * kLanes;
    Sums& sums = parts[i % kParts];
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      const float v = offset[j] + z[j], r = v - rounded(v, group.top), magnitude = std::fabs(r);
      sums.error[j] += magnitude;
      sums.move[j] += std::copysign(std::min(power(magnitude) * factor, magnitude), r);
    }
  }
  for (int64_t i = kVector; i < kParts; ++i) add(parts[i % kVector], parts[i]);
  for (int64_t i = 1; i < kVector; ++i) add(parts[0], parts[i]);
  return parts[0];
}

// Transposes a group of the rows and chooses the grid all iterates share.
void start(const float* w, int64_t stride, Group& group) {
  for (int j = 0; j < kLanes; ++j) {
    const float* row = w + j * stride;
    const Grid grid = enclosing_grid(extremes(row, group.size), group.top);
    group.scale[j] = grid.scale;
    group.step[j] = half_value(grid.scale);
    group.from[j] = grid.from;
    group.inverse[j] = grid.inverse;
    for (int64_t i = 0; i < group.size; ++i) group.offset[i * kLanes + j] = (row[i] - grid.from) * grid.inverse;
  }
}

// The best offsets z met, relative to `from` and in steps.
Lanes best_offsets(const Group& group, const HqqForm& form) {
  Lanes ideal{}, best{}, best_error;
  best_error.fill(INFINITY);
  float beta = form.beta;
  for (int64_t iteration = 0; iteration < form.iterations; ++iteration, beta *= form.kappa) {
    Lanes distance = product(ideal, group.step);
    for (int j = 0; j < kLanes; ++j) distance[j] = group.from[j] - half_value(half_bits(group.from[j] - distance[j]));
    const Lanes z = product(distance, group.inverse);
    const Sums sums = pass(group, z, 1.0f / beta);
    for (int j = 0; j < kLanes; ++j) {
      if (sums.error[j] < best_error[j]) {
        best_error[j] = sums.error[j];
        best[j] = z[j];
      }
      ideal[j] -= sums.move[j] / static_cast<float>(group.size);  // not rounded to half: small moves add up
    }
  }
  return best;
}

void round_codes(const Group& group, const Lanes& z, uint8_t* codes, int64_t stride) {
  for (int64_t i = 0; i < group.size; ++i) {
    const float* offset = group.offset + i * kLanes;
    for (int j = 0; j < kLanes; ++j) codes[j * stride + i] = static_cast<uint8_t>(rounded(offset[j] + z[j], group.top));
  }
}

}  // namespace

void hqq_rows(const Source& w, const Packed& out, const HqqForm& form, int64_t begin, int64_t end) {
  std::vector<float> rows(kLanes * out.k_padded), offset(kLanes * out.group_size);
  std::vector<uint8_t> codes(kLanes * out.k_padded);
  for (int64_t n = begin; n < end; n += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, end - n);  // lanes without a row go through with what they held
    for (int64_t j = 0; j < count; ++j) read_scaled_row(w, out, n + j, rows.data() + j * out.k_padded);
    for (int64_t g = 0; g < out.groups; ++g) {
      const int64_t first = g * out.group_size;
      Group group{.size = std::min(out.group_size, out.k - first),
                  .top = static_cast<float>((1 << out.bits) - 1),
                  .offset = offset.data()};
      start(rows.data() + first, out.k_padded, group);
      const Lanes z = best_offsets(group, form), distance = product(z, group.step);
      round_codes(group, z, codes.data() + first, out.k_padded);
      for (int64_t j = 0; j < count; ++j) {
        scales_of_row(out, n + j)[g] = group.scale[j];
        minima_of_row(out, n + j)[g] = half_bits(group.from[j] - distance[j]);
      }
    }
    for (int64_t j = 0; j < count; ++j) write_planes(out, n + j, codes.data() + j * out.k_padded);
  }
}

}  // namespace autoq
