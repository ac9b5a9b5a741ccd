// The float weight that is quantized, and its numbers as float32.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstdint>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "packed.h"

namespace autoq {

struct Source {  // [N, K], strides in elements
  const void* data;
  DType dtype;
  int64_t row_stride, column_stride;
};

struct Extremes {
  float low, high;
};

namespace {

// Half to nearest, ties to even; c10::Half does it in dozens of integer instructions.
inline uint16_t half_bits(float v) {
#ifdef __F16C__
  return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
#else
  return c10::Half(v).x;
#endif
}

inline float half_value(uint16_t bits) {
#ifdef __F16C__
  return _cvtsh_ss(bits);
#else
  return c10::Half(bits, c10::Half::from_bits());
#endif
}

template <class T>
void widen(const T* in, int64_t stride, int64_t count, float* out) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(in[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(in[i * stride]);
  }
}

#ifdef __F16C__
inline void widen(const c10::Half* in, int64_t stride, int64_t count, float* out) {
  int64_t i = 0;
  for (; stride == 1 && i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
  for (; i < count; ++i) out[i] = half_value(in[i * stride].x);
}
#endif

// out[i] = W[n, first + i] for i < count.
inline void read_row(const Source& w, int64_t n, int64_t first, int64_t count, float* out) {
  const int64_t at = n * w.row_stride + first * w.column_stride;
  switch (w.dtype) {
    case DType::kHalf: return widen(static_cast<const c10::Half*>(w.data) + at, w.column_stride, count, out);
    case DType::kBFloat16: return widen(static_cast<const c10::BFloat16*>(w.data) + at, w.column_stride, count, out);
    default: return widen(static_cast<const float*>(w.data) + at, w.column_stride, count, out);
  }
}

// Integers in the order of the floats, and back: compilers vectorize no float minimum over a loop.
inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// Smallest and largest of at least one number, NaN excluded.
inline Extremes extremes(const float* v, int64_t count) {
  int32_t low = ordered(std::bit_cast<int32_t>(v[0])), high = low;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t key = ordered(std::bit_cast<int32_t>(v[i]));
    low = std::min(low, key);
    high = std::max(high, key);
  }
  return {std::bit_cast<float>(ordered(low)), std::bit_cast<float>(ordered(high))};
}

inline float largest_magnitude(const float* v, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::bit_cast<int32_t>(v[i]) & 0x7fffffff);
  return std::bit_cast<float>(largest);
}

}  // namespace
}  // namespace autoq
