// Half-quadratic quantization of groups, all iterations while a group is in registers and the L1 cache.
// The reference is autoq.numerics.hqq; its comments say what is computed and why.
#include "quantize.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>

namespace autoq {
namespace {

using at::Tensor;

constexpr int64_t kMaxGroup = 256;
constexpr float kNoFraction = 12582912.0f;  // 1.5·2^23: adding it rounds |v| < 2^22 half to even

struct Form {
  float top, beta, kappa;
  int64_t iterations;
};

// The next half below (-1) or above (+1).
c10::Half neighbour(c10::Half h, int direction) {
  if ((h.x & 0x7fff) == 0) return c10::Half(direction > 0 ? 0x0001 : 0x8001, c10::Half::from_bits());
  const bool grows = ((h.x & 0x8000) == 0) == (direction > 0);
  return c10::Half(static_cast<uint16_t>(h.x + (grows ? 1 : -1)), c10::Half::from_bits());
}

c10::Half half_below(float v) {
  const c10::Half h(v);
  return static_cast<float>(h) > v ? neighbour(h, -1) : h;
}

c10::Half half_above(float v) {
  const c10::Half h(v);
  return static_cast<float>(h) < v ? neighbour(h, +1) : h;
}

inline float rounded(float v, float top) {
  const float whole = (v + kNoFraction) - kNoFraction;
  return std::min(std::max(whole, 0.0f), top);
}

// factor · x^-0.3: x^(-1/4) times a quadratic in x^(1/16); below 0.12 the result only has to exceed x.
inline float power(float x, float factor) {
  constexpr float a2 = 0.8642431f, a1 = -2.52148952f, a0 = 2.65729528f;
  const float fourth = std::sqrt(std::sqrt(x)), c = std::sqrt(std::sqrt(fourth));
  return factor / fourth * ((a2 * c + a1) * c + a0);
}

// One pass over a group: (sum of |r|, sum of the moves) at the offset z.
void pass(const float* offset, int64_t size, float z, float top, float factor, float* error, float* move) {
  float errors = 0.0f, moves = 0.0f;
#pragma omp simd reduction(+ : errors, moves)
  for (int64_t i = 0; i < size; ++i) {
    const float v = offset[i] + z, r = v - rounded(v, top), magnitude = std::fabs(r);
    errors += magnitude;
    moves += std::copysign(std::min(power(magnitude, factor), magnitude), r);
  }
  *error = errors;
  *move = moves;
}

void quantize_group(const float* w, int64_t size, const Form& form, uint8_t* codes, c10::Half* scale, c10::Half* minimum) {
  const auto [low, high] = std::minmax_element(w, w + size);
  const c10::Half start = half_below(*low);
  *scale = half_above((*high - static_cast<float>(start)) / form.top);
  const float step = *scale, from = start, inverse = step > 0.0f ? 1.0f / step : 0.0f;
  float offset[kMaxGroup];
  for (int64_t i = 0; i < size; ++i) offset[i] = (w[i] - from) * inverse;
  float ideal = 0.0f, best_z = 0.0f, best_error = INFINITY, beta = form.beta;
  for (int64_t iteration = 0; iteration < form.iterations; ++iteration, beta *= form.kappa) {
    const float stored = static_cast<float>(c10::Half(from - ideal * step));
    const float z = (from - stored) * inverse;
    float error, move;
    pass(offset, size, z, form.top, 1.0f / beta, &error, &move);
    if (error < best_error) {
      best_error = error;
      best_z = z;
    }
    ideal -= move / static_cast<float>(size);
  }
  for (int64_t i = 0; i < size; ++i) codes[i] = static_cast<uint8_t>(rounded(offset[i] + best_z, form.top));
  *minimum = c10::Half(from - best_z * step);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> hqq(const Tensor& groups, int64_t bits, double beta, double kappa, int64_t iterations) {
  TORCH_CHECK(groups.scalar_type() == at::kFloat && groups.dim() >= 1 && groups.size(-1) >= 1 && groups.size(-1) <= kMaxGroup,
              "autoq: groups must be float32 [..., g] with g from 1 to ", kMaxGroup, "; got ", groups.toString(), " ", groups.sizes());
  TORCH_CHECK(bits >= 2 && bits <= 8 && iterations >= 1, "autoq: bits must be 2 to 8 and iterations at least 1");
  const Tensor w = groups.contiguous();
  const int64_t size = w.size(-1), count = w.numel() / size;
  const Tensor codes = at::empty(w.sizes(), at::kByte);
  const Tensor scale = at::empty(w.sizes().slice(0, w.dim() - 1), at::kHalf), minimum = at::empty_like(scale);
  const float* values = w.const_data_ptr<float>();
  uint8_t* code = codes.mutable_data_ptr<uint8_t>();
  c10::Half* scales = scale.mutable_data_ptr<c10::Half>();
  c10::Half* minima = minimum.mutable_data_ptr<c10::Half>();
  const Form form{static_cast<float>((1 << bits) - 1), static_cast<float>(beta), static_cast<float>(kappa), iterations};
  for (int64_t i = 0; i < count; ++i) {  // callers give each thread its own rows
    quantize_group(values + i * size, size, form, code + i * size, scales + i, minima + i);
  }
  return {codes, scale, minimum};
}

}  // namespace autoq
