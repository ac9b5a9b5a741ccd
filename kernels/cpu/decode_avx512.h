// Codes of a block as int16 in one AVX-512 register: bytes widened in order, fp6 looked up in tables of 64.
#pragma once

#include "decode_bytes.h"

namespace autoq {
namespace {

constexpr bool kLaneByLane = false;

inline Block widened(__m256i bytes) { return {{_mm512_cvtepu8_epi16(bytes)}}; }
inline __m256i load_32_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

inline Block bytes_u8(const uint8_t* p) { return widened(load_32_bytes(p)); }
inline Block bytes_i8(const uint8_t* p) { return {{_mm512_cvtepi8_epi16(load_32_bytes(p))}}; }
inline Block codes4(const uint8_t* p) { return widened(nibbles(p)); }
inline Block codes3(const uint8_t* p2, const uint8_t* p1) { return widened(_mm256_or_si256(pairs(p2), bits(p1, 4))); }
inline Block codes5(const uint8_t* p4, const uint8_t* p1) { return widened(_mm256_or_si256(nibbles(p4), bits(p1, 16))); }
inline Block codes6(const uint8_t* p4, const uint8_t* p2) {
  return widened(_mm256_or_si256(nibbles(p4), _mm256_slli_epi16(pairs(p2), 4)));
}

template <int kMantissaBits>
struct Fp6Table {  // the 64 numbers, in units of the smallest
  alignas(64) int16_t value[64];
  constexpr Fp6Table() : value() {
    for (int code = 0; code < 64; ++code) {
      const int exponent = (code & 31) >> kMantissaBits, mantissa = code & ((1 << kMantissaBits) - 1);
      const int magnitude = exponent ? (mantissa + (1 << kMantissaBits)) << (exponent - 1) : mantissa;
      value[code] = static_cast<int16_t>(code < 32 ? magnitude : -magnitude);
    }
  }
};

template <int kMantissaBits>
inline Block fp6(const uint8_t* p4, const uint8_t* p2) {
  static constexpr Fp6Table<kMantissaBits> kTable;
  const Block code = codes6(p4, p2);
  return {{_mm512_permutex2var_epi16(load_i16(kTable.value), code.part[0], load_i16(kTable.value + 32))}};
}
inline Block fp6_e2m3(const uint8_t* p4, const uint8_t* p2) { return fp6<3>(p4, p2); }
inline Block fp6_e3m2(const uint8_t* p4, const uint8_t* p2) { return fp6<2>(p4, p2); }

}  // namespace
}  // namespace autoq
