// Column factors of one tile of a weight (SINQ). The reference is autoq.numerics.sinkhorn; its comments say what is
// computed and why. The tile is copied once and stays in the cache through all iterations.
// Legend: H rows and K columns of the tile, without those that are constant.
#include "sinkhorn.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace autoq {
namespace {

constexpr int64_t kMinRows = 16, kMinColumns = 2;
constexpr int64_t kBlockRows = 32;  // 32 rows of 128 columns are half of a first-level cache
constexpr float kSmallestStep = 0.7f, kLargestStep = 2.0f;

struct Tile {
  int64_t rows, columns;
  std::vector<float> values;            // [rows, columns]
  std::vector<int64_t> kept;            // which columns of the weight's tile these are

  float* row(int64_t h) { return values.data() + h * columns; }
};

// Masks of the rows and columns that are not constant; true if none is.
bool varying(Tile& tile, std::vector<char>& rows, std::vector<char>& columns) {
  std::vector<float> low(tile.row(0), tile.row(1)), high = low;
  rows.assign(tile.rows, 0);
  columns.assign(tile.columns, 0);
  bool all = true;
  for (int64_t h = 0; h < tile.rows; ++h) {
    const float* v = tile.row(h);
    const Extremes range = extremes(v, tile.columns);
    rows[h] = range.high > range.low;
    all = all && rows[h];
    for (int64_t k = 0; k < tile.columns; ++k) {
      low[k] = std::min(v[k], low[k]);
      high[k] = std::max(v[k], high[k]);
    }
  }
  for (int64_t k = 0; k < tile.columns; ++k) {
    columns[k] = high[k] > low[k];
    all = all && columns[k];
  }
  return all;
}

// Leaves out constant rows and columns, until none is constant within the selection of the others.
void drop_constant(Tile& tile) {
  std::vector<char> rows, columns;
  while (tile.rows > 0 && tile.columns > 0 && !varying(tile, rows, columns)) {
    float* out = tile.values.data();
    int64_t kept_rows = 0, kept_columns = 0;
    for (int64_t h = 0; h < tile.rows; ++h) {
      if (!rows[h]) continue;
      const float* v = tile.row(h);
      for (int64_t k = 0; k < tile.columns; ++k) {
        if (columns[k]) *out++ = v[k];
      }
      ++kept_rows;
    }
    for (int64_t k = 0; k < tile.columns; ++k) {
      if (columns[k]) tile.kept[kept_columns++] = tile.kept[k];
    }
    tile.rows = kept_rows;
    tile.columns = kept_columns;
    tile.kept.resize(kept_columns);
  }
}

// Divides by the largest magnitude, so that squares stay finite, then by the standard deviation.
void normalise(Tile& tile) {
  const int64_t count = tile.rows * tile.columns;
  float* v = tile.values.data();
  const float peak = largest_magnitude(v, count);
  double sum = 0.0, square = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    v[i] /= peak;
    sum += v[i];
  }
  const double mean = sum / static_cast<double>(count);
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < count; ++i) square += (v[i] - mean) * (v[i] - mean);
  const auto deviation = static_cast<float>(std::sqrt(square / static_cast<double>(count - 1)));
  for (int64_t i = 0; i < count; ++i) v[i] /= deviation;
}

// Means and sums of squared distances from them, merged block by block (Chan, Golub and LeVeque): exact enough for
// columns whose mean is far larger than their deviation, and for any number of rows.
struct Moments {
  std::vector<double> mean, square;
  double count = 0.0;

  explicit Moments(int64_t columns) : mean(columns, 0.0), square(columns, 0.0) {}

  void merge(int64_t rows, const float* block_mean, const float* block_square) {
    const double added = static_cast<double>(rows), total = count + added;
    for (size_t k = 0; k < mean.size(); ++k) {
      const double distance = block_mean[k] - mean[k];
      mean[k] += distance * (added / total);
      square[k] += block_square[k] + distance * distance * (count * added / total);
    }
    count = total;
  }
};

float deviation(double square, double count) { return static_cast<float>(std::sqrt(square / (count - 1.0))); }

// Standard deviations of the tile divided by t and r.
class Deviations {
 public:
  Deviations(int64_t rows, int64_t columns)
      : column(columns), row(rows), inverse_t_(columns), scaled_(kBlockRows * columns), mean_(columns), square_(columns) {}

  std::vector<float> column, row;

  void measure(Tile& tile, const std::vector<float>& t, const std::vector<float>& r) {
    Moments moments(tile.columns);
    for (int64_t k = 0; k < tile.columns; ++k) inverse_t_[k] = 1.0f / t[k];
    for (int64_t h = 0; h < tile.rows; h += kBlockRows) {
      const int64_t count = std::min(kBlockRows, tile.rows - h);
      measure_block(tile, r, h, count);
      moments.merge(count, mean_.data(), square_.data());
    }
    for (int64_t k = 0; k < tile.columns; ++k) column[k] = deviation(moments.square[k], moments.count);
  }

 private:
  // Row deviations of `count` rows from h on; means and squares of their columns.
  void measure_block(Tile& tile, const std::vector<float>& r, int64_t h, int64_t count) {
    const int64_t columns = tile.columns;
    float *mean = mean_.data(), *square = square_.data();
    std::fill_n(mean, columns, 0.0f);
    std::fill_n(square, columns, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
      row[h + i] = scale_row(tile.row(h + i), 1.0f / r[h + i], columns, scaled_.data() + i * columns);
    }
    for (int64_t k = 0; k < columns; ++k) mean[k] /= static_cast<float>(count);
    for (int64_t i = 0; i < count; ++i) {
      const float* v = scaled_.data() + i * columns;
#pragma omp simd
      for (int64_t k = 0; k < columns; ++k) square[k] += (v[k] - mean[k]) * (v[k] - mean[k]);
    }
  }

  // out = w / t / r, added to the column sums; returns the row's deviation.
  float scale_row(const float* w, float inverse_r, int64_t columns, float* out) {
    const float* inverse_t = inverse_t_.data();
    float *sums = mean_.data(), sum = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < columns; ++k) {
      const float v = w[k] * inverse_t[k] * inverse_r;
      out[k] = v;
      sums[k] += v;
      sum += v;
    }
    const float mean = sum / static_cast<float>(columns);
#pragma omp simd reduction(+ : square)
    for (int64_t k = 0; k < columns; ++k) square += (out[k] - mean) * (out[k] - mean);
    return deviation(square, static_cast<double>(columns));
  }

  std::vector<float> inverse_t_, scaled_, mean_, square_;
};

void update(std::vector<float>& factor, const std::vector<float>& deviation, float target) {
  static const float smallest = static_cast<float>(std::exp(-0.3)), largest = static_cast<float>(std::exp(10.0));
  for (size_t i = 0; i < factor.size(); ++i) {
    const float step = std::clamp(deviation[i] / target, kSmallestStep, kLargestStep);
    factor[i] = std::clamp(factor[i] * step, smallest, largest);
  }
}

// Column factors of the iterate with the smallest imbalance before its first rise.
std::vector<float> balance(Tile& tile, int64_t iterations) {
  std::vector<float> t(tile.columns, 1.0f), r(tile.rows, 1.0f), best_t = t;
  Deviations found(tile.rows, tile.columns);
  double best = std::numeric_limits<double>::infinity();
  float target = 0.0f;
  for (int64_t iteration = 0; iteration < iterations; ++iteration) {
    found.measure(tile, t, r);
    const auto [column_low, column_high] = std::minmax_element(found.column.begin(), found.column.end());
    const auto [row_low, row_high] = std::minmax_element(found.row.begin(), found.row.end());
    const double smallest = std::min(*column_low, *row_low), largest = std::max(*column_high, *row_high);
    const double imbalance = largest / std::max(smallest, 1e-12);
    if (imbalance > best) break;
    best = imbalance;
    best_t = t;
    if (iteration == 0) target = static_cast<float>(std::clamp(smallest, 1e-3, 1e3) + 1e-6);
    update(t, found.column, target);
    update(r, found.row, target);
  }
  return best_t;
}

}  // namespace

void sinkhorn_tile(const Source& w, int64_t n, int64_t first, int64_t count, int64_t iterations, float* t) {
  Tile tile{n, count, std::vector<float>(n * count), std::vector<int64_t>(count)};
  for (int64_t k = 0; k < count; ++k) tile.kept[k] = k;
  for (int64_t h = 0; h < n; ++h) read_row(w, h, first, count, tile.row(h));
  std::fill_n(t, count, 1.0f);
  drop_constant(tile);
  if (tile.rows < kMinRows || tile.columns < kMinColumns) return;
  normalise(tile);
  const std::vector<float> factors = balance(tile, iterations);
  const double sum = std::accumulate(factors.begin(), factors.end(), 0.0);
  const float mean = static_cast<float>(sum / static_cast<double>(tile.columns));
  for (int64_t k = 0; k < tile.columns; ++k) t[tile.kept[k]] = factors[k] / mean;
}

}  // namespace autoq
