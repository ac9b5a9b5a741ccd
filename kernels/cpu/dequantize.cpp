// The float weight back from its codes, row by row.
#include "decode.h"
#include "scalar.h"

namespace autoq {
namespace {

struct Factors {
  float scale, minimum;
};

template <class Rows>
Factors factors(const Packed& w, int64_t n, int64_t g) {
  if (!w.affine()) return {static_cast<const float*>(w.scale)[n] * Rows::kUnit, 0.0f};
  const float row = w.row_scale ? w.row_scale[n] : 1.0f;
  const float scale = half_to_float(static_cast<const uint16_t*>(w.scale)[n * w.groups + g]);
  return {scale * row, w.minimum ? half_to_float(w.minimum[n * w.groups + g]) * row : 0.0f};
}

void store_block(const float* v, int64_t count, Typed out, int64_t at) {
  if (out.dtype == DType::kFloat) {
    std::memcpy(static_cast<float*>(out.data) + at, v, count * sizeof(float));
    return;
  }
  for (int64_t j = 0; j < count; ++j) store(out, at + j, v[j]);
}

template <class Rows>
void dequantize_row(const Packed& w, int64_t n, Typed out, int64_t at) {
  const Rows rows(w, n);
  const int64_t group = w.affine() ? w.group_size : round_up(w.k, kBlock);
  float v[kBlock];
  for (int64_t k = 0, g = 0; k < w.k; ++g) {
    const Factors f = factors<Rows>(w, n, g);
    const F32 scale = splat(f.scale), minimum = splat(f.minimum);
    for (const int64_t stop = k + group; k < w.k && k < stop; k += kBlock) {
      const Block q = rows(0, k / kBlock);
      store_f32(v, fma(widen_low(q.low), scale, minimum));
      store_f32(v + (Rows::kInterleaved ? 16 : 8), fma(widen_high(q.low), scale, minimum));
      store_f32(v + (Rows::kInterleaved ? 8 : 16), fma(widen_low(q.high), scale, minimum));
      store_f32(v + 24, fma(widen_high(q.high), scale, minimum));
      const int64_t count = w.k - k < kBlock ? w.k - k : kBlock;
      if (w.column_scale) {
        for (int64_t j = 0; j < count; ++j) v[j] *= w.column_scale[k + j];
      }
      store_block(v, count, out, at + k);
    }
  }
}

}  // namespace

void dequantize(const Packed& w, int64_t begin, int64_t end, Typed out) {
  with_rows_type(w, [&]<class Rows>() {
    for (int64_t n = begin; n < end; ++n) dequantize_row<Rows>(w, n, out, (n - begin) * w.k);
  });
}

}  // namespace autoq
