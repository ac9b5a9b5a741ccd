// Codes of a block as int16 in AVX2 registers.
#pragma once

#include "decode_bytes.h"

namespace autoq {
namespace {

constexpr bool kLaneByLane = true;

inline Block unpack(__m256i bytes, __m256i upper) {
  return {_mm256_unpacklo_epi8(bytes, upper), _mm256_unpackhi_epi8(bytes, upper)};
}
inline Block bytes_u8(const uint8_t* p) {
  return {_mm256_cvtepu8_epi16(load_16_bytes(p)), _mm256_cvtepu8_epi16(load_16_bytes(p + 16))};
}
inline Block bytes_i8(const uint8_t* p) {
  return {_mm256_cvtepi8_epi16(load_16_bytes(p)), _mm256_cvtepi8_epi16(load_16_bytes(p + 16))};
}
inline Block codes4(const uint8_t* p) {
  const __m256i words = _mm256_cvtepu8_epi16(load_16_bytes(p));
  return {_mm256_and_si256(words, _mm256_set1_epi16(15)), _mm256_srli_epi16(words, 4)};
}

inline Block codes3(const uint8_t* p2, const uint8_t* p1) {
  return unpack(_mm256_or_si256(pairs(p2), bits(p1, 4)), _mm256_setzero_si256());
}
inline Block codes5(const uint8_t* p4, const uint8_t* p1) {
  return unpack(_mm256_or_si256(nibbles(p4), bits(p1, 16)), _mm256_setzero_si256());
}
inline Block codes6(const uint8_t* p4, const uint8_t* p2) {
  return unpack(_mm256_or_si256(nibbles(p4), _mm256_slli_epi16(pairs(p2), 4)), _mm256_setzero_si256());
}

inline __m256i table(const int8_t (&values)[16]) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
}

// The upper two bits of an fp6 code, each moved to the top of its byte (the bits below it are of no use).
inline __m256i signs(__m256i pairs) { return _mm256_sllv_epi64(pairs, _mm256_setr_epi64x(6, 4, 2, 0)); }
inline __m256i large_exponents(__m256i pairs) { return _mm256_sllv_epi64(pairs, _mm256_setr_epi64x(7, 5, 3, 1)); }

// Multiples of 1/8: the nibble itself below exponent 2, a table above.
inline Block fp6_e2m3(const uint8_t* p4, const uint8_t* p2) {
  static constexpr int8_t kLarge[16] = {16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48, 52, 56, 60};
  const __m256i nibble = nibbles(p4), top = pair_bytes(p2);
  const __m256i large = _mm256_shuffle_epi8(table(kLarge), nibble);
  const __m256i magnitude = _mm256_blendv_epi8(nibble, large, large_exponents(top));
  const __m256i v = _mm256_sign_epi8(magnitude, _mm256_or_si256(signs(top), _mm256_set1_epi8(1)));
  return unpack(v, _mm256_cmpgt_epi8(_mm256_setzero_si256(), v));
}

// Multiples of 1/16, up to 448: a table for each byte of the magnitude.
inline Block fp6_e3m2(const uint8_t* p4, const uint8_t* p2) {
  static constexpr int8_t kSmall[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28};
  static constexpr int8_t kLarge[16] = {32, 40, 48, 56, 64, 80, 96, 112, -128, -96, -64, -32, 0, 64, -128, -64};
  static constexpr int8_t kLargeHigh[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1};
  const __m256i nibble = nibbles(p4), top = pair_bytes(p2), is_large = large_exponents(top);
  const __m256i low = _mm256_blendv_epi8(
      _mm256_shuffle_epi8(table(kSmall), nibble), _mm256_shuffle_epi8(table(kLarge), nibble), is_large);
  const __m256i high =
      _mm256_blendv_epi8(_mm256_setzero_si256(), _mm256_shuffle_epi8(table(kLargeHigh), nibble), is_large);
  const Block magnitude = unpack(low, high), sign = unpack(_mm256_set1_epi8(1), signs(top));
  return {_mm256_sign_epi16(magnitude.part[0], sign.part[0]), _mm256_sign_epi16(magnitude.part[1], sign.part[1])};
}

}  // namespace
}  // namespace autoq
