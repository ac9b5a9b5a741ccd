// The float weight back from its codes, row by row.
#include <algorithm>

#include "decode.h"
#include "scalar.h"

namespace autoq {
namespace {

struct Factors {
  float scale, minimum;
};

// Of the codes of row n in group g.
template <class Rows>
Factors factors(const Packed& w, int64_t n, int64_t g) {
  if (!w.affine()) return {static_cast<const float*>(w.scale)[n] * Rows::kUnit, 0.0f};
  const float row = w.row_scale ? w.row_scale[n] : 1.0f;
  const float scale = half_to_float(static_cast<const uint16_t*>(w.scale)[n * w.groups + g]);
  return {scale * row, w.minimum ? half_to_float(w.minimum[n * w.groups + g]) * row : 0.0f};
}

// 32 weights in the order of the inputs
template <class Rows>
inline void dequantize_block(const Block& q, F32 scale, F32 minimum, float* out) {
  for (int part = 0; part < kParts; ++part) {
    const int low = 2 * part, high = low + 1;  // of four vectors, the middle ones may have changed places
    const int low_place = Rows::kInterleaved && low == 2 ? 1 : low, high_place = Rows::kInterleaved && high == 1 ? 2 : high;
    store_f32(out + low_place * kFloats, fma(widen_low(q.part[part]), scale, minimum));
    store_f32(out + high_place * kFloats, fma(widen_high(q.part[part]), scale, minimum));
  }
}

template <class Out>
inline void copy(const float* v, const float* column_scale, int64_t count, Out* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = static_cast<Out>(column_scale ? v[j] * column_scale[j] : v[j]);
}

template <class Rows, class Out>
void dequantize_row(const Packed& w, int64_t n, Out* out) {
  const Rows rows(w, n);
  const int64_t group = w.affine() ? w.group_size : round_up(w.k, kBlock);
  const bool direct = std::is_same_v<Out, float> && !w.column_scale;
  alignas(64) float v[kBlock];
  for (int64_t k = 0, g = 0; k < w.k; ++g) {
    const Factors f = factors<Rows>(w, n, g);
    const F32 scale = splat(f.scale), minimum = splat(f.minimum);
    for (const int64_t stop = std::min(k + group, w.k); k < stop; k += kBlock) {
      const Block q = rows(0, k / kBlock);
      const int64_t count = std::min(w.k - k, kBlock);
      if (direct && count == kBlock) {
        dequantize_block<Rows>(q, scale, minimum, reinterpret_cast<float*>(out + k));
        continue;
      }
      dequantize_block<Rows>(q, scale, minimum, v);
      copy(v, w.column_scale ? w.column_scale + k : nullptr, count, out + k);
    }
  }
}

}  // namespace

void convert(Typed from, int64_t start, int64_t count, Typed out) {
  with_type(out, [&](auto* to) {
    int64_t i = 0;
    if constexpr (std::is_same_v<decltype(to), float*>) {
      const uint16_t* p = static_cast<const uint16_t*>(from.data) + start;
      if (from.dtype == DType::kHalf) {
        for (; i + kFloats <= count; i += kFloats) store_f32(to + i, load_half(p + i));
      } else if (from.dtype == DType::kBFloat16) {
        for (; i + kFloats <= count; i += kFloats) store_f32(to + i, load_bf16(p + i));
      }
    }
    for (; i < count; ++i) to[i] = static_cast<std::decay_t<decltype(*to)>>(load(from, start + i));
  });
}

void dequantize(const Packed& w, int64_t begin, int64_t end, Typed out) {
  if (w.kind == Kind::kDense) {
    convert(w.dense(), begin * w.k, (end - begin) * w.k, out);
    return;
  }
  with_rows_type(w, [&]<class Rows>() {
    with_type(out, [&](auto* first) {
      for (int64_t n = begin; n < end; ++n) dequantize_row<Rows>(w, n, first + (n - begin) * w.k);
    });
  });
}

}  // namespace autoq
