// Rounds activations to int16 (one plane for half and bfloat16, two for float), or per row to int8 levels.
//
// A block of up to 256 inputs shares the scale amax/32767, so the rounding error is 2^-16 of the block's largest
// element: far below what half (2^-11 of each element) and bfloat16 can hold. Two planes keep 31 bits. Products
// with the whole-number codes then sum exactly in int32, at 16 products an instruction.
#include <algorithm>

#include "decode.h"
#include "scalar.h"

namespace autoq {
namespace {

constexpr int64_t kLargestBlock = 256;  // 255 · 32767 · 256 / 8 lanes < 2^31: no lane overflows
constexpr int64_t kRowScaleBlock = 128;
constexpr float kLevels = 32767.0f;
constexpr float kInt8Levels = 127.0f;
constexpr float kSmallest = 1e-30f;     // below, 32767/amax leaves the range of float: taken as zero
constexpr float kTiny = 1.17549435e-38f;
constexpr int32_t kInfinityBits = 0x7f800000;

int64_t block_of_group(int64_t group_size) {
  if (group_size <= kLargestBlock) return group_size;
  int64_t block = kLargestBlock;
  while (group_size % block) block -= kBlock;
  return block;
}

float bits_to_float(int32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// Row m as float, times the column scale, padded with zeros.
void widen_row(const Packed& w, Typed x, int64_t m, int64_t k_padded, float* row) {
  const int64_t k = w.k, start = m * k;
  int64_t i = 0;
  if (x.dtype == DType::kFloat) {
    std::memcpy(row, static_cast<const float*>(x.data) + start, k * sizeof(float));
    i = k;
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(x.data) + start;
    for (; i + kFloats <= k; i += kFloats) store_f32(row + i, x.dtype == DType::kHalf ? load_half(p + i) : load_bf16(p + i));
  }
  for (; i < k; ++i) row[i] = load(x, start + i);
  for (; i < k_padded; ++i) row[i] = 0.0f;
  if (w.column_scale) {
    for (i = 0; i < k; ++i) row[i] *= w.column_scale[i];
  }
}

float largest_magnitude(const float* row, int64_t count) {
  I32 m = zero_i32();
  for (int64_t i = 0; i < count; i += kFloats) m = max_magnitude_bits(m, load_f32(row + i));
  const int32_t bits = lane_max(m);
  return bits >= kInfinityBits ? bits_to_float(0x7fc00000) : bits_to_float(bits);  // NaN for any non-finite x
}

// 32 inputs in the order of decoded codes (see Block)
struct Floats {
  F32 v[kFloatParts];
  Floats(const float* x, bool interleaved) {
    for (int i = 0; i < kFloatParts; ++i) {
      const int place = interleaved && i % 3 != 0 ? 3 - i : i;  // of four vectors, the middle ones change places
      v[i] = load_f32(x + place * kFloats);
    }
  }
};

// Rounds f to whole numbers at `out`; f keeps what is left of it.
inline void round_floats(Floats& f, int16_t* out) {
  for (int part = 0; part < kParts; ++part) {
    F32 &a = f.v[2 * part], &b = f.v[2 * part + 1];
    const I32 a_int = round_to_int(a), b_int = round_to_int(b);
    store_i16(out + kShorts * part, narrow(a_int, b_int));
    a = sub(a, to_float(a_int));
    b = sub(b, to_float(b_int));
  }
}

I16 splat_i16(int16_t value) {
  int16_t v[kShorts];
  std::fill(v, v + kShorts, value);
  return load_i16(v);
}

I32 add_pairs(I32 sum, const int16_t* block, I16 ones) {
  for (int part = 0; part < kParts; ++part) sum = madd(sum, load_i16(block + part * kShorts), ones);
  return sum;
}

// Rounds one block and returns the sum of its rounded values, in units of the scale.
template <int kPlanes>
float round_block(const float* x, int64_t count, bool interleaved, float inverse, int16_t* high, int16_t* low) {
  const F32 factor = splat(inverse), rest = splat(32768.0f);
  const I16 ones = splat_i16(1);
  I32 sum_high = zero_i32(), sum_low = zero_i32();
  for (int64_t i = 0; i < count; i += kBlock) {
    Floats f(x + i, interleaved);
    for (F32& v : f.v) v = mul(v, factor);
    round_floats(f, high + i);
    sum_high = add_pairs(sum_high, high + i, ones);
    if constexpr (kPlanes == 2) {
      for (F32& v : f.v) v = mul(v, rest);
      round_floats(f, low + i);
      sum_low = add_pairs(sum_low, low + i, ones);
    }
  }
  return static_cast<float>(lane_sum(sum_high)) + static_cast<float>(lane_sum(sum_low)) / 32768.0f;
}

void round_row_to_int16(const float* row, int64_t m, const Activation& a) {
  int16_t* high = static_cast<int16_t*>(a.values) + m * a.stride;
  int16_t* low = high + a.plane_stride;
  float* sums = a.block_sum ? a.block_sum + m * a.sum_stride : nullptr;
  if (sums) std::fill_n(sums + a.blocks, a.sum_stride - a.blocks, 0.0f);
  for (int64_t b = 0; b < a.blocks; ++b) {
    const int64_t start = b * a.block;
    const int64_t count = (b + 1 < a.blocks ? a.block : a.k_padded - start);
    const float amax = largest_magnitude(row + start, count);
    const bool zero = amax < kSmallest;  // false for NaN, which then reaches every output of this row
    const float scale = zero ? 0.0f : amax / kLevels, inverse = zero ? 0.0f : kLevels / amax;
    const float sum = a.planes == 2 ? round_block<2>(row + start, count, a.interleaved, inverse, high + start, low + start)
                                    : round_block<1>(row + start, count, a.interleaved, inverse, high + start, nullptr);
    a.scale[m * a.blocks + b] = scale;
    if (sums) sums[b] = scale * sum;
  }
}

// Symmetric per row: scale amax/127, half to even, the division as in the PyTorch definition. Values as int16.
float round_row_to_int8_levels(const float* row, bool interleaved, int64_t k_padded, int16_t* out) {
  float scale = largest_magnitude(row, k_padded) / kInt8Levels;
  if (scale < kTiny) scale = kTiny;
  const F32 divisor = splat(scale);
  for (int64_t i = 0; i < k_padded; i += kBlock) {
    Floats f(row + i, interleaved);
    for (F32& v : f.v) v = div(v, divisor);
    round_floats(f, out + i);
  }
  return scale;
}

int32_t sum_of(const int16_t* values, int64_t count) {
  const I16 ones = splat_i16(1);
  I32 sum = zero_i32();
  for (int64_t i = 0; i < count; i += kBlock) sum = add_pairs(sum, values + i, ones);
  return lane_sum(sum);
}

void round_row_to_int8(const float* row, int64_t m, const Activation& a) {
  thread_local Scratch<int16_t> scratch;
  int16_t* values = a.bytes ? scratch.reserve(a.k_padded) : static_cast<int16_t*>(a.values) + m * a.stride;
  const float scale = round_row_to_int8_levels(row, a.interleaved, a.k_padded, values);
  if (a.bytes) {
    int8_t* out = static_cast<int8_t*>(a.values) + m * a.stride;
    for (int64_t i = 0; i < a.k_padded; ++i) out[i] = static_cast<int8_t>(values[i]);
  }
  if (a.per_row) {
    a.scale[m] = scale;
  } else {
    std::fill_n(a.scale + m * a.blocks, a.blocks, scale);
  }
  if (a.row_sum) a.row_sum[m] = sum_of(values, a.k_padded);
  if (!a.block_sum) return;
  float* sums = a.block_sum + m * a.sum_stride;
  std::fill_n(sums + a.blocks, a.sum_stride - a.blocks, 0.0f);
  for (int64_t b = 0; b < a.blocks; ++b) {
    const int64_t start = b * a.block, count = std::min(a.block, a.k_padded - start);
    sums[b] = (a.per_row ? 1.0f : scale) * static_cast<float>(sum_of(values + start, count));
  }
}

bool multiplies_bytes(const Packed& w, int64_t m) {
  if (!w.dynamic(m) || m <= kFewRows) return false;
#if defined(AUTOQ_DOT8)
  return !w.affine() || w.bits == 4;
#elif defined(AUTOQ_PAIRS8)
  return w.affine() && w.bits == 4;
#else
  return false;
#endif
}

}  // namespace

Activation activation_form(const Packed& w, int64_t m, DType dtype) {
  Activation a{};
  a.m = m;
  a.dynamic = w.dynamic(m);
  a.k_padded = w.affine() ? w.k_padded : round_up(w.k, kBlock);
  a.bytes = multiplies_bytes(w, m);
  a.per_row = a.bytes || (a.dynamic && !w.affine());
  // One cache line more than the values: rows of a power of two would compete for the same places in the L1 cache.
  a.stride = round_up(a.k_padded, 64) + (a.bytes ? 64 : 32);
  a.block = w.affine() ? block_of_group(w.group_size) : a.dynamic ? a.k_padded : kRowScaleBlock;
  a.blocks = (a.k_padded + a.block - 1) / a.block;
  a.sum_stride = round_up(a.blocks, kFloats);
  if (!a.bytes) with_rows_type(w, [&]<class Rows>() { a.interleaved = Rows::kInterleaved; });
  a.planes = dtype == DType::kFloat && !a.dynamic ? 2 : 1;
  return a;
}

namespace {

struct Sizes {  // in bytes, each a multiple of a cache line
  int64_t values, scale, block_sum, row_sum;

  Sizes(const Packed& w, const Activation& a)
      : values(round_up(a.planes * a.m * a.stride * (a.bytes ? 1 : 2), 64)),
        scale(round_up(4 * (a.per_row ? a.m : a.m * a.blocks + kFloats), 64)),  // whole vectors are read
        block_sum(w.affine() ? round_up(4 * a.m * a.sum_stride, 64) : 0),
        row_sum(a.bytes && !w.affine() ? round_up(4 * a.m, 64) : 0) {}
};

}  // namespace

int64_t activation_bytes(const Packed& w, const Activation& a) {
  const Sizes size(w, a);
  return size.values + size.scale + size.block_sum + size.row_sum;
}

void place(const Packed& w, void* memory, Activation& a) {
  const Sizes size(w, a);
  char* at = static_cast<char*>(memory);
  a.values = at;
  a.plane_stride = a.m * a.stride;
  a.scale = reinterpret_cast<float*>(at + size.values);
  a.block_sum = size.block_sum ? reinterpret_cast<float*>(at + size.values + size.scale) : nullptr;
  a.row_sum = size.row_sum ? reinterpret_cast<int32_t*>(at + size.values + size.scale + size.block_sum) : nullptr;
}

void round_activation(const Packed& w, Typed x, int64_t begin, int64_t end, const Activation& a) {
  thread_local Scratch<float> scratch;
  float* row = scratch.reserve(a.k_padded);
  for (int64_t m = begin; m < end; ++m) {
    widen_row(w, x, m, a.k_padded, row);
    if (a.dynamic) {
      round_row_to_int8(row, m, a);
    } else {
      round_row_to_int16(row, m, a);
    }
  }
}

}  // namespace autoq
