// Kernels of weights with a scale per row, and the choice among all kinds.
#include "multiply.h"

namespace autoq {

int64_t row_unit(const Activation& a) { return a.m <= kFewRows && !a.bytes ? kCachedRows : kN; }

void multiply(const Packed& w, const Activation& a, Typed bias, Typed y, int64_t begin, int64_t end) {
  if (w.affine()) return multiply_affine(w, a, bias, y, begin, end);
#ifdef AUTOQ_DOT8
  if (a.bytes) return Gemm<Int8Rows, Bytes, 1, true>(w, a, bias, y).run(begin, end);
#endif
  switch (w.kind) {
    case Kind::kFp6E3M2: return multiply_rows<Fp6Rows<Kind::kFp6E3M2>>(w, a, bias, y, begin, end);
    case Kind::kFp6E2M3: return multiply_rows<Fp6Rows<Kind::kFp6E2M3>>(w, a, bias, y, begin, end);
    default: return multiply_rows<Int8Rows>(w, a, bias, y, begin, end);
  }
}

}  // namespace autoq
