// Instruction sets that this machine lacks: SIMDe's emulation (libsimde-dev), and what release 0.7.4 of it lacks. Given
// to kernels/cpu/vec.h by -DAUTOQ_EMULATION='"emulation.h"' and -DEMULATED_AVX512 or -DEMULATED_AVXVNNI, so that the
// kernels are tested as they are written; only their speed is not.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef EMULATED_AVXVNNI
#define AUTOQ_AVX2 1
#define AUTOQ_AVXVNNI 1
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#define _mm256_dpwssd_avx_epi32 simde_mm256_dpwssd_epi32
#else
#define AUTOQ_AVX512 1

namespace emulated {

template <class Element, class Vector>
struct Lanes {
  static constexpr int kCount = sizeof(Vector) / sizeof(Element);
  Element lane[kCount];
  Lanes() = default;
  explicit Lanes(Vector v) { std::memcpy(lane, &v, sizeof v); }
  Vector vector() const {
    Vector v;
    std::memcpy(&v, lane, sizeof v);
    return v;
  }
};

template <class From, class To, class Result, class Vector, class F>
inline Result map(Vector v, F&& f) {
  const Lanes<From, Vector> a(v);
  Lanes<To, Result> r;
  static_assert(decltype(a)::kCount == decltype(r)::kCount);
  for (int i = 0; i < r.kCount; ++i) r.lane[i] = f(a.lane[i]);
  return r.vector();
}

inline __m512i cvtepu8_epi16(__m256i v) {
  return map<uint8_t, int16_t, __m512i>(v, [](uint8_t x) { return static_cast<int16_t>(x); });
}
inline __m512i cvtepi16_epi32(__m256i v) {
  return map<int16_t, int32_t, __m512i>(v, [](int16_t x) { return static_cast<int32_t>(x); });
}
inline __m512i cvtepu16_epi32(__m256i v) {
  return map<uint16_t, int32_t, __m512i>(v, [](uint16_t x) { return static_cast<int32_t>(x); });
}
inline __m256i cvtepi32_epi16(__m512i v) {
  return map<int32_t, int16_t, __m256i>(v, [](int32_t x) { return static_cast<int16_t>(x); });
}
inline __m512 cvtepi32_ps(__m512i v) {
  return map<int32_t, float, __m512>(v, [](int32_t x) { return static_cast<float>(x); });
}
inline __m512i cvtps_epi32(__m512 v) {
  return map<float, int32_t, __m512i>(v, [](float x) {
    return std::fabs(x) < 2147483648.0f ? static_cast<int32_t>(std::nearbyint(x)) : INT32_MIN;
  });
}
inline __m512 cvtph_ps(__m256i v) {
  return map<uint16_t, float, __m512>(v, [](uint16_t x) { return static_cast<float>(c10::Half(x, c10::Half::from_bits())); });
}
inline __m256i cvtps_ph(__m512 v) {
  return map<float, uint16_t, __m256i>(v, [](float x) { return c10::Half(x).x; });
}
inline __m256 upper_half(__m512 v) {
  __m256 half[2];
  std::memcpy(half, &v, sizeof v);
  return half[1];
}
template <class Element, class Vector, class F>
inline Element reduce(Vector v, F&& f) {
  const Lanes<Element, Vector> a(v);
  Element r = a.lane[0];
  for (int i = 1; i < a.kCount; ++i) r = f(r, a.lane[i]);
  return r;
}

}  // namespace emulated

#define _mm512_cvtepu8_epi16 emulated::cvtepu8_epi16
#define _mm512_cvtepi16_epi32 emulated::cvtepi16_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph(v, rounding) emulated::cvtps_ph(v)
#define _mm512_extractf32x8_ps(v, half) emulated::upper_half(v)
#define _mm512_reduce_add_epi32(v) emulated::reduce<int32_t>(v, [](int32_t a, int32_t b) { return a + b; })
#define _mm512_reduce_max_epi32(v) emulated::reduce<int32_t>(v, [](int32_t a, int32_t b) { return a > b ? a : b; })
#define _mm512_reduce_add_ps(v) emulated::reduce<float>(v, [](float a, float b) { return a + b; })
#define _mm512_reduce_max_ps(v) emulated::reduce<float>(v, [](float a, float b) { return a > b ? a : b; })
#endif
