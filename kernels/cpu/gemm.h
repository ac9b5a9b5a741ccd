// Many rows of x: codes of kN rows of the weight are decoded once per block of x rows into a panel that stays in the
// L1 cache, turned so that a vector holds one step of kFloats different weight rows, and multiplied in register tiles
// by steps of x broadcast to all lanes. A lane is one output: no sums over lanes, and scales enter once per block of
// inputs, when whole numbers become float.
//
// A step is a dword: two int16 inputs, or four bytes where x is int8 and the build multiplies bytes.
#pragma once

#include "gemv.h"

namespace autoq {
namespace {

constexpr int kVectors = 2;                       // of weight rows in a panel
constexpr int kN = kVectors * kFloats;            // weight rows in a panel
constexpr int64_t kPanelBytes = 16 << 10;         // half of a small L1 cache
constexpr int64_t kRowBlockBytes = 1 << 20;       // x rows worked on together; beyond L2 they stream, as each step
                                                  // of them serves kN outputs

struct Tile {                // where a tile reads and adds
  const uint8_t* x;          // first x row, first step of the chunk
  int64_t x_stride;          // bytes between x rows
  int64_t plane_stride;      // bytes between the planes of x
  const float* x_scale;      // [rows, blocks] at the chunk's first block
  int64_t scale_stride;      // between rows of x_scale
  const float* x_sum;        // [rows, blocks] at the chunk's first block, or null
  int64_t sum_stride;        // between rows of x_sum
  const float* w_scale;      // [blocks, kN], or null where the weight has no groups
  const float* w_minimum;    // likewise
  const uint8_t* panel;      // [steps, kN] dwords
  int64_t steps, block;      // in the chunk, in a block
};

inline int32_t dword(const uint8_t* p) {
  int32_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

struct Shorts {
  static constexpr int kInputs = 2;  // in a step
  static constexpr bool kBytes = false;
  template <int kPlanes>
  static constexpr int rows() { return (kShorts == 32 ? 8 : 4) / kPlanes; }

  template <int kM, int kPlanes>
  static inline __attribute__((always_inline)) void add(const Tile& t, int64_t begin, int64_t end,
                                                        I32 (&acc)[kM][kPlanes][kVectors]) {
    for (int64_t s = begin; s < end; ++s) {
      I16 w[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        w[v] = load_i16(reinterpret_cast<const int16_t*>(t.panel + (s * kVectors + v) * sizeof(I16)));
      }
      for (int m = 0; m < kM; ++m) {
        for (int p = 0; p < kPlanes; ++p) {
          const I16 x = broadcast(dword(t.x + m * t.x_stride + p * t.plane_stride + 4 * s));
          for (int v = 0; v < kVectors; ++v) acc[m][p][v] = madd(acc[m][p][v], w[v], x);
        }
      }
    }
  }
};

#if defined(AUTOQ_DOT8)
struct Bytes {
  static constexpr int kInputs = 4;
  static constexpr bool kBytes = true;
  template <int kPlanes>
  static constexpr int rows() { return kShorts == 32 ? 8 : 4; }

  template <int kM, int kPlanes>
  static inline __attribute__((always_inline)) void add(const Tile& t, int64_t begin, int64_t end,
                                                        I32 (&acc)[kM][kPlanes][kVectors]) {
    for (int64_t s = begin; s < end; ++s) {
      I32 w[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        w[v] = load_i32(reinterpret_cast<const int32_t*>(t.panel + (s * kVectors + v) * sizeof(I32)));
      }
      for (int m = 0; m < kM; ++m) {
        const I32 x = broadcast(dword(t.x + m * t.x_stride + 4 * s));
        for (int v = 0; v < kVectors; ++v) acc[m][0][v] = dot8(acc[m][0][v], w[v], x);
      }
    }
  }
};
#elif defined(AUTOQ_PAIRS8)
// Codes up to 15: a pair is at most 2·15·127, so that eight of them add up in int16.
struct Bytes {
  static constexpr int kInputs = 4;
  static constexpr bool kBytes = true;
  static constexpr int kSteps = 8;  // in a block of 32 inputs
  template <int kPlanes>
  static constexpr int rows() { return 3; }

  template <int kM, int kPlanes>
  static inline __attribute__((always_inline)) void add(const Tile& t, int64_t begin, int64_t end,
                                                        I32 (&acc)[kM][kPlanes][kVectors]) {
    const I16 ones = broadcast(0x00010001);
    for (int64_t s = begin; s < end; s += kSteps) {
      I16 sum[kM][kVectors];
      for (int m = 0; m < kM; ++m) {
        for (int v = 0; v < kVectors; ++v) sum[m][v] = zero_i32();
      }
      for (int i = 0; i < kSteps; ++i) {
        I16 w[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          w[v] = load_i16(reinterpret_cast<const int16_t*>(t.panel + ((s + i) * kVectors + v) * sizeof(I16)));
        }
        for (int m = 0; m < kM; ++m) {
          const I16 x = broadcast(dword(t.x + m * t.x_stride + 4 * (s + i)));
          for (int v = 0; v < kVectors; ++v) sum[m][v] = add_pairs8(sum[m][v], w[v], x);
        }
      }
      for (int m = 0; m < kM; ++m) {
        for (int v = 0; v < kVectors; ++v) acc[m][0][v] = madd(acc[m][0][v], sum[m][v], ones);
      }
    }
  }
};
#endif

// sums[kM][kN] += scaled products over the chunk
template <class Steps, int kPlanes, bool kGrouped, int kM>
void tile_scaled(const Tile& t, float* sums) {
  for (int64_t start = 0, b = 0; start < t.steps; start += t.block, ++b) {
    I32 acc[kM][kPlanes][kVectors];
    for (int i = 0; i < kM * kPlanes * kVectors; ++i) (&acc[0][0][0])[i] = zero_i32();
    Steps::template add<kM, kPlanes>(t, start, std::min(start + t.block, t.steps), acc);
    F32 w_scale[kVectors], w_minimum[kVectors];
    for (int v = 0; v < kVectors && kGrouped; ++v) {
      w_scale[v] = load_f32(t.w_scale + b * kN + v * kFloats);
      w_minimum[v] = load_f32(t.w_minimum + b * kN + v * kFloats);
    }
    for (int m = 0; m < kM; ++m) {
      for (int v = 0; v < kVectors; ++v) {
        float* at = sums + m * kN + v * kFloats;
        F32 value = to_float(acc[m][0][v]), total = load_f32(at);
        if constexpr (kPlanes == 2) value = fma(to_float(acc[m][kPlanes - 1][v]), splat(1.0f / 32768), value);
        if constexpr (kGrouped) total = fma(w_minimum[v], splat(t.x_sum[m * t.sum_stride + b]), total);
        if constexpr (!Steps::kBytes) value = mul(value, splat(t.x_scale[m * t.scale_stride + b]));
        store_f32(at, kGrouped ? fma(value, w_scale[v], total) : add(value, total));
      }
    }
  }
}

// sums[kM][kN] += products over the chunk, exactly
template <class Steps, int kM>
void tile_exact(const Tile& t, int32_t* sums) {
  I32 acc[kM][1][kVectors];
  for (int m = 0; m < kM; ++m) {
    for (int v = 0; v < kVectors; ++v) acc[m][0][v] = load_i32(sums + m * kN + v * kFloats);
  }
  Steps::template add<kM, 1>(t, 0, t.steps, acc);
  for (int m = 0; m < kM; ++m) {
    for (int v = 0; v < kVectors; ++v) store_i32(sums + m * kN + v * kFloats, acc[m][0][v]);
  }
}

// Calls f.template operator()<rows>() with min(rows, kMost).
template <int kMost, class F>
int with_rows(int64_t rows, F&& f) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return with_rows<kMost - 1>(rows, f);
  }
  f.template operator()<kMost>();
  return kMost;
}

// Blocks [first, first + count) of weight rows [n, n + kN) as a panel; rows from `end` on repeat the last one.
// `decoded` is scratch memory for the blocks of kFloats rows.
template <class Rows, class Steps>
void decode_panel(const Packed& w, int64_t n, int64_t end, uint64_t first, uint64_t count, uint8_t* decoded, uint8_t* panel) {
  constexpr int kBlockBytes = 4 * 32 / Steps::kInputs;
  const int64_t row_bytes = count * kBlockBytes;
  for (int v = 0; v < kVectors; ++v) {
    for (int r = 0; r < kFloats; ++r) {
      const Rows rows(w, std::min(n + v * kFloats + r, end - 1));
      uint8_t* out = decoded + r * row_bytes;
      for (uint64_t i = 0; i < count; ++i, out += kBlockBytes) {
        if (i % Rows::kLineBlocks == 0) rows.prefetch(kN, first + i);
        if constexpr (Steps::kBytes) {
          rows.bytes(first + i, out);
        } else {
          const Block q = rows(0, first + i);
          for (int j = 0; j < kParts; ++j) store_i16(reinterpret_cast<int16_t*>(out) + j * kShorts, q.part[j]);
        }
      }
    }
    for (int64_t s = 0; s < row_bytes / 4; s += 8) {
      transpose_dwords(decoded + 4 * s, row_bytes, panel + (s * kVectors + v) * sizeof(I32), kVectors * sizeof(I32));
    }
  }
}

// out[b, r] = half[n + r, (first + b) / per_group] as float for kN weight rows and `count` b, and up to seven b more;
// rows from `end` on repeat the last one. `rows` is scratch memory, [kN, round_up(count, kFloats)].
inline void transpose_groups(const Packed& w, const uint16_t* half, int64_t n, int64_t end, int64_t first,
                             int64_t count, int64_t per_group, float* rows, float* out) {
  const int64_t stride = round_up(count, kFloats);
  for (int r = 0; r < kN; ++r) {
    const uint16_t* from = half + std::min(n + r, end - 1) * w.groups;
    float* to = rows + r * stride;
    if (per_group == 1) {
      for (int64_t b = 0; b < count; b += kFloats) store_f32(to + b, load_half(from + first + b));
    } else {
      for (int64_t b = 0; b < count; ++b) to[b] = half_to_float(from[(first + b) / per_group]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(rows + v * kFloats * stride);
    uint8_t* to = reinterpret_cast<uint8_t*>(out + v * kFloats);
    for (int64_t b = 0; b < count; b += 8) transpose_dwords(from + 4 * b, 4 * stride, to + 4 * b * kN, 4 * kN);
  }
}

inline void store_floats(float* p, F32 v) { store_f32(p, v); }
inline void store_floats(c10::Half* p, F32 v) { store_half(&p->x, v); }
inline void store_floats(c10::BFloat16* p, F32 v) { store_bf16(&p->x, v); }

template <class Rows, class Steps, int kPlanes, bool kExact>
class Gemm {
 public:
  Gemm(const Packed& w, const Activation& a, Typed bias, Typed y) : w_(w), a_(a), bias_(bias), y_(y) {
    row_bytes_ = a.stride * (Steps::kBytes ? 1 : 2);
    m_block_ = std::min(a.m, std::max<int64_t>(kTileM, kRowBlockBytes / (row_bytes_ * kPlanes) / kTileM * kTileM));
    const int64_t fit = kPanelBytes / (kN * 4) * Steps::kInputs;
    const int64_t whole = kExact ? kBlock : a.block;
    chunk_ = std::max(whole, fit / whole * whole);
  }

  // Columns [begin, end) of y.
  void run(int64_t begin, int64_t end) {
    thread_local Scratch<uint8_t> panel_memory;
    thread_local Scratch<float> group_memory;
    thread_local Scratch<Sum> sum_memory;
    const int64_t panel_bytes = chunk_ / Steps::kInputs * kN * 4;
    panel_ = panel_memory.reserve(panel_bytes + panel_bytes / kVectors);
    decoded_ = panel_ + panel_bytes;
    sums_ = sum_memory.reserve(m_block_ * kN);
    if constexpr (Rows::kGrouped) {
      const int64_t size = round_up(chunk_ / a_.block, kFloats) * kN;
      scale_ = group_memory.reserve(3 * size);
      minimum_ = scale_ + size;
      group_rows_ = minimum_ + size;
      if (!w_.minimum) std::fill_n(minimum_, size, 0.0f);
    }
    for (int64_t m = 0; m < a_.m; m += m_block_) {
      const int64_t rows = std::min(m_block_, a_.m - m);
      for (int64_t n = begin; n < end; n += kN) {
        std::fill(sums_, sums_ + rows * kN, Sum{0});
        for (int64_t start = 0; start < a_.k_padded; start += chunk_) {
          add_chunk(m, rows, n, end, start, std::min(chunk_, a_.k_padded - start));
        }
        with_type(y_, [&](auto* y) { write(m, rows, n, std::min<int64_t>(kN, end - n), y); });
      }
    }
  }

 private:
  using Sum = std::conditional_t<kExact, int32_t, float>;
  static constexpr int kTileM = Steps::template rows<kPlanes>();

  void add_chunk(int64_t m, int64_t rows, int64_t n, int64_t end, int64_t start, int64_t count) {
    decode_panel<Rows, Steps>(w_, n, end, start / kBlock, count / kBlock, decoded_, panel_);
    const int64_t block = kExact ? 0 : start / a_.block;
    if constexpr (Rows::kGrouped) {
      const int64_t blocks = (count + a_.block - 1) / a_.block, per_group = w_.group_size / a_.block;
      transpose_groups(w_, static_cast<const uint16_t*>(w_.scale), n, end, block, blocks, per_group, group_rows_, scale_);
      if (w_.minimum) transpose_groups(w_, w_.minimum, n, end, block, blocks, per_group, group_rows_, minimum_);
    }
    Tile t{};
    t.x = a_.raw(m) + start * (Steps::kBytes ? 1 : 2);
    t.x_stride = row_bytes_;
    t.plane_stride = 2 * a_.plane_stride;
    t.x_scale = Steps::kBytes ? nullptr : a_.scale + m * a_.blocks + block;
    t.scale_stride = a_.blocks;
    t.x_sum = Rows::kGrouped ? a_.block_sum + m * a_.sum_stride + block : nullptr;
    t.sum_stride = a_.sum_stride;
    t.w_scale = scale_;
    t.w_minimum = minimum_;
    t.panel = panel_;
    t.steps = count / Steps::kInputs;
    t.block = a_.block / Steps::kInputs;
    for (int64_t i = 0; i < rows;) {
      const int step = with_rows<kTileM>(rows - i, [&]<int kM>() {
        if constexpr (kExact) {
          tile_exact<Steps, kM>(t, sums_ + i * kN);
        } else {
          tile_scaled<Steps, kPlanes, Rows::kGrouped, kM>(t, sums_ + i * kN);
        }
      });
      i += step;
      t.x += step * t.x_stride;
      if (t.x_scale) t.x_scale += step * t.scale_stride;
      if (t.x_sum) t.x_sum += step * t.sum_stride;
    }
  }

  template <class Out>
  void write(int64_t m, int64_t rows, int64_t n, int64_t columns, Out* y) const {
    alignas(64) float factor[kN] = {}, offset[kN] = {};
    for (int64_t c = 0; c < columns; ++c) {
      factor[c] = row_factor<Rows>(w_, n + c);
      offset[c] = bias_.data ? load(bias_, n + c) : 0.0f;
    }
    for (int64_t i = 0; i < rows; ++i) {
      alignas(64) Out last[kN];
      Out* out = y + (m + i) * w_.n + n;
      Out* to = columns == kN ? out : last;
      for (int v = 0; v < kVectors; ++v) {
        const F32 scale = mul(load_f32(factor + v * kFloats), splat(a_.per_row ? a_.scale[m + i] : 1.0f));
        store_floats(to + v * kFloats, fma(sum(i, v, m), scale, load_f32(offset + v * kFloats)));
      }
      if (to == last) std::copy_n(last, columns, out);
    }
  }

  // Vector v of row i's sums
  F32 sum(int64_t i, int v, int64_t m) const {
    const Sum* from = sums_ + i * kN + v * kFloats;
    if constexpr (kExact) {
      I32 exact = load_i32(from);
#ifdef AUTOQ_DOT8
      // Bytes of an int8 weight were 128 too large; the sums wrap around and back.
      const auto excess = static_cast<int32_t>(128u * static_cast<uint32_t>(Steps::kBytes ? a_.row_sum[m + i] : 0));
      if constexpr (Steps::kBytes) exact = sub_i32(exact, broadcast(excess));
#endif
      return to_float(exact);
    } else {
      return load_f32(from);
    }
  }

  const Packed& w_;
  const Activation& a_;
  Typed bias_, y_;
  int64_t row_bytes_, m_block_, chunk_;
  uint8_t *panel_, *decoded_;
  Sum* sums_;
  float *scale_ = nullptr, *minimum_ = nullptr, *group_rows_ = nullptr;
};

}  // namespace
}  // namespace autoq
