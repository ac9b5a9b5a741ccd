// Vectors of 256 bits: 16 int16, 8 int32 or 8 floats. AVX2 (and AVX-512 VNNI at the same width) or, in the
// portable build, the vector extensions of GCC and Clang, which need no instruction beyond the baseline.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define AUTOQ_AVX2 1
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace autoq {
namespace {

#ifdef AUTOQ_AVX2

using I16 = __m256i;
using I32 = __m256i;
using F32 = __m256;

inline I16 load_i16(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_i16(int16_t* p, I16 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline I32 zero_i32() { return _mm256_setzero_si256(); }

// acc[j] + a[2j]·b[2j] + a[2j+1]·b[2j+1]
inline I32 madd(I32 acc, I16 a, I16 b) {
#ifdef __AVX512VNNI__
  return _mm256_dpwssd_epi32(acc, a, b);
#else
  return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
#endif
}

inline F32 zero_f32() { return _mm256_setzero_ps(); }
inline F32 splat(float v) { return _mm256_set1_ps(v); }
inline F32 load_f32(const float* p) { return _mm256_loadu_ps(p); }
inline void store_f32(float* p, F32 v) { _mm256_storeu_ps(p, v); }
inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32 to_float(I32 v) { return _mm256_cvtepi32_ps(v); }
inline I32 round_to_int(F32 v) { return _mm256_cvtps_epi32(v); }  // half to even
inline F32 load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// All bits of the first `count` lanes
inline F32 first_lanes(int64_t count) {
  const I32 lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane));
}
inline F32 keep(F32 v, F32 lanes) { return _mm256_and_ps(v, lanes); }
inline F32 load_bf16(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// max over |v| of the bits as integers: NaN > infinity > every finite number
inline I32 max_magnitude_bits(I32 m, F32 v) {
  const I32 magnitude = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
  return _mm256_max_epi32(m, magnitude);
}

// 16 int16 in order, saturated
inline I16 narrow(I32 low, I32 high) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0b11011000);
}
inline F32 widen_low(I16 v) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(v)));
}
inline F32 widen_high(I16 v) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(v, 1)));
}

// out[j] += the sum of the lanes of v[j]
inline void add_lane_sums(const I32 (&v)[4], int32_t* out) {
  const I32 pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  __m128i* memory = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(memory, _mm_add_epi32(_mm_loadu_si128(memory), sums));
}
inline void add_lane_sums(const F32 (&v)[4], float* out) {
  const F32 pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}
inline int32_t lane_sum(I32 v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0b01001110));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0b10110001)));
}
inline int32_t lane_max(I32 v) {
  __m128i s = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0b01001110));
  return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0b10110001)));
}

#else  // portable

typedef int16_t I16 __attribute__((vector_size(32)));
typedef int32_t I32 __attribute__((vector_size(32)));
typedef float F32 __attribute__((vector_size(32)));
typedef int16_t I16Half __attribute__((vector_size(16)));

template <class Vector, class Scalar>
inline Vector load_as(const Scalar* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline I16 load_i16(const int16_t* p) { return load_as<I16>(p); }
inline void store_i16(int16_t* p, I16 v) { std::memcpy(p, &v, sizeof v); }
inline I32 zero_i32() { return I32{}; }

inline I32 madd(I32 acc, I16 a, I16 b) {
#ifdef __SSE2__
  __m128i x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  z[0] = _mm_madd_epi16(x[0], y[0]);
  z[1] = _mm_madd_epi16(x[1], y[1]);
  return acc + load_as<I32>(z);
#else
  for (int j = 0; j < 8; ++j) acc[j] += a[2 * j] * b[2 * j] + a[2 * j + 1] * b[2 * j + 1];
  return acc;
#endif
}

inline F32 zero_f32() { return F32{}; }
inline F32 splat(float v) { return F32{v, v, v, v, v, v, v, v}; }
inline F32 load_f32(const float* p) { return load_as<F32>(p); }
inline void store_f32(float* p, F32 v) { std::memcpy(p, &v, sizeof v); }
inline F32 mul(F32 a, F32 b) { return a * b; }
inline F32 div(F32 a, F32 b) { return a / b; }
inline F32 sub(F32 a, F32 b) { return a - b; }
inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
inline F32 to_float(I32 v) { return __builtin_convertvector(v, F32); }
inline I32 round_to_int(F32 v) {
  const F32 shift = splat(12582912.0f);  // 1.5·2^23: adding it rounds |v| < 2^22 half to even
  return __builtin_convertvector((v + shift) - shift, I32);
}
inline F32 load_half(const uint16_t* p) {
  I32 bits, result;
  for (int j = 0; j < 8; ++j) bits[j] = p[j];
  const F32 scale = splat(5.192296858534828e33f);  // 2^112 moves the exponent bias from 15 to 127
  const I32 magnitude = (bits & 0x7fff) << 13;
  F32 value;
  std::memcpy(&value, &magnitude, sizeof value);
  value = value * scale;
  std::memcpy(&result, &value, sizeof result);
  result |= ((bits & 0x7c00) == 0x7c00) & 0x7f800000;  // infinities and NaN
  result |= (bits & 0x8000) << 16;
  std::memcpy(&value, &result, sizeof value);
  return value;
}
inline F32 first_lanes(int64_t count) {
  I32 lanes;
  for (int j = 0; j < 8; ++j) lanes[j] = j < count ? -1 : 0;
  return load_as<F32>(&lanes);
}
inline F32 keep(F32 v, F32 lanes) {
  const I32 bits = load_as<I32>(&v) & load_as<I32>(&lanes);
  return load_as<F32>(&bits);
}
inline F32 load_bf16(const uint16_t* p) {
  I32 bits;
  for (int j = 0; j < 8; ++j) bits[j] = static_cast<int32_t>(static_cast<uint32_t>(p[j]) << 16);
  return load_as<F32>(&bits);
}
inline I32 max_magnitude_bits(I32 m, F32 v) {
  const I32 magnitude = load_as<I32>(&v) & 0x7fffffff;
  return magnitude > m ? magnitude : m;
}
inline I16 narrow(I32 low, I32 high) {
  I16 v;
  for (int j = 0; j < 16; ++j) {
    const int32_t wide = j < 8 ? low[j] : high[j - 8];
    v[j] = static_cast<int16_t>(wide > 32767 ? 32767 : wide < -32768 ? -32768 : wide);
  }
  return v;
}
inline F32 widen_low(I16 v) { return __builtin_convertvector(load_as<I16Half>(&v), F32); }
inline F32 widen_high(I16 v) {
  return __builtin_convertvector(load_as<I16Half>(reinterpret_cast<const char*>(&v) + 16), F32);
}
inline int32_t lane_sum(I32 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
template <class Vector, class Scalar>
inline void add_lane_sums(const Vector (&v)[4], Scalar* out) {
  for (int j = 0; j < 4; ++j) {
    const Vector u = v[j];
    out[j] += ((u[0] + u[4]) + (u[2] + u[6])) + ((u[1] + u[5]) + (u[3] + u[7]));
  }
}
inline int32_t lane_max(I32 v) {
  int32_t m = v[0];
  for (int j = 1; j < 8; ++j) m = v[j] > m ? v[j] : m;
  return m;
}

#endif

}  // namespace
}  // namespace autoq
