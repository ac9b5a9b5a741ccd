// 512 bits: AVX-512 F, BW, DQ, VL and VNNI; BF16 where the build has it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace autoq {
namespace {

using I16 = __m512i;
using I32 = __m512i;
using F32 = __m512;

inline I16 load_i16(const int16_t* p) { return _mm512_loadu_si512(p); }
inline void store_i16(int16_t* p, I16 v) { _mm512_storeu_si512(p, v); }
inline I32 load_i32(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store_i32(int32_t* p, I32 v) { _mm512_storeu_si512(p, v); }
inline I32 zero_i32() { return _mm512_setzero_si512(); }
inline I32 broadcast(int32_t dword) { return _mm512_set1_epi32(dword); }

// Keeps a sum in its register: GCC 12 would copy the sums of a tile back and forth, and spill some.
inline I32 in_place(I32 acc) {
#ifndef AUTOQ_EMULATION
  asm volatile("" : "+v"(acc));
#endif
  return acc;
}
inline I32 madd(I32 acc, I16 a, I16 b) { return in_place(_mm512_dpwssd_epi32(acc, a, b)); }
inline I32 dot8(I32 acc, I32 a, I32 b) { return in_place(_mm512_dpbusd_epi32(acc, a, b)); }

inline I32 sub_i32(I32 a, I32 b) { return _mm512_sub_epi32(a, b); }
inline F32 zero_f32() { return _mm512_setzero_ps(); }
inline F32 splat(float v) { return _mm512_set1_ps(v); }
inline F32 load_f32(const float* p) { return _mm512_loadu_ps(p); }
inline void store_f32(float* p, F32 v) { _mm512_storeu_ps(p, v); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }  // NaN only where b is
inline F32 to_float(I32 v) { return _mm512_cvtepi32_ps(v); }
inline F32 power_of_two(I32 n) {  // of -126 … 127
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}
inline I32 round_to_int(F32 v) { return _mm512_cvtps_epi32(v); }  // half to even
inline F32 load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F32 load_bf16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store_half(uint16_t* p, F32 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_bf16(uint16_t* p, F32 v) {  // half to even; NaN stays one
  const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i top = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000)), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(top));
}
// All bits of the first `count` lanes
inline F32 first_lanes(int64_t count) {
  const __mmask16 lanes = count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
  return _mm512_castsi512_ps(_mm512_movm_epi32(lanes));
}
inline F32 keep(F32 v, F32 lanes) { return _mm512_and_ps(v, lanes); }

// max over |v| of the bits as integers: NaN > infinity > every finite number
inline I32 max_magnitude_bits(I32 m, F32 v) {
  return _mm512_max_epi32(m, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
}

// 32 int16 in order, saturated
inline I16 narrow(I32 low, I32 high) {
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return _mm512_permutexvar_epi64(order, _mm512_packs_epi32(low, high));
}
inline F32 widen_low(I16 v) { return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(v))); }
inline F32 widen_high(I16 v) { return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(v, 1))); }

inline int32_t lane_sum(I32 v) { return _mm512_reduce_add_epi32(v); }
inline float lane_sum(F32 v) { return _mm512_reduce_add_ps(v); }
inline float lane_max(F32 v) { return _mm512_reduce_max_ps(v); }
inline int32_t lane_max(I32 v) { return _mm512_reduce_max_epi32(v); }

// out[j] += the sum of the lanes of v[j]
inline void add_lane_sums(const I32 (&v)[4], int32_t* out) {
  __m256i half[4];
  for (int j = 0; j < 4; ++j) {
    half[j] = _mm256_add_epi32(_mm512_castsi512_si256(v[j]), _mm512_extracti64x4_epi64(v[j], 1));
  }
  const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(half[0], half[1]), _mm256_hadd_epi32(half[2], half[3]));
  const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  __m128i* memory = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(memory, _mm_add_epi32(_mm_loadu_si128(memory), sums));
}
inline void add_lane_sums(const F32 (&v)[4], float* out) {
  __m256 half[4];
  for (int j = 0; j < 4; ++j) {
    half[j] = _mm256_add_ps(_mm512_castps512_ps256(v[j]), _mm512_extractf32x8_ps(v[j], 1));
  }
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}

inline __m512i two_rows(const uint8_t* a, const uint8_t* b) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), 1);
}

// out + u·out_stride = dword u of each of the 16 rows, for u < 8; strides in bytes
inline void transpose_dwords(const uint8_t* rows, int64_t stride, uint8_t* out, int64_t out_stride) {
  __m512i v[8], t[8];
  for (int r = 0; r < 8; ++r) v[r] = two_rows(rows + r * stride, rows + (r + 8) * stride);
  for (int r = 0; r < 4; ++r) {
    t[2 * r] = _mm512_unpacklo_epi32(v[2 * r], v[2 * r + 1]);
    t[2 * r + 1] = _mm512_unpackhi_epi32(v[2 * r], v[2 * r + 1]);
  }
  for (int h = 0; h < 2; ++h) {
    v[4 * h] = _mm512_unpacklo_epi64(t[4 * h], t[4 * h + 2]);
    v[4 * h + 1] = _mm512_unpackhi_epi64(t[4 * h], t[4 * h + 2]);
    v[4 * h + 2] = _mm512_unpacklo_epi64(t[4 * h + 1], t[4 * h + 3]);
    v[4 * h + 3] = _mm512_unpackhi_epi64(t[4 * h + 1], t[4 * h + 3]);
  }
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  for (int u = 0; u < 4; ++u) {
    _mm512_storeu_si512(out + u * out_stride, _mm512_permutex2var_epi64(v[u], low, v[u + 4]));
    _mm512_storeu_si512(out + (u + 4) * out_stride, _mm512_permutex2var_epi64(v[u], high, v[u + 4]));
  }
}

}  // namespace
}  // namespace autoq
