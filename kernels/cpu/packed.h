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

struct Typed {  // a row-major array of one of the three dtypes
  void* data;
  DType dtype;
};

// A weight whose header was checked: every section lies within the buffer.
struct Packed {
  Kind kind;
  int64_t bits, n, k, group_size, groups, activation_bits, m_switch;
  int64_t k_padded;              // codes in a row of a bit plane
  const uint8_t* codes;          // int8 [N, K], or the bit planes one after the other
  const void* scale;             // float [N], or half [N, G] (affine)
  const uint16_t* minimum;       // half [N, G] or null
  const float* row_scale;        // [N] or null
  const float* column_scale;     // [K] or null

  bool affine() const { return kind == Kind::kAffine; }
  Typed dense() const {  // of kDense
    return {const_cast<uint8_t*>(codes), bits == 16 ? DType::kBFloat16 : bits == 17 ? DType::kHalf : DType::kFloat};
  }
  // Whether m rows of x are rounded to int8 per row.
  bool dynamic(int64_t m) const { return activation_bits == 8 && m >= m_switch; }
};

// Reads and checks a header; `available` counts the bytes from `head` to the end of its storage.
// Returns null, or the rule that is broken.
const char* parse(const uint8_t* head, int64_t available, Packed* packed);

constexpr int64_t kFewRows = 8;  // up to here rows of x meet rows of the weight one by one, as these come from memory

// x [M, K] rounded to integers: one or two int16 planes with a scale per row and block, or int8 with one per row.
struct Activation {
  int64_t m, k_padded;     // k_padded: a multiple of 32; the pads are zero
  int64_t stride;          // values from one row to the next
  int64_t plane_stride;    // and from one plane to the next
  int64_t block, blocks;   // inputs whose products are summed as whole numbers, and how many times that many
  bool interleaved;        // the order of inputs within 32, see Block in decode.h
  bool dynamic;            // x is rounded to int8 levels per row
  bool bytes;              // values are int8, in the order of the inputs
  bool per_row;            // scale is [M], else [M, blocks]
  int planes;              // x = scale · (plane 0 + plane 1 / 32768)
  void* values;            // [planes, M, stride]
  float* scale;
  int64_t sum_stride;      // blocks rounded up to whole vectors
  float* block_sum;        // [M, sum_stride]: sum of the rounded x over a block (per_row: before the scale); null if
                           // unused
  int32_t* row_sum;        // [M]: sum of a row's int8 values; null if unused

  const int16_t* shorts(int64_t row) const { return static_cast<const int16_t*>(values) + row * stride; }
  const uint8_t* raw(int64_t row) const { return static_cast<const uint8_t*>(values) + row * stride * (bytes ? 1 : 2); }
};

// What m rows of x become for this weight; data pointers are left null.
Activation activation_form(const Packed& w, int64_t m, DType dtype);

// Bytes that the arrays of `a` take, and their places in that much memory, which starts at a cache line.
int64_t activation_bytes(const Packed& w, const Activation& a);
void place(const Packed& w, void* memory, Activation& a);

// Fills rows [begin, end) of `a` from x [M, K].
void round_activation(const Packed& w, Typed x, int64_t begin, int64_t end, const Activation& a);

// Rows of the weight that `multiply` works on together; threads divide the weight in multiples of it.
int64_t row_unit(const Activation& a);

// y[:, begin:end] = x @ W[begin:end].T + bias for rows of the weight; y is [M, N], bias [N] or null data.
void multiply(const Packed& w, const Activation& a, Typed bias, Typed y, int64_t begin, int64_t end);

// out[n - begin, :] = W[n, :] in any of the dtypes, for rows [begin, end); a dense weight too.
void dequantize(const Packed& w, int64_t begin, int64_t end, Typed out);

// The same as multiply for a dense weight of bfloat16 or half and up to kDenseRows rows of x as float, zero-padded to
// whole vectors, `stride` floats apart.
constexpr int64_t kDenseRows = 32;
void multiply_dense(const Packed& w, const float* x, int64_t stride, int64_t m, Typed bias, Typed y, int64_t begin, int64_t end);

// `count` numbers of `from`, from number `start` on, as `out`'s type.
void convert(Typed from, int64_t start, int64_t count, Typed out);

}  // namespace autoq
