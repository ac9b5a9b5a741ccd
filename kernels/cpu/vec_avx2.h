// 256 bits: AVX2, FMA, F16C, and the dot products of AVX-VNNI where the build has them.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace autoq {
namespace {

using I16 = __m256i;
using I32 = __m256i;
using F32 = __m256;

inline I16 load_i16(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_i16(int16_t* p, I16 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline I32 load_i32(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_i32(int32_t* p, I32 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline I32 zero_i32() { return _mm256_setzero_si256(); }
inline I32 broadcast(int32_t dword) { return _mm256_set1_epi32(dword); }

// Keeps a sum in its register: GCC 12 would make all products of a tile first, copy its sums, and spill some.
inline I32 in_place(I32 acc) {
  asm volatile("" : "+x"(acc));
  return acc;
}
#ifdef AUTOQ_AVXVNNI
inline I32 madd(I32 acc, I16 a, I16 b) { return in_place(_mm256_dpwssd_avx_epi32(acc, a, b)); }
inline I32 dot8(I32 acc, I32 a, I32 b) { return in_place(_mm256_dpbusd_avx_epi32(acc, a, b)); }
#else
inline I32 madd(I32 acc, I16 a, I16 b) { return in_place(_mm256_add_epi32(acc, _mm256_madd_epi16(a, b))); }
inline I16 add_pairs8(I16 acc, I32 a, I32 b) { return in_place(_mm256_add_epi16(acc, _mm256_maddubs_epi16(a, b))); }
#endif

inline I32 sub_i32(I32 a, I32 b) { return _mm256_sub_epi32(a, b); }
inline F32 zero_f32() { return _mm256_setzero_ps(); }
inline F32 splat(float v) { return _mm256_set1_ps(v); }
inline F32 load_f32(const float* p) { return _mm256_loadu_ps(p); }
inline void store_f32(float* p, F32 v) { _mm256_storeu_ps(p, v); }
inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }  // NaN only where b is
inline F32 to_float(I32 v) { return _mm256_cvtepi32_ps(v); }
inline F32 power_of_two(I32 n) {  // of -126 … 127
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline I32 round_to_int(F32 v) { return _mm256_cvtps_epi32(v); }  // half to even
inline F32 load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_half(uint16_t* p, F32 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_bf16(uint16_t* p, F32 v) {  // half to even; NaN stays one
  const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0b1000);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(words));
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
inline float lane_sum(F32 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float lane_max(F32 v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline int32_t lane_max(I32 v) {
  __m128i s = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0b01001110));
  return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0b10110001)));
}

// out + u·out_stride = dword u of each of the 8 rows, for u < 8; strides in bytes
inline void transpose_dwords(const uint8_t* rows, int64_t stride, uint8_t* out, int64_t out_stride) {
  __m256i v[8], t[8];
  for (int r = 0; r < 8; ++r) v[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + r * stride));
  for (int r = 0; r < 4; ++r) {
    t[2 * r] = _mm256_unpacklo_epi32(v[2 * r], v[2 * r + 1]);
    t[2 * r + 1] = _mm256_unpackhi_epi32(v[2 * r], v[2 * r + 1]);
  }
  for (int h = 0; h < 2; ++h) {
    v[4 * h] = _mm256_unpacklo_epi64(t[4 * h], t[4 * h + 2]);
    v[4 * h + 1] = _mm256_unpackhi_epi64(t[4 * h], t[4 * h + 2]);
    v[4 * h + 2] = _mm256_unpacklo_epi64(t[4 * h + 1], t[4 * h + 3]);
    v[4 * h + 3] = _mm256_unpackhi_epi64(t[4 * h + 1], t[4 * h + 3]);
  }
  for (int u = 0; u < 4; ++u) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + u * out_stride), _mm256_permute2x128_si256(v[u], v[u + 4], 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (u + 4) * out_stride), _mm256_permute2x128_si256(v[u], v[u + 4], 0x31));
  }
}

}  // namespace
}  // namespace autoq
