// The kernel for a decoder of rows and a number of rows of x.
#pragma once

#include "gemm.h"

namespace autoq {

// The same as multiply for an affine weight, which is compiled by itself: half of the compiler's work.
void multiply_affine(const Packed& w, const Activation& a, Typed bias, Typed y, int64_t begin, int64_t end);

namespace {

template <class Rows, int kPlanes>
void multiply_planes(const Packed& w, const Activation& a, Typed bias, Typed y, int64_t begin, int64_t end) {
  static_assert(kFewRows == 4);
  switch (a.m) {
    case 1: return gemv<Rows, kPlanes, 1>(w, a, bias, y, begin, end);
    case 2: return gemv<Rows, kPlanes, 2>(w, a, bias, y, begin, end);
    case 3: return gemv<Rows, kPlanes, 3>(w, a, bias, y, begin, end);
    case 4: return gemv<Rows, kPlanes, 4>(w, a, bias, y, begin, end);
    default: return Gemm<Rows, Shorts, kPlanes, false>(w, a, bias, y).run(begin, end);
  }
}

template <class Rows>
void multiply_rows(const Packed& w, const Activation& a, Typed bias, Typed y, int64_t begin, int64_t end) {
  a.planes == 2 ? multiply_planes<Rows, 2>(w, a, bias, y, begin, end)
                : multiply_planes<Rows, 1>(w, a, bias, y, begin, end);
}

}  // namespace
}  // namespace autoq
