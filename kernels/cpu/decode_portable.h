// Codes of a block as int16: the layout's definition, element by element, always in order.
#pragma once

#include "vec.h"

namespace autoq {
namespace {

constexpr bool kLaneByLane = false;

template <class Element>
inline Block from_elements(Element element) {
  int16_t v[32];
  for (int j = 0; j < 32; ++j) v[j] = static_cast<int16_t>(element(j));
  return {load_i16(v), load_i16(v + 16)};
}
inline int bits4(const uint8_t* p, int j) { return p[j % 16] >> (4 * (j / 16)) & 15; }
inline int bits2(const uint8_t* p, int j) { return p[j % 8] >> (2 * (j / 8)) & 3; }
inline int bits1(const uint8_t* p, int j) { return p[j / 8] >> (j % 8) & 1; }

inline Block codes4(const uint8_t* p) {
  return from_elements([p](int j) { return bits4(p, j); });
}
inline Block codes3(const uint8_t* p2, const uint8_t* p1) {
  return from_elements([=](int j) { return bits2(p2, j) | bits1(p1, j) << 2; });
}
inline Block codes5(const uint8_t* p4, const uint8_t* p1) {
  return from_elements([=](int j) { return bits4(p4, j) | bits1(p1, j) << 4; });
}
inline Block codes6(const uint8_t* p4, const uint8_t* p2) {
  return from_elements([=](int j) { return bits4(p4, j) | bits2(p2, j) << 4; });
}

template <int kMantissaBits>
inline Block fp6(const uint8_t* p4, const uint8_t* p2) {
  return from_elements([=](int j) {
    const int top = bits2(p2, j), code = bits4(p4, j) | (top & 1) << 4;
    const int exponent = code >> kMantissaBits, mantissa = code & ((1 << kMantissaBits) - 1);
    const int magnitude = exponent ? (mantissa + (1 << kMantissaBits)) << (exponent - 1) : mantissa;
    return top & 2 ? -magnitude : magnitude;
  });
}
inline Block fp6_e2m3(const uint8_t* p4, const uint8_t* p2) { return fp6<3>(p4, p2); }
inline Block fp6_e3m2(const uint8_t* p4, const uint8_t* p2) { return fp6<2>(p4, p2); }
inline Block bytes_u8(const uint8_t* p) {
  return from_elements([p](int j) { return p[j]; });
}
inline Block bytes_i8(const uint8_t* p) {
  return from_elements([p](int j) { return static_cast<int8_t>(p[j]); });
}

}  // namespace
}  // namespace autoq
