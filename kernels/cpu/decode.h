// A row of codes, 32 inputs at a time, as 2 × 16 int16 in the order of the inputs. Whole numbers in every kind:
// fp6 values are multiples of their smallest step (1/16 or 1/8), so their products with int16 x sum exactly too.
#pragma once

#include "packed.h"
#include "vec.h"

namespace autoq {
namespace {

// 32 inputs. Bytes loaded from memory are widened in order: `low` has inputs 0-15, `high` 16-31. Bytes put together
// in a register are cheaper to unpack lane by lane: then (kInterleaved) `low` has inputs 0-7 and 16-23, `high` the
// others. Rounded x has the same order, so only sums ever meet.
struct Block {
  I16 low, high;
};

#ifdef AUTOQ_AVX2

constexpr bool kLaneByLane = true;

inline Block unpack(__m256i bytes, __m256i upper) {
  return {_mm256_unpacklo_epi8(bytes, upper), _mm256_unpackhi_epi8(bytes, upper)};
}
inline __m128i load_16_bytes(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

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

// Planes as 32 bytes in the order of the inputs.
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
  return {_mm256_sign_epi16(magnitude.low, sign.low), _mm256_sign_epi16(magnitude.high, sign.high)};
}

#else  // portable: the layout's definition, element by element, always in order

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

#endif

// Neighbouring rows of a weight. `kUnit` is what one step of the whole numbers is worth.
template <int kBits>
struct Plane {  // the plane of kBits, whose codes start `before` bits into a weight's planes
  const uint8_t* first;
  int64_t stride;
  Plane(const Packed& w, int64_t n, int64_t before)
      : first(w.codes + w.k_padded / 8 * (before * w.n + kBits * n)), stride(w.k_padded / 8 * kBits) {
    // GCC 12 would otherwise step through one plane by an address in the other (ivopts), lose sight of what a loop
    // over two planes writes to, and drop the loop. The statement hides how the pointer was made.
    asm("" : "+r"(first));
  }
  const uint8_t* at(int64_t r, uint64_t block) const { return first + r * stride + block * (4 * kBits); }
};

struct Int8Rows {
  static constexpr float kUnit = 1.0f;
  static constexpr bool kGrouped = false, kInterleaved = false;
  const uint8_t* first;
  int64_t stride;
  Int8Rows(const Packed& w, int64_t n) : first(w.codes + n * w.k), stride(w.k) {}
  // May read up to 31 bytes of what follows the row; x is zero there, and the buffer goes on.
  Block operator()(int64_t r, uint64_t block) const { return bytes_i8(first + r * stride + block * kBlock); }
};

template <int kBits>
struct AffineRows {
  static constexpr float kUnit = 1.0f;
  static constexpr bool kGrouped = true, kInterleaved = kLaneByLane && kBits != 4 && kBits != 8;
  static constexpr int kLow = kBits == 3 ? 2 : kBits == 8 ? 8 : 4;        // bits of the first plane
  static constexpr int kHigh = kBits == kLow ? kBits : kBits - kLow;  // of the second; unused where there is one
  Plane<kLow> low;
  Plane<kHigh> high;
  AffineRows(const Packed& w, int64_t n) : low(w, n, 0), high(w, n, kLow) {}
  Block operator()(int64_t r, uint64_t block) const {
    if constexpr (kBits == 8) return bytes_u8(low.at(r, block));
    if constexpr (kBits == 6) return codes6(low.at(r, block), high.at(r, block));
    if constexpr (kBits == 5) return codes5(low.at(r, block), high.at(r, block));
    if constexpr (kBits == 4) return codes4(low.at(r, block));
    if constexpr (kBits == 3) return codes3(low.at(r, block), high.at(r, block));
  }
};

template <Kind kKind>
struct Fp6Rows {
  static constexpr float kUnit = kKind == Kind::kFp6E3M2 ? 1.0f / 16 : 1.0f / 8;
  static constexpr bool kGrouped = false, kInterleaved = kLaneByLane;
  Plane<4> low;
  Plane<2> high;
  Fp6Rows(const Packed& w, int64_t n) : low(w, n, 0), high(w, n, 4) {}
  Block operator()(int64_t r, uint64_t block) const {
    if constexpr (kKind == Kind::kFp6E3M2) return fp6_e3m2(low.at(r, block), high.at(r, block));
    return fp6_e2m3(low.at(r, block), high.at(r, block));
  }
};

// Calls f.template operator()<Rows>() with the decoder of this weight.
template <class F>
void with_rows_type(const Packed& w, F&& f) {
  switch (w.kind) {
    case Kind::kDense: return;
    case Kind::kInt8: return f.template operator()<Int8Rows>();
    case Kind::kFp6E3M2: return f.template operator()<Fp6Rows<Kind::kFp6E3M2>>();
    case Kind::kFp6E2M3: return f.template operator()<Fp6Rows<Kind::kFp6E2M3>>();
    case Kind::kAffine: break;
  }
  switch (w.bits) {
    case 3: return f.template operator()<AffineRows<3>>();
    case 4: return f.template operator()<AffineRows<4>>();
    case 5: return f.template operator()<AffineRows<5>>();
    case 6: return f.template operator()<AffineRows<6>>();
    default: return f.template operator()<AffineRows<8>>();
  }
}

}  // namespace
}  // namespace autoq
