// Rounds activations to int16 (one plane for half and bfloat16, two for float), or per token to int8 levels.
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
    for (; i + 8 <= k; i += 8) store_f32(row + i, x.dtype == DType::kHalf ? load_half(p + i) : load_bf16(p + i));
  }
  for (; i < k; ++i) row[i] = load(x, start + i);
  for (; i < k_padded; ++i) row[i] = 0.0f;
  if (w.column_scale) {
    for (i = 0; i < k; ++i) row[i] *= w.column_scale[i];
  }
}

float largest_magnitude(const float* row, int64_t count) {
  I32 m = zero_i32();
  for (int64_t i = 0; i < count; i += 8) m = max_magnitude_bits(m, load_f32(row + i));
  const int32_t bits = lane_max(m);
  return bits >= kInfinityBits ? bits_to_float(0x7fc00000) : bits_to_float(bits);  // NaN for any non-finite x
}

// 32 inputs in the order of decoded codes (see Block)
struct Floats {
  F32 v[4];
  Floats(const float* x, bool interleaved)
      : v{load_f32(x), load_f32(x + (interleaved ? 16 : 8)), load_f32(x + (interleaved ? 8 : 16)), load_f32(x + 24)} {}
};

// Rounds v to whole numbers at `out`; v keeps what is left of it.
inline void round_floats(Floats& f, int16_t* out) {
  for (int half = 0; half < 2; ++half) {
    F32 &a = f.v[2 * half], &b = f.v[2 * half + 1];
    const I32 a_int = round_to_int(a), b_int = round_to_int(b);
    store_i16(out + 16 * half, narrow(a_int, b_int));
    a = sub(a, to_float(a_int));
    b = sub(b, to_float(b_int));
  }
}

I16 splat_i16(int16_t value) {
  int16_t v[16];
  std::fill(v, v + 16, value);
  return load_i16(v);
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
    sum_high = madd(madd(sum_high, load_i16(high + i), ones), load_i16(high + i + 16), ones);
    if constexpr (kPlanes == 2) {
      for (F32& v : f.v) v = mul(v, rest);
      round_floats(f, low + i);
      sum_low = madd(madd(sum_low, load_i16(low + i), ones), load_i16(low + i + 16), ones);
    }
  }
  return static_cast<float>(lane_sum(sum_high)) + static_cast<float>(lane_sum(sum_low)) / 32768.0f;
}

void round_row_to_int16(const float* row, int64_t m, const Packed& w, const Activation& a) {
  int16_t* high = a.values + m * a.k_padded;
  int16_t* low = high + a.m * a.k_padded;
  float* sums = a.group_sum ? a.group_sum + m * a.sum_stride : nullptr;
  if (sums) std::memset(sums, 0, a.sum_stride * sizeof(float));
  for (int64_t b = 0; b < a.blocks; ++b) {
    const int64_t start = b * a.block;
    const int64_t count = (b + 1 < a.blocks ? a.block : a.k_padded - start);
    const float amax = largest_magnitude(row + start, count);
    const bool zero = amax < kSmallest;  // false for NaN, which then reaches every output of this row
    const float scale = zero ? 0.0f : amax / kLevels, inverse = zero ? 0.0f : kLevels / amax;
    const float sum = a.planes == 2 ? round_block<2>(row + start, count, a.interleaved, inverse, high + start, low + start)
                                    : round_block<1>(row + start, count, a.interleaved, inverse, high + start, nullptr);
    a.scale[m * a.blocks + b] = scale;
    if (sums) sums[start / w.group_size] += scale * sum;
  }
}

// Symmetric per token: scale amax/127, half to even, the division as in the PyTorch definition.
void round_row_to_int8(const float* row, int64_t m, const Activation& a) {
  int16_t* values = a.values + m * a.k_padded;
  float scale = largest_magnitude(row, a.k_padded) / kInt8Levels;
  if (scale < kTiny) scale = kTiny;
  const F32 divisor = splat(scale);
  for (int64_t i = 0; i < a.k_padded; i += kBlock) {
    Floats f(row + i, a.interleaved);
    for (F32& v : f.v) v = div(v, divisor);
    round_floats(f, values + i);
  }
  a.scale[m] = scale;
}

}  // namespace

Activation activation_form(const Packed& w, int64_t m, DType dtype) {
  Activation a{};
  a.m = m;
  a.k_padded = w.affine() ? w.k_padded : round_up(w.k, kBlock);
  a.block = w.dynamic() ? a.k_padded : w.affine() ? block_of_group(w.group_size) : kRowScaleBlock;
  a.blocks = (a.k_padded + a.block - 1) / a.block;
  a.sum_stride = round_up(w.groups, 8);
  with_rows_type(w, [&]<class Rows>() { a.interleaved = Rows::kInterleaved; });
  a.planes = dtype == DType::kFloat && !w.dynamic() ? 2 : 1;
  return a;
}

void round_activation(const Packed& w, Typed x, int64_t begin, int64_t end, const Activation& a) {
  thread_local Scratch<float> scratch;
  float* row = scratch.reserve(a.k_padded);
  for (int64_t m = begin; m < end; ++m) {
    widen_row(w, x, m, a.k_padded, row);
    if (w.dynamic()) {
      round_row_to_int8(row, m, a);
    } else {
      round_row_to_int16(row, m, w, a);
    }
  }
}

}  // namespace autoq
