// Softmax attention on the CPU: the keys that a mask lets through are read once for all query heads that share them,
// the others never, and nothing of the size queries × keys is held.
//
// Legend: B batch, H query heads, G heads of keys and values, Q queries, L keys, D and E their lengths. A row is one
// query of one head; a strip is rows that share keys: the H/G heads of some neighbouring queries. A strip meets the keys
// a tile at a time, and its sums are rescaled when a tile has a larger score (Milakov and Gimelshein 2018; Dao 2022).
// Tiles of codes, and those that many rows share, are turned into floats first, the keys of the latter transposed.
#include "attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "attention_strip.h"
#include "kv_rows.h"
#include "library.h"
#include "scalar.h"
#include "vec.h"

namespace autoq {
namespace {

using at::Tensor;

constexpr int64_t kStripRows = 128;  // at most, of several queries: a tile of keys is converted once for all of them
constexpr int64_t kLeastKeys = 128;  // of a part, where the keys of a strip are divided among threads

// The strip's queries as floats, times the scale and log2(e), so that weights are powers of 2; out is [rows, D].
void load_queries(const Problem& p, const Strip& s, float* out) {
  constexpr float kLog2E = 1.44269504088896341f;
  const int64_t sharing = p.sharing();
  for (int64_t r = 0; r < s.queries * sharing; ++r, out += p.d) {
    load_rows(p.q, s.b, s.g * sharing + r % sharing, s.first + r / sharing, 1, p.d, out);
    if (p.k.kind == RowKind::kInt4) rotate(out, p.d);  // as the keys are
    for (int64_t c = 0; c < p.d; c += kFloats) store_f32(out + c, mul(load_f32(out + c), splat(p.scale * kLog2E)));
  }
}

// The keys of each row of a strip, and the first and last keys that any of them may see.
Range ranges_of(const Problem& p, const Strip& s, Range* rows) {
  Range all{p.keys, 0, nullptr};
  const int64_t sharing = p.sharing();
  for (int64_t r = 0; r < s.queries * sharing; ++r) {
    const Range& one = rows[r] = p.range(s.b, s.g * sharing + r % sharing, s.first + r / sharing);
    if (one.begin >= one.end) continue;
    all.begin = std::min(all.begin, one.begin);
    all.end = std::max(all.end, one.end);
  }
  return all;
}

// out[i] = values[i] · factor
template <class Store>
void store_scaled(const float* values, int64_t count, float factor, Store&& store) {
  for (int64_t c = 0; c < count; c += kFloats) store(c, mul(load_f32(values + c), splat(factor)));
}

// Writes the rows' values over their totals, 0 where a row may see no key; y is [B, Q, H, E].
void finish(const Problem& p, const Strip& s, const Sums& sums, Typed y) {
  const int64_t sharing = p.sharing();
  for (int64_t r = 0; r < s.queries * sharing; ++r) {
    const float* values = sums.values + r * p.e;
    const float total = sums.totals[r], factor = total == 0.0f ? 0.0f : 1.0f / total;
    const int64_t start = ((s.b * p.queries + s.first + r / sharing) * p.heads + s.g * sharing + r % sharing) * p.e;
    float* floats = static_cast<float*>(y.data) + start;
    uint16_t* words = static_cast<uint16_t*>(y.data) + start;
    switch (y.dtype) {
      case DType::kHalf: store_scaled(values, p.e, factor, [&](int64_t c, F32 v) { store_half(words + c, v); }); break;
      case DType::kBFloat16: store_scaled(values, p.e, factor, [&](int64_t c, F32 v) { store_bf16(words + c, v); }); break;
      default: store_scaled(values, p.e, factor, [&](int64_t c, F32 v) { store_f32(floats + c, v); });
    }
  }
}

// Adds the sums of a part of the keys to those of another.
void unite(int64_t rows, int64_t e, const Sums& from, const Sums& to) {
  for (int64_t r = 0; r < rows; ++r) {
    if (from.totals[r] == 0.0f) continue;
    const float now = std::max(from.largest[r], to.largest[r]);
    const float old = std::exp2(to.largest[r] - now), factor = std::exp2(from.largest[r] - now);
    for (int64_t c = 0; c < e; c += kFloats) {
      float* p = to.values + r * e + c;
      store_f32(p, fma(load_f32(from.values + r * e + c), splat(factor), mul(load_f32(p), splat(old))));
    }
    to.totals[r] = to.totals[r] * old + from.totals[r] * factor;
    to.largest[r] = now;
  }
}

// All strips; the keys of each are divided into parts where there are fewer strips than threads could share evenly.
void attend(const Problem& p, Typed y) {
  const int64_t sharing = p.sharing();
  const int64_t most = std::clamp<int64_t>(kStripRows / sharing, 1, p.queries);
  const int64_t blocks = (p.queries + most - 1) / most, per_strip = (p.queries + blocks - 1) / blocks;
  const int64_t strips = p.batch * p.groups * blocks, rows = per_strip * sharing;
  const auto strip = [&](int64_t index) {
    // Late queries first: under a causal mask they meet more keys.
    const int64_t head = index % (p.batch * p.groups), first = (blocks - 1 - index / (p.batch * p.groups)) * per_strip;
    return Strip{head / p.groups, head % p.groups, first, std::min(per_strip, p.queries - first)};
  };
  const int64_t threads = at::get_num_threads(), wanted = threads > 1 && strips < 4 * threads ? 4 * threads : 1;
  const int64_t parts = std::clamp<int64_t>((wanted + strips - 1) / strips, 1, std::max<int64_t>(1, p.keys / kLeastKeys));
  const int64_t item_floats = rows * (p.e + 2);
  const Tensor memory = at::empty({parts == 1 ? 0 : strips * parts, item_floats}, at::kFloat);
  float* all_sums = memory.mutable_data_ptr<float>();
  const auto sums_at = [&](float* start) { return Sums{start, start + rows * p.e, start + rows * (p.e + 1)}; };
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, strips * parts), 1, [&](int64_t, int64_t) {
    thread_local Scratch<float> scratch;
    thread_local Scratch<Range> range_scratch;
    float* queries = scratch.reserve(rows * p.d + item_floats);
    Range* ranges = range_scratch.reserve(rows);
    for (int64_t item; (item = next++) < strips * parts;) {
      const Strip s = strip(item / parts);
      const Sums sums = sums_at(parts == 1 ? queries + rows * p.d : all_sums + item * item_floats);
      std::fill_n(sums.values, rows * p.e, 0.0f);
      std::fill_n(sums.largest, rows, kNone);
      std::fill_n(sums.totals, rows, 0.0f);
      const Range all = ranges_of(p, s, ranges);
      const int64_t share = round_up((std::max<int64_t>(0, all.end - all.begin) + parts - 1) / parts, kKeys);
      const int64_t from = all.begin + item % parts * share, to = std::min(from + share, all.end);
      if (from < to) {
        load_queries(p, s, queries);
        meet_keys(p, s, queries, from, to, ranges, sums);
      }
      if (parts == 1) finish(p, s, sums, y);
    }
  });
  if (parts == 1) return;
  at::parallel_for(0, strips, 4, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Strip s = strip(index);
      float* start = all_sums + index * parts * item_floats;
      for (int64_t part = 1; part < parts; ++part) {
        unite(s.queries * sharing, p.e, sums_at(start + part * item_floats), sums_at(start));
      }
      finish(p, s, sums_at(start), y);
    }
  });
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::kFloat;
    case at::kHalf: return DType::kHalf;
    case at::kBFloat16: return DType::kBFloat16;
    default: TORCH_CHECK(false, "autoq: attention takes float32, bfloat16 or float16; got ", t.scalar_type());
  }
}

Heads heads_of(const Tensor& t, RowKind kind) {
  const int64_t size = t.element_size();
  return {static_cast<const char*>(t.const_data_ptr()), t.stride(0) * size, t.stride(1) * size, t.stride(2) * size, kind};
}

RowKind kind_of(const Tensor& t) {
  const DType type = dtype_of(t);
  return type == DType::kFloat ? RowKind::kFloat : type == DType::kHalf ? RowKind::kHalf : RowKind::kBFloat16;
}

Tensor innermost_contiguous(const Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); }

// The keys of each query: those up to its own place, or those that the mask names.
std::vector<Range> ranges_of(const std::optional<Tensor>& mask, bool causal, int64_t queries, int64_t keys) {
  std::vector<Range> ranges;
  if (!mask) {
    for (int64_t i = 0; i < queries; ++i) ranges.push_back({0, causal ? std::clamp<int64_t>(i + 1 + keys - queries, 0, keys) : keys, nullptr});
    return ranges;
  }
  const uint8_t* row = static_cast<const uint8_t*>(mask->const_data_ptr());
  for (int64_t i = 0; i < mask->numel() / keys; ++i, row += keys) {
    const void* found = std::memchr(row, 1, keys);
    if (!found) {
      ranges.push_back({0, 0, nullptr});
      continue;
    }
    const int64_t begin = static_cast<const uint8_t*>(found) - row;
    int64_t end = keys;
    while (end > begin && row[end - 1] == 0) --end;
    ranges.push_back({begin, end, std::memchr(row + begin, 0, end - begin) ? row : nullptr});
  }
  return ranges;
}

}  // namespace

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double scale, bool causal) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "autoq: attention takes q, k and v of 4 dimensions");
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), d = q.size(3);
  const int64_t groups = k.size(1), keys = k.size(2);
  const bool bytes = k.scalar_type() == at::kByte;
  TORCH_CHECK(k.size(0) == batch && v.size(0) == batch && v.size(1) == groups && v.size(2) == keys &&
                  (bytes || k.size(3) == d) && groups > 0 && heads % groups == 0,
              "autoq: attention's shapes do not fit: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes());
  const RowKind kind = bytes ? quantized_kind(k.size(3), d) : kind_of(k);
  const int64_t e = kind == RowKind::kInt8 ? v.size(3) - kInt8Extra : kind == RowKind::kInt4 ? 2 * (v.size(3) - kInt4Extra) : v.size(3);
  TORCH_CHECK(d % 16 == 0 && e % 16 == 0, "autoq: attention's heads are multiples of 16 long; got ", d, " and ", e);
  TORCH_CHECK(k.scalar_type() == v.scalar_type() && (bytes || q.scalar_type() == k.scalar_type()),
              "autoq: q, k and v have one type, or k and v are bytes");
  Tensor y = at::empty({batch, queries, heads, e}, q.options());
  if (y.numel() == 0) return y;
  if (keys == 0) return y.zero_();
  std::optional<Tensor> rows;
  int64_t range_batch = 0, range_head = 0;
  if (mask) {
    TORCH_CHECK(mask->scalar_type() == at::kBool && mask->dim() == 4 && (mask->size(0) == 1 || mask->size(0) == batch) &&
                    (mask->size(1) == 1 || mask->size(1) == heads) && mask->size(2) == queries && mask->size(3) == keys,
                "autoq: attention's mask is bool [", batch, " or 1, ", heads, " or 1, ", queries, ", ", keys, "]; got ",
                mask->toString(), " ", mask->sizes());
    TORCH_CHECK(!causal, "autoq: attention takes a mask or causal, not both");
    rows = mask->contiguous();
    range_head = mask->size(1) == 1 ? 0 : queries;
    range_batch = mask->size(0) == 1 ? 0 : mask->size(1) * queries;
  }
  const std::vector<Range> ranges = ranges_of(rows, causal, queries, keys);
  const Tensor q_ = innermost_contiguous(q), k_ = innermost_contiguous(k), v_ = innermost_contiguous(v);
  const Problem p{heads_of(q_, kind_of(q_)), heads_of(k_, kind), heads_of(v_, kind), batch, heads, groups, queries, keys, d, e,
                  static_cast<float>(scale), ranges.data(), range_batch, range_head};
  attend(p, {y.data_ptr(), dtype_of(y)});
  return y;
}

}  // namespace autoq

AUTOQ_LIBRARY_FRAGMENT(AUTOQ_NAMESPACE, library) {
  library.def("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool causal) -> Tensor");
}

AUTOQ_LIBRARY_IMPL(AUTOQ_NAMESPACE, CPU, library) { library.impl("attention", TORCH_FN(autoq::attention)); }
