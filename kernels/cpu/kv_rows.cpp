// Rows of a KV cache: rounding them to int8 or int4, and reading them as floats.
#include "kv_rows.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "library.h"
#include "scalar.h"
#include "vec.h"

namespace autoq {
namespace {

using at::Tensor;

constexpr float kInt8Levels = 127.0f;
constexpr float kInt4Levels = 15.0f;
constexpr int64_t kRowsPerThread = 64;  // fewer cost less than another thread

// Halves to even, for |v| < 2^22
inline float to_whole(float v) {
  constexpr float kNoFraction = 12582912.0f;  // 1.5·2^23
  return (v + kNoFraction) - kNoFraction;
}

void store_int8(const float* x, int64_t d, char* row) {
  float most = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < d; ++i) {
    most = std::max(most, std::fabs(x[i]));
    finite &= std::isfinite(x[i]);
  }
  const float scale = finite ? most / kInt8Levels : std::numeric_limits<float>::quiet_NaN();
  int8_t* codes = reinterpret_cast<int8_t*>(row);
  if (scale > 0.0f) {
    for (int64_t i = 0; i < d; ++i) codes[i] = static_cast<int8_t>(std::clamp(to_whole(x[i] / scale), -kInt8Levels, kInt8Levels));
  } else {
    std::memset(codes, 0, d);
  }
  std::memcpy(row + d, &scale, sizeof(scale));
}

void store_int4(const float* x, int64_t d, char* row) {
  float low = x[0], high = x[0];
  bool finite = true;
  for (int64_t i = 0; i < d; ++i) {
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
    finite &= std::isfinite(x[i]);
  }
  const c10::Half scale = finite ? (high - low) / kInt4Levels : std::numeric_limits<float>::quiet_NaN();
  const c10::Half minimum = finite ? low : 0.0f;
  const float step = scale, from = minimum;
  const auto code = [&](float v) {
    return step > 0.0f ? static_cast<int>(std::clamp(to_whole((v - from) / step), 0.0f, kInt4Levels)) : 0;
  };
  for (int64_t i = 0; i < d / 2; ++i) row[i] = static_cast<char>(code(x[i]) | code(x[i + d / 2]) << 4);
  std::memcpy(row + d / 2, &scale.x, 2);
  std::memcpy(row + d / 2 + 2, &minimum.x, 2);
}

int64_t row_bytes(RowKind kind, int64_t d) {
  switch (kind) {
    case RowKind::kFloat: return 4 * d;
    case RowKind::kInt8: return d + kInt8Extra;
    case RowKind::kInt4: return d / 2 + kInt4Extra;
    default: return 2 * d;
  }
}

// A cache and what is to be written to it, [B, G, L, R] and [B, G, Q, D].
struct Target {
  char* data;
  int64_t batch, head, row;  // strides in bytes
  RowKind kind;
  bool rotated;
};

Target target_of(const Tensor& cache, const Tensor& from, bool rotated) {
  const int64_t size = cache.element_size();
  TORCH_CHECK(cache.dim() == 4 && from.dim() == 4 && cache.size(0) == from.size(0) && cache.size(1) == from.size(1) &&
                  cache.stride(3) == 1,
              "autoq: store_kv's cache is [B, G, L, R] for [B, G, Q, D]; got ", cache.sizes(), " for ", from.sizes());
  RowKind kind = RowKind::kBFloat16;
  if (cache.scalar_type() == at::kByte) {
    kind = quantized_kind(cache.size(3), from.size(3));
  } else {
    TORCH_CHECK(cache.scalar_type() == from.scalar_type() && cache.size(3) == from.size(3),
                "autoq: store_kv's cache holds bytes, or numbers of the same type and length; got ", cache.toString(), " ",
                cache.sizes(), " for ", from.toString(), " ", from.sizes());
    if (cache.scalar_type() == at::kFloat) kind = RowKind::kFloat;
    if (cache.scalar_type() == at::kHalf) kind = RowKind::kHalf;
  }
  return {static_cast<char*>(cache.data_ptr()), cache.stride(0) * size, cache.stride(1) * size, cache.stride(2) * size, kind,
          rotated && kind == RowKind::kInt4};
}

Typed typed_row(const Tensor& x, int64_t b, int64_t g, int64_t i) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16,
              "autoq: store_kv takes float32, bfloat16 or float16; got ", x.scalar_type());
  const DType type = x.scalar_type() == at::kFloat ? DType::kFloat : x.scalar_type() == at::kHalf ? DType::kHalf : DType::kBFloat16;
  char* data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
  return {data + (b * x.stride(0) + g * x.stride(1) + i * x.stride(2)) * x.element_size(), type};
}

void store_rows(const Tensor& x, const Target& to, int64_t start) {
  const int64_t heads = x.size(1), queries = x.size(2), d = x.size(3);
  at::parallel_for(0, x.size(0) * heads * queries, kRowsPerThread, [&](int64_t begin, int64_t end) {
    thread_local Scratch<float> scratch;
    float* numbers = scratch.reserve(d);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t b = index / (heads * queries), g = index / queries % heads, i = index % queries;
      char* row = to.data + b * to.batch + g * to.head + (start + i) * to.row;
      const Typed from = typed_row(x, b, g, i);
      if (!quantized(to.kind)) {
        std::memcpy(row, from.data, row_bytes(to.kind, d));
        continue;
      }
      convert(from, 0, d, {numbers, DType::kFloat});
      if (to.rotated) rotate(numbers, d);
      to.kind == RowKind::kInt8 ? store_int8(numbers, d, row) : store_int4(numbers, d, row);
    }
  });
}

}  // namespace

RowKind quantized_kind(int64_t bytes, int64_t d) {
  if (bytes == d + kInt8Extra) return RowKind::kInt8;
  TORCH_CHECK(bytes == d / 2 + kInt4Extra && d % 32 == 0, "autoq: a row of ", d, " numbers has ", d + kInt8Extra,
              " bytes with int8, ", d / 2 + kInt4Extra, " with int4 where its length is a multiple of 32; got ", bytes);
  return RowKind::kInt4;
}

void load_row(RowKind kind, const char* row, int64_t d, float* out) {
  if (kind == RowKind::kInt8) {
    float scale;
    std::memcpy(&scale, row + d, sizeof(scale));
    const int8_t* codes = reinterpret_cast<const int8_t*>(row);
    for (int64_t i = 0; i < d; ++i) out[i] = static_cast<float>(codes[i]) * scale;
  } else if (kind == RowKind::kInt4) {
    uint16_t bits[2];
    std::memcpy(bits, row + d / 2, sizeof(bits));
    const float scale = half_to_float(bits[0]), minimum = half_to_float(bits[1]);
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(row);
    for (int64_t i = 0; i < d / 2; ++i) out[i] = static_cast<float>(codes[i] & 15) * scale + minimum;
    for (int64_t i = 0; i < d / 2; ++i) out[d / 2 + i] = static_cast<float>(codes[i] >> 4) * scale + minimum;
  } else {
    const DType type = kind == RowKind::kFloat ? DType::kFloat : kind == RowKind::kHalf ? DType::kHalf : DType::kBFloat16;
    convert({const_cast<char*>(row), type}, 0, d, {out, DType::kFloat});
  }
}

void rotate(float* x, int64_t d) {
  const int64_t block = d & -d;
  const float factor = 1.0f / std::sqrt(static_cast<float>(block));
  for (int64_t half = 1; half < block; half *= 2) {
    for (int64_t start = 0; start < d; start += 2 * half) {
      for (int64_t i = start; i < start + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
    }
  }
  for (int64_t i = 0; i < d; ++i) x[i] *= factor;
}

void store_kv(const Tensor& keys, const Tensor& values, const Tensor& k, const Tensor& v, const Tensor& start) {
  const Target key = target_of(keys, k, true), value = target_of(values, v, false);
  TORCH_CHECK(k.size(2) == v.size(2) && keys.size(2) == values.size(2), "autoq: store_kv's k and v have as many rows; got ",
              k.sizes(), " and ", v.sizes());
  TORCH_CHECK(start.scalar_type() == at::kLong && start.numel() == 1, "autoq: store_kv's start is one int64");
  const int64_t first = *start.const_data_ptr<int64_t>();
  TORCH_CHECK(first >= 0 && first + k.size(2) <= keys.size(2), "autoq: the cache holds ", keys.size(2), " tokens; got ",
              k.size(2), " more behind ", first);
  const Tensor k_ = k.stride(3) == 1 ? k : k.contiguous(), v_ = v.stride(3) == 1 ? v : v.contiguous();
  store_rows(k_, key, first);
  store_rows(v_, value, first);
}

}  // namespace autoq

AUTOQ_LIBRARY_FRAGMENT(AUTOQ_NAMESPACE, library) {
  library.def("store_kv(Tensor(a!) keys, Tensor(b!) values, Tensor k, Tensor v, Tensor start) -> ()");
}

AUTOQ_LIBRARY_IMPL(AUTOQ_NAMESPACE, CPU, library) { library.impl("store_kv", TORCH_FN(autoq::store_kv)); }
