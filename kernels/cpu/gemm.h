// Several rows of x: a panel of weight rows is decoded to int16 once per block of x rows, then multiplied in
// register tiles. x scales and weight scales enter per block of inputs, when int32 sums become float.
#pragma once

#include "gemv.h"

namespace autoq {
namespace {

constexpr int kTileN = 4;
#ifdef __AVX512VNNI__
constexpr int kTileSums = 16;  // 32 vector registers
#else
constexpr int kTileSums = 8;
#endif
constexpr int64_t kChunk = 1024;             // inputs decoded at a time: 4 rows of int16 stay in the L1 cache
constexpr int64_t kRowBlockBytes = 1 << 18;  // x rows worked on together: half of a small L2 cache

struct Tile {             // where a tile reads
  const int16_t* x;       // first x row, first input of the chunk
  int64_t x_stride;       // between x rows
  int64_t plane_stride;   // between the planes of x
  const float* x_scale;   // [rows, blocks] at the chunk's first block
  const float* w_scale;   // [kTileN, blocks] likewise; null where the weight has no groups
  int64_t scale_stride;   // between rows of the scales
  const int16_t* panel;   // [kTileN, kChunk]
  int64_t count, block;   // inputs in the chunk, inputs in a block
};

// acc[m][n] += products of kM rows of x with the panel over inputs [start, stop), a multiple of 32
template <int kM, int kPlanes>
inline __attribute__((always_inline)) void add_products(const Tile& t, int64_t start, int64_t stop,
                                                        I32 (&acc)[kM][kPlanes][kTileN]) {
  for (int64_t begin = start; begin < stop; begin += kBlock) {
    for (int64_t k = begin; k < begin + kBlock; k += 16) {
      I16 w[kTileN];
      for (int n = 0; n < kTileN; ++n) w[n] = load_i16(t.panel + n * kChunk + k);
      for (int m = 0; m < kM; ++m) {
        for (int p = 0; p < kPlanes; ++p) {
          const I16 x = load_i16(t.x + m * t.x_stride + p * t.plane_stride + k);
          for (int n = 0; n < kTileN; ++n) acc[m][p][n] = madd(acc[m][p][n], w[n], x);
        }
      }
    }
  }
}

template <int kCount>
inline void clear(I32* acc) {
  for (int i = 0; i < kCount; ++i) acc[i] = zero_i32();
}

// sums[kM][kTileN] += scaled products over the chunk
template <int kM, int kPlanes, bool kGrouped>
void tile_scaled(const Tile& t, float* sums) {
  F32 total[kM][kTileN];
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kTileN; ++n) total[m][n] = zero_f32();
  }
  for (int64_t start = 0, b = 0; start < t.count; start += t.block, ++b) {
    I32 acc[kM][kPlanes][kTileN];
    clear<kM * kPlanes * kTileN>(&acc[0][0][0]);
    add_products<kM, kPlanes>(t, start, std::min(start + t.block, t.count), acc);
    for (int m = 0; m < kM; ++m) {
      const F32 x_scale = splat(t.x_scale[m * t.scale_stride + b]);
      for (int n = 0; n < kTileN; ++n) {
        F32 value = to_float(acc[m][0][n]);
        if constexpr (kPlanes == 2) value = fma(to_float(acc[m][1][n]), splat(1.0f / 32768), value);
        if constexpr (kGrouped) value = mul(value, splat(t.w_scale[n * t.scale_stride + b]));
        total[m][n] = fma(value, x_scale, total[m][n]);
      }
    }
  }
  for (int m = 0; m < kM; ++m) add_lane_sums(total[m], sums + m * kTileN);
}

// sums[kM][kTileN] += products over the chunk, exactly
template <int kM>
void tile_exact(const Tile& t, int32_t* sums) {
  I32 acc[kM][1][kTileN];
  clear<kM * kTileN>(&acc[0][0][0]);
  add_products<kM, 1>(t, 0, t.count, acc);
  for (int m = 0; m < kM; ++m) add_lane_sums(acc[m][0], sums + m * kTileN);
}

// Codes [n, n + kTileN) × [start, start + count) as int16; rows from `end` on repeat the last one.
template <class Rows>
void decode_panel(const Packed& w, int64_t n, int64_t end, int64_t start, int64_t count, int16_t* panel) {
  const uint64_t first = start / kBlock, blocks = count / kBlock;
  for (int r = 0; r < kTileN; ++r) {
    const Rows rows(w, std::min(n + r, end - 1));
    int16_t* out = panel + r * kChunk;
    for (uint64_t i = 0; i < blocks; ++i, out += kBlock) {
      const Block q = rows(0, first + i);
      store_i16(out, q.low);
      store_i16(out + 16, q.high);
    }
  }
}

// The float form of what the panel's rows have per group, with rows from `end` on repeated.
struct PanelGroups {
  float* scale;    // [kTileN, blocks of x]
  float* minimum;  // [kTileN, round_up(G, 8)], zero in the pads

  void fill(const Packed& w, const Activation& a, int64_t n, int64_t end) const {
    const int64_t per_group = w.group_size / a.block, stride = round_up(w.groups, 8);
    for (int r = 0; r < kTileN; ++r) {
      const int64_t row = std::min(n + r, end - 1) * w.groups;
      const uint16_t* half = static_cast<const uint16_t*>(w.scale) + row;
      for (int64_t b = 0; b < a.blocks; ++b) scale[r * a.blocks + b] = half_to_float(half[b / per_group]);
      if (!w.minimum) continue;
      for (int64_t g = 0; g < w.groups; ++g) minimum[r * stride + g] = half_to_float(w.minimum[row + g]);
      for (int64_t g = w.groups; g < stride; ++g) minimum[r * stride + g] = 0.0f;
    }
  }

  // sums[kTileN] += minimum[n, g] · (sum of an x row over group g)
  void add_minimum(const Packed& w, const float* group_sum, float* sums) const {
    F32 total[kTileN] = {zero_f32(), zero_f32(), zero_f32(), zero_f32()};
    const int64_t stride = round_up(w.groups, 8);
    for (int64_t g = 0; g < stride; g += 8) {
      const F32 x = load_f32(group_sum + g);
      for (int r = 0; r < kTileN; ++r) total[r] = fma(load_f32(minimum + r * stride + g), x, total[r]);
    }
    add_lane_sums(total, sums);
  }
};

template <class Rows, int kPlanes, bool kExact>
class Gemm {
 public:
  Gemm(const Packed& w, const Activation& a, Typed bias, Typed y) : w_(w), a_(a), bias_(bias), y_(y) {
    const int64_t fit = kRowBlockBytes / (a.k_padded * 2 * kPlanes);
    m_block_ = std::min(a.m, std::max<int64_t>(kTileM, fit / kTileM * kTileM));
    chunk_ = kExact ? kChunk : kChunk / a.block * a.block;
  }

  // Columns [begin, end) of y.
  void run(int64_t begin, int64_t end) {
    thread_local Scratch<int16_t> panel_memory;
    thread_local Scratch<float> group_memory;
    thread_local Scratch<Sum> sum_memory;
    panel_ = panel_memory.reserve(kTileN * kChunk);
    sums_ = sum_memory.reserve(m_block_ * kTileN);
    if constexpr (Rows::kGrouped) {
      groups_.scale = group_memory.reserve(kTileN * (a_.blocks + round_up(w_.groups, 8)));
      groups_.minimum = groups_.scale + kTileN * a_.blocks;
    }
    for (int64_t m = 0; m < a_.m; m += m_block_) {
      const int64_t rows = std::min(m_block_, a_.m - m);
      for (int64_t n = begin; n < end; n += kTileN) {
        std::fill(sums_, sums_ + rows * kTileN, Sum{0});
        if constexpr (Rows::kGrouped) groups_.fill(w_, a_, n, end);
        for (int64_t start = 0; start < a_.k_padded; start += chunk_) {
          const int64_t count = std::min(chunk_, a_.k_padded - start);
          decode_panel<Rows>(w_, n, end, start, count, panel_);
          multiply_panel(m, rows, start, count);
        }
        with_type(y_, [&](auto* y) { write(m, rows, n, std::min<int64_t>(kTileN, end - n), y); });
      }
    }
  }

 private:
  using Sum = std::conditional_t<kExact, int32_t, float>;
  static constexpr int kTileM = kTileSums / (kTileN * kPlanes);

  void multiply_panel(int64_t m, int64_t rows, int64_t start, int64_t count) const {
    const int64_t block = start / a_.block;
    Tile t{a_.values + m * a_.k_padded + start, a_.k_padded, a_.m * a_.k_padded, a_.scale + m * a_.blocks + block,
           Rows::kGrouped ? groups_.scale + block : nullptr, a_.blocks, panel_, count, a_.block};
    Sum* sums = sums_;
    for (int64_t i = 0; i < rows;) {
      const int step = i + kTileM <= rows ? kTileM : 1;
      if constexpr (kExact) {
        step == kTileM ? tile_exact<kTileM>(t, sums) : tile_exact<1>(t, sums);
      } else {
        step == kTileM ? tile_scaled<kTileM, kPlanes, Rows::kGrouped>(t, sums)
                       : tile_scaled<1, kPlanes, Rows::kGrouped>(t, sums);
      }
      i += step;
      t.x += step * t.x_stride;
      t.x_scale += step * t.scale_stride;
      sums += step * kTileN;
    }
  }

  template <class Out>
  void write(int64_t m, int64_t rows, int64_t n, int64_t columns, Out* y) const {
    float factor[kTileN], offset[kTileN];
    for (int64_t c = 0; c < columns; ++c) {
      factor[c] = row_factor<Rows>(w_, n + c);
      offset[c] = bias_.data ? load(bias_, n + c) : 0.0f;
    }
    for (int64_t i = 0; i < rows; ++i) {
      Sum* sums = sums_ + i * kTileN;
      if constexpr (Rows::kGrouped) {
        if (w_.minimum) groups_.add_minimum(w_, a_.group_sum + (m + i) * a_.sum_stride, sums);
      }
      const float x_scale = kExact ? a_.scale[m + i] : 1.0f;
      Out* out = y + (m + i) * w_.n + n;
      for (int64_t c = 0; c < columns; ++c) {
        out[c] = static_cast<Out>(static_cast<float>(sums[c]) * x_scale * factor[c] + offset[c]);
      }
    }
  }

  const Packed& w_;
  const Activation& a_;
  Typed bias_, y_;
  int64_t m_block_, chunk_;
  int16_t* panel_;
  Sum* sums_;
  PanelGroups groups_;
};

}  // namespace
}  // namespace autoq
