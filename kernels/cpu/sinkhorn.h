#pragma once

#include <cstdint>

#include "quantize_source.h"

namespace autoq {

// t[k] for the columns [first, first + count) of a weight of n rows: the column factors of autoq.numerics.sinkhorn.
void sinkhorn_tile(const Source& w, int64_t n, int64_t first, int64_t count, int64_t iterations, float* t);

}  // namespace autoq
