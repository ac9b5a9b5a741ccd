// A strip of queries meets keys, a tile at a time; see attention.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention_tile.h"
#include "kv_rows.h"
#include "packed.h"
#include "scalar.h"

namespace autoq {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// One of q, k, v, as its memory lies; the innermost dimension is contiguous.
struct Heads {
  const char* data;
  int64_t batch, head, row;  // strides in bytes
  RowKind kind;

  const char* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
};

// Which keys a row may see: those in [begin, end) that its bytes, if there are any, name.
struct Range {
  int64_t begin, end;
  const uint8_t* allowed;  // [L], null if all within the range are
};

// What a strip has summed so far, of the keys it met.
struct Sums {
  float* values;   // [rows, E], to be divided by the totals
  float* largest;  // [rows]: the largest score
  float* totals;   // [rows]
};

struct Problem {
  Heads q, k, v;
  int64_t batch, heads, groups, queries, keys, d, e;
  float scale;
  const Range* ranges;  // [B or 1, H or 1, Q]
  int64_t range_batch, range_head;  // strides, 0 where one serves all

  int64_t sharing() const { return heads / groups; }
  const Range& range(int64_t b, int64_t h, int64_t i) const { return ranges[b * range_batch + h * range_head + i]; }
};

// Leaves only the scores of the keys [start, start + count) that a row may see; false if there is none.
bool apply_range(const Range& range, int64_t start, int count, float fill, float* scores) {
  const int64_t begin = std::clamp<int64_t>(range.begin - start, 0, count);
  const int64_t end = std::clamp<int64_t>(range.end - start, 0, count);
  if (begin >= end) return false;
  std::fill(scores, scores + begin, fill);
  std::fill(scores + end, scores + round_up(count, kFloats), fill);
  if (range.allowed && std::memchr(range.allowed + start + begin, 0, end - begin)) {
    for (int64_t j = begin; j < end; ++j) {
      if (!range.allowed[start + j]) scores[j] = fill;
    }
  }
  return true;
}

// Turns a row's scores into weights, and its sums into those that belong to the new largest score.
void weigh(const Range& range, int64_t start, int count, int64_t e, float* scores, int64_t r, const Sums& sums) {
  const int64_t padded = round_up(count, kFloats);
  const bool all = range.begin <= start && range.end >= start + padded && !range.allowed;
  float largest = kNone;
  if (all || apply_range(range, start, count, kNone, scores)) {
    F32 most = load_f32(scores);
    for (int64_t j = kFloats; j < padded; j += kFloats) most = max(most, load_f32(scores + j));
    largest = lane_max(most);
  }
  if (largest == kNone) {
    std::fill_n(scores, padded, 0.0f);
    return;
  }
  const float before = sums.largest[r], now = std::max(before, largest);
  F32 total = zero_f32();
  for (int64_t j = 0; j < padded; j += kFloats) {
    const F32 weight = exp2_negative(sub(load_f32(scores + j), splat(now)));
    store_f32(scores + j, weight);
    total = add(total, weight);
  }
  if (!all) {
    apply_range(range, start, count, 0.0f, scores);  // exactly 0, not 2^-126: a value there may be large
    total = zero_f32();
    for (int64_t j = 0; j < padded; j += kFloats) total = add(total, load_f32(scores + j));
  }
  if (now != before) {
    if (before != kNone) {
      const float factor = std::exp2(before - now);
      for (int64_t c = 0; c < e; c += kFloats) {
        float* p = sums.values + r * e + c;
        store_f32(p, mul(load_f32(p), splat(factor)));
      }
      sums.totals[r] *= factor;
    }
    sums.largest[r] = now;
  }
  sums.totals[r] += lane_sum(total);
}

// A strip's rows: those of `queries` queries from `first` on, head by head within a query.
struct Strip {
  int64_t b, g, first, queries;
};

template <RowKind T>
void load_rows(const Heads& heads, int64_t b, int64_t h, int64_t start, int count, int64_t d, float* out) {
  for (int j = 0; j < count; ++j) {
    const char* row = heads.at(b, h, start + j);
    for (int64_t c = 0; c < d; c += kFloats) store_f32(out + j * d + c, load_at<T>(row, c));
  }
}

// The rows [start, start + count) of a head as floats.
void load_rows(const Heads& heads, int64_t b, int64_t h, int64_t start, int count, int64_t d, float* out) {
  switch (heads.kind) {
    case RowKind::kFloat: return load_rows<RowKind::kFloat>(heads, b, h, start, count, d, out);
    case RowKind::kHalf: return load_rows<RowKind::kHalf>(heads, b, h, start, count, d, out);
    case RowKind::kBFloat16: return load_rows<RowKind::kBFloat16>(heads, b, h, start, count, d, out);
    default:
      for (int j = 0; j < count; ++j) load_row(heads.kind, heads.at(b, h, start + j), d, out + j * d);
  }
}

// The tile's keys as floats, transposed by panels or not.
void load_keys(const Problem& p, const Strip& s, int64_t start, int count, bool transposes, float* keys) {
  if (!transposes) return load_rows(p.k, s.b, s.g, start, count, p.d, keys);
  thread_local Scratch<float> scratch;
  float* rows = scratch.reserve(kKeys * p.d);
  load_rows(p.k, s.b, s.g, start, count, p.d, rows);
  const int64_t padded = round_up(count, kPanel);
  std::fill(rows + count * p.d, rows + padded * p.d, 0.0f);
  for (int64_t j = 0; j < padded; j += kFloats) {
    float* out = keys + j / kPanel * kPanel * p.d + j % kPanel;
    for (int64_t c = 0; c < p.d; c += 8) {
      transpose_dwords(reinterpret_cast<const uint8_t*>(rows + j * p.d + c), 4 * p.d,
                       reinterpret_cast<uint8_t*>(out + c * kPanel), 4 * kPanel);
    }
  }
}

// Adds the keys [begin, end) to the sums of a strip of many rows; no row meets the keys behind its range.
void meet_tiles(const Problem& p, const Strip& s, const float* queries, int64_t begin, int64_t end, const Range* ranges,
                const Sums& sums) {
  thread_local Scratch<float> scratch;
  float* scores = scratch.reserve(kKeys * (kColumnRows + p.d + p.e));
  float* keys = scores + kColumnRows * kKeys;
  float* values = keys + kKeys * p.d;
  for (int64_t start = begin; start < end; start += kKeys) {
    const int64_t tile = std::min<int64_t>(kKeys, end - start);
    load_keys(p, s, start, static_cast<int>(tile), true, keys);
    load_rows(p.v, s.b, s.g, start, static_cast<int>(tile), p.e, values);
    by_rows<kColumnRows>(s.queries * p.sharing(), [&](int64_t r, auto some) {
      constexpr int kR = decltype(some)::value;
      int64_t last = 0;
      for (int i = 0; i < kR; ++i) last = std::max(last, ranges[r + i].end);
      const int count = static_cast<int>(std::min(tile, last - start));
      if (count <= 0) return;
      score_columns<kR>(queries + r * p.d, p.d, keys, count, scores);
      for (int i = 0; i < kR; ++i) weigh(ranges[r + i], start, count, p.e, scores + i * kKeys, r + i, sums);
      add_values<RowKind::kFloat, kR>(scores, reinterpret_cast<const char*>(values), 4 * p.e, count, p.e,
                                      sums.values + r * p.e);
    });
  }
}

// The same for a few rows, which read keys and values where they are unless those are codes.
template <RowKind T, int kR>
void meet_keys(const Problem& p, const Strip& s, const float* queries, int64_t begin, int64_t end, const Range* ranges,
               const Sums& sums) {
  thread_local Scratch<float> scratch;
  const bool converts = quantized(p.k.kind);
  float* scores = scratch.reserve(kKeys * (kR + (converts ? p.d + p.e : 0)));
  float* keys = scores + kR * kKeys;
  float* values = keys + kKeys * p.d;
  for (int64_t start = begin; start < end; start += kKeys) {
    const int count = static_cast<int>(std::min<int64_t>(kKeys, end - start));
    if (converts) {
      load_keys(p, s, start, count, false, keys);
      load_rows(p.v, s.b, s.g, start, count, p.e, values);
    }
    const char* key = converts ? reinterpret_cast<const char*>(keys) : p.k.at(s.b, s.g, start);
    const char* value = converts ? reinterpret_cast<const char*>(values) : p.v.at(s.b, s.g, start);
    score_keys<T, kR>(queries, p.d, key, converts ? p.d * 4 : p.k.row, count, scores);
    for (int r = 0; r < kR; ++r) weigh(ranges[r], start, count, p.e, scores + r * kKeys, r, sums);
    add_values<T, kR>(scores, value, converts ? p.e * 4 : p.v.row, count, p.e, sums.values);
  }
}

void meet_keys(const Problem& p, const Strip& s, const float* queries, int64_t begin, int64_t end, const Range* ranges,
               const Sums& sums) {
  const int64_t rows = s.queries * p.sharing();
  if (rows > kRowsAtOnce) return meet_tiles(p, s, queries, begin, end, ranges, sums);
  by_rows<kRowsAtOnce>(rows, [&](int64_t, auto some) {
    constexpr int kR = decltype(some)::value;
    switch (p.k.kind) {
      case RowKind::kHalf: return meet_keys<RowKind::kHalf, kR>(p, s, queries, begin, end, ranges, sums);
      case RowKind::kBFloat16: return meet_keys<RowKind::kBFloat16, kR>(p, s, queries, begin, end, ranges, sums);
      default: return meet_keys<RowKind::kFloat, kR>(p, s, queries, begin, end, ranges, sums);
    }
  });
}

}  // namespace
}  // namespace autoq
