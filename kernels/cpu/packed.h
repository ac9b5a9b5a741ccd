// The packed weight as the kernels see it (kernels/layout.py is the definition), and their entry points.
// Legend: M rows of x, N outputs, K inputs, G groups in a row of the weight.
#pragma once

#include <cstdint>

namespace autoq {

constexpr int64_t kHeaderBytes = 128;
constexpr int64_t kMagic = 0x54554F41;
constexpr int64_t kVersion = 1;
constexpr int64_t kBlock = 32;  // inputs per packed block

enum class Kind : int64_t { kDense = 0, kInt8 = 1, kAffine = 2, kFp6E3M2 = 3, kFp6E2M3 = 4 };
enum class DType { kFloat, kHalf, kBFloat16 };

// A weight whose header was checked: every section lies within the buffer.
struct Packed {
  Kind kind;
  int64_t bits, n, k, group_size, groups, activation_bits;
  int64_t k_padded;              // codes in a row of a bit plane
  const uint8_t* codes;          // int8 [N, K], or the bit planes one after the other
  const void* scale;             // float [N], or half [N, G] (affine)
  const uint16_t* minimum;       // half [N, G] or null
  const float* row_scale;        // [N] or null
  const float* column_scale;     // [K] or null

  bool affine() const { return kind == Kind::kAffine; }
  bool dynamic() const { return activation_bits == 8; }
};

// Reads and checks a header; `available` counts the bytes from `head` to the end of its storage.
// Returns null, or the rule that is broken.
const char* parse(const uint8_t* head, int64_t available, Packed* packed);

struct Typed {  // a row-major array of one of the three dtypes
  void* data;
  DType dtype;
};

// x [M, K] rounded to integers: one or two int16 planes, with a scale per row and block.
struct Activation {
  int64_t m, k_padded;     // k_padded: a multiple of 32; the pads are zero
  int64_t block, blocks;   // inputs that share a scale
  bool interleaved;        // the order of inputs within 32, see Block in decode.h
  int planes;              // x = scale · (plane 0 + plane 1 / 32768)
  int16_t* values;         // [planes, M, k_padded]
  float* scale;            // [M, blocks]
  int64_t sum_stride;      // G rounded up to whole vectors
  float* group_sum;        // [M, sum_stride]: sum of the rounded x over a group of the weight; null if unused
};

// Block sizes and plane count for x against this weight; data pointers are left null.
Activation activation_form(const Packed& w, int64_t m, DType dtype);

// Fills rows [begin, end) of `a` from x [M, K].
void round_activation(const Packed& w, Typed x, int64_t begin, int64_t end, const Activation& a);

// y[:, begin:end] = x @ W[begin:end].T + bias for rows of the weight; y is [M, N], bias [N] or null data.
void multiply(const Packed& w, const Activation& a, Typed bias, Typed y, int64_t begin, int64_t end);

// out[n - begin, :] = W[n, :] as float32 or bfloat16, for rows [begin, end).
void dequantize(const Packed& w, int64_t begin, int64_t end, Typed out);

}  // namespace autoq
