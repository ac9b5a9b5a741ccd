// A float weight of two bytes an element and a few rows of x, from memory: stock kernels read bfloat16 at a third of
// the memory's speed, and a comparison with them would credit quantization with what a better loop gives.
#include <algorithm>

#include "scalar.h"
#include "vec.h"

namespace autoq {
namespace {

constexpr int kRows = 4;                       // of the weight, worked on together
constexpr int kMostX = kFloats == 16 ? 6 : 2;  // rows of x likewise; their sums stay in registers
constexpr int64_t kChunk = 1024;               // inputs whose weights stay in the L1 cache for all rows of x
constexpr int64_t kLine = 32;                  // weights in a cache line

template <bool kHalf>
inline F32 load_weight(const uint16_t* p) {
  if constexpr (kHalf) return load_half(p);
  return load_bf16(p);
}

// sums[m · kRows + r] += W[n + r, start:stop] · x[m, start:stop]; x is float, rows `stride` apart. `fetch` the weights
// that come next from memory.
template <bool kHalf, int kM, int kCount>
void add_tile(const uint16_t* w, int64_t w_stride, const float* x, int64_t stride, int64_t count, bool fetch, float* sums) {
  F32 acc[kM][kCount];
  for (int m = 0; m < kM; ++m) {
    for (int r = 0; r < kCount; ++r) acc[m][r] = zero_f32();
  }
  int64_t k = 0;
  for (; k + kFloats <= count; k += kFloats) {
    if (fetch && k % kLine == 0) {
      for (int r = 0; r < kCount; ++r) __builtin_prefetch(w + (r + kCount) * w_stride + k);
    }
    F32 weight[kCount];
    for (int r = 0; r < kCount; ++r) weight[r] = load_weight<kHalf>(w + r * w_stride + k);
    for (int m = 0; m < kM; ++m) {
      const F32 x_part = load_f32(x + m * stride + k);
      for (int r = 0; r < kCount; ++r) acc[m][r] = fma(weight[r], x_part, acc[m][r]);
    }
  }
  if (k < count) {  // what lies behind may be NaN
    const F32 lanes = first_lanes(count - k);
    for (int r = 0; r < kCount; ++r) {
      const F32 weight = keep(load_weight<kHalf>(w + r * w_stride + k), lanes);
      for (int m = 0; m < kM; ++m) acc[m][r] = fma(weight, load_f32(x + m * stride + k), acc[m][r]);
    }
  }
  for (int m = 0; m < kM; ++m) {
    for (int r = 0; r < kCount; ++r) sums[m * kRows + r] += lane_sum(acc[m][r]);
  }
}

template <bool kHalf, int kM>
void add_rows(const uint16_t* w, int64_t w_stride, const float* x, int64_t stride, int64_t count, int rows, bool fetch,
              float* sums) {
  if (rows == kRows) return add_tile<kHalf, kM, kRows>(w, w_stride, x, stride, count, fetch, sums);
  for (int r = 0; r < rows; ++r) add_tile<kHalf, kM, 1>(w + r * w_stride, w_stride, x, stride, count, fetch, sums + r);
}

template <bool kHalf>
void multiply_rows(const Packed& w, const float* x, int64_t stride, int64_t m, Typed bias, Typed y, int64_t begin, int64_t end) {
  const uint16_t* weight = reinterpret_cast<const uint16_t*>(w.codes);
  for (int64_t n = begin; n < end; n += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, end - n));
    float sums[kDenseRows * kRows] = {};
    for (int64_t start = 0; start < w.k; start += kChunk) {
      const int64_t count = std::min(kChunk, w.k - start);
      const uint16_t* part = weight + n * w.k + start;
      for (int64_t i = 0; i < m;) {
        const float* from = x + i * stride + start;
        float* to = sums + i * kRows;
        if (i + kMostX <= m) {
          add_rows<kHalf, kMostX>(part, w.k, from, stride, count, rows, i == 0, to);
          i += kMostX;
        } else if (i + 2 <= m) {
          add_rows<kHalf, 2>(part, w.k, from, stride, count, rows, i == 0, to);
          i += 2;
        } else {
          add_rows<kHalf, 1>(part, w.k, from, stride, count, rows, i == 0, to);
          i += 1;
        }
      }
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int r = 0; r < rows; ++r) {
        store(y, i * w.n + n + r, sums[i * kRows + r] + (bias.data ? load(bias, n + r) : 0.0f));
      }
    }
  }
}

}  // namespace

void multiply_dense(const Packed& w, const float* x, int64_t stride, int64_t m, Typed bias, Typed y, int64_t begin, int64_t end) {
  w.bits == 17 ? multiply_rows<true>(w, x, stride, m, bias, y, begin, end)
               : multiply_rows<false>(w, x, stride, m, bias, y, begin, end);
}

}  // namespace autoq
