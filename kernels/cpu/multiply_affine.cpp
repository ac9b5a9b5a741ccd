// Kernels of affine weights.
#include "multiply.h"

namespace autoq {

void multiply_affine(const Packed& w, const Activation& a, Typed bias, Typed y, int64_t begin, int64_t end) {
#if defined(AUTOQ_DOT8) || defined(AUTOQ_PAIRS8)
  if (a.bytes) return Gemm<AffineRows<4>, Bytes, 1, false>(w, a, bias, y).run(begin, end);
#endif
  switch (w.bits) {
    case 3: return multiply_rows<AffineRows<3>>(w, a, bias, y, begin, end);
    case 4: return multiply_rows<AffineRows<4>>(w, a, bias, y, begin, end);
    case 5: return multiply_rows<AffineRows<5>>(w, a, bias, y, begin, end);
    case 6: return multiply_rows<AffineRows<6>>(w, a, bias, y, begin, end);
    default: return multiply_rows<AffineRows<8>>(w, a, bias, y, begin, end);
  }
}

}  // namespace autoq
