// Picks the kernel of a weight's kind and the number of rows.
#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "gemm.h"

namespace autoq {
namespace {

template <class Rows, int kPlanes>
void multiply_as(const Packed& w, const Activation& a, Typed bias, Typed y, int64_t begin, int64_t end) {
  if (a.m == 1) {
    gemv<Rows, kPlanes>(w, a, bias, y, begin, end);
  } else {
    Gemm<Rows, kPlanes, false>(w, a, bias, y).run(begin, end);
  }
}

}  // namespace

void multiply(const Packed& w, const Activation& a, Typed bias, Typed y, int64_t begin, int64_t end) {
  if (w.dynamic() && a.m > 1) {
    Gemm<Int8Rows, 1, true>(w, a, bias, y).run(begin, end);
    return;
  }
  with_rows_type(w, [&]<class Rows>() {
    a.planes == 2 ? multiply_as<Rows, 2>(w, a, bias, y, begin, end)
                  : multiply_as<Rows, 1>(w, a, bias, y, begin, end);
  });
}

}  // namespace autoq
