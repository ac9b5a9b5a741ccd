// Bit planes of a block as 32 bytes in the order of the inputs (AVX2, also in the AVX-512 build).
#pragma once

#include "vec.h"

namespace autoq {
namespace {

inline __m128i load_16_bytes(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

inline __m256i nibbles(const uint8_t* p) {
  const __m256i twice = _mm256_broadcastsi128_si256(load_16_bytes(p));
  return _mm256_and_si256(_mm256_srlv_epi64(twice, _mm256_setr_epi64x(0, 0, 4, 4)), _mm256_set1_epi8(15));
}

inline __m256i pair_bytes(const uint8_t* p) {  // in each quad still packed
  int64_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return _mm256_set1_epi64x(bytes);
}
inline __m256i pairs(const uint8_t* p) {
  const __m256i quads = _mm256_srlv_epi64(pair_bytes(p), _mm256_setr_epi64x(0, 2, 4, 6));
  return _mm256_and_si256(quads, _mm256_set1_epi8(3));
}

// `value` where the bit is set
inline __m256i bits(const uint8_t* p, int8_t value) {
  int32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bytes), byte), bit);
  return _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), _mm256_set1_epi8(value));
}

// What transpose_dwords is given where products are of bytes
inline void store_nibbles(const uint8_t* p, uint8_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), nibbles(p));
}
inline void store_offset_by_128(const uint8_t* p, uint8_t* out) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)));
}

}  // namespace
}  // namespace autoq
