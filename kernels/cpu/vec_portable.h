// 256 bits through the vector extensions of GCC and Clang, which need no instruction beyond the baseline.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace autoq {
namespace {

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
inline I32 load_i32(const int32_t* p) { return load_as<I32>(p); }
inline void store_i32(int32_t* p, I32 v) { std::memcpy(p, &v, sizeof v); }
inline I32 zero_i32() { return I32{}; }
inline I16 broadcast(int32_t dword) {
  const I32 v = {dword, dword, dword, dword, dword, dword, dword, dword};
  return load_as<I16>(&v);
}

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
inline F32 add(F32 a, F32 b) { return a + b; }
inline F32 sub(F32 a, F32 b) { return a - b; }
inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
inline F32 max(F32 a, F32 b) { return a > b ? a : b; }  // NaN only where b is
inline F32 to_float(I32 v) { return __builtin_convertvector(v, F32); }
inline F32 power_of_two(I32 n) {  // of -126 … 127
  const I32 bits = (n + 127) << 23;
  return load_as<F32>(&bits);
}
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
inline void store_half(uint16_t* p, F32 v) {
  for (int j = 0; j < 8; ++j) p[j] = c10::Half(v[j]).x;
}
inline void store_bf16(uint16_t* p, F32 v) {
  for (int j = 0; j < 8; ++j) p[j] = c10::BFloat16(v[j]).x;
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
inline float lane_sum(F32 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
template <class Vector, class Scalar>
inline void add_lane_sums(const Vector (&v)[4], Scalar* out) {
  for (int j = 0; j < 4; ++j) {
    const Vector u = v[j];
    out[j] += ((u[0] + u[4]) + (u[2] + u[6])) + ((u[1] + u[5]) + (u[3] + u[7]));
  }
}
inline float lane_max(F32 v) {
  float m = v[0];
  for (int j = 1; j < 8; ++j) m = v[j] > m ? v[j] : m;
  return m;
}
inline int32_t lane_max(I32 v) {
  int32_t m = v[0];
  for (int j = 1; j < 8; ++j) m = v[j] > m ? v[j] : m;
  return m;
}

// out + u·out_stride = dword u of each of the 8 rows, for u < 8; strides in bytes
inline void transpose_dwords(const uint8_t* rows, int64_t stride, uint8_t* out, int64_t out_stride) {
  for (int r = 0; r < 8; ++r) {
    for (int u = 0; u < 8; ++u) std::memcpy(out + u * out_stride + 4 * r, rows + r * stride + 4 * u, 4);
  }
}

}  // namespace
}  // namespace autoq
