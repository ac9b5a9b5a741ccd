#pragma once

#include <cstdint>

#include "packed.h"
#include "quantize_grid.h"
#include "quantize_source.h"

namespace autoq {

// Both fill rows [begin, end) of every section of a packed weight but the column scale, by which they divide.

// Rounds to nearest: int8, fp6, or the affine grid from a group's minimum to its maximum. The references are
// autoq.numerics.int8_rows, fp6_rows and rtn.
void round_rows(const Source& w, const Packed& out, int64_t begin, int64_t end);

// Half-quadratic quantization of an affine weight; the reference is autoq.numerics.hqq.
void hqq_rows(const Source& w, const Packed& out, const HqqForm& form, int64_t begin, int64_t end);

}  // namespace autoq
