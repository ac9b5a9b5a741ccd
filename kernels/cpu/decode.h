// A row of codes, 32 inputs at a time, as 2 × 16 int16 in the order of the inputs. Whole numbers in every kind:
// fp6 values are multiples of their smallest step (1/16 or 1/8), so their products with int16 x sum exactly too.
#pragma once

#include "packed.h"
#include "vec.h"

namespace autoq {
namespace {

// 32 inputs in their order, unless the rows say kInterleaved: bytes put together in an AVX2 register are cheaper to
// unpack lane by lane, and then the first vector has inputs 0-7 and 16-23, the second the others. Rounded x has the
// same order, so only sums ever meet.
struct Block {
  I16 part[kParts];
};

}  // namespace
}  // namespace autoq

#if defined(AUTOQ_AVX512)
#include "decode_avx512.h"
#elif defined(AUTOQ_AVX2)
#include "decode_avx2.h"
#else
#include "decode_portable.h"
#endif

namespace autoq {
namespace {

// Neighbouring rows of a weight. `kUnit` is what one step of the whole numbers is worth. `prefetch(r, block)` fetches a
// cache line of each plane that row r (which may lie behind the weight) will be read from; kLineBlocks fit into one.
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
  void prefetch(int64_t r, uint64_t block) const { __builtin_prefetch(at(r, block)); }
};

struct Int8Rows {
  static constexpr float kUnit = 1.0f;
  static constexpr bool kGrouped = false, kInterleaved = false;
  const uint8_t* first;
  int64_t stride;
  Int8Rows(const Packed& w, int64_t n) : first(w.codes + n * w.k), stride(w.k) {}
  // May read up to 31 bytes of what follows the row; x is zero there, and the buffer goes on.
  Block operator()(int64_t r, uint64_t block) const { return bytes_i8(first + r * stride + block * kBlock); }
#ifdef AUTOQ_DOT8
  void bytes(uint64_t block, uint8_t* out) const { store_offset_by_128(first + block * kBlock, out); }
#endif
  static constexpr uint64_t kLineBlocks = 2;
  void prefetch(int64_t r, uint64_t block) const { __builtin_prefetch(first + r * stride + block * kBlock); }
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
#if defined(AUTOQ_DOT8) || defined(AUTOQ_PAIRS8)
  void bytes(uint64_t block, uint8_t* out) const { store_nibbles(low.at(0, block), out); }  // 4 bits only
#endif
  static constexpr uint64_t kLineBlocks = 16 / kLow;
  void prefetch(int64_t r, uint64_t block) const {
    low.prefetch(r, block);
    if constexpr (kHigh != kBits) high.prefetch(r, block);
  }
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
  static constexpr uint64_t kLineBlocks = 4;
  void prefetch(int64_t r, uint64_t block) const {
    low.prefetch(r, block);
    high.prefetch(r, block);
  }
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
