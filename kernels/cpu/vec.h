// Vectors of integers and floats, as wide as the build's instruction set has them.
//
// A set is one header that defines the names below and sets AUTOQ_VECTOR_BITS; decode.h has its codes' unpacking.
// A new one (NEON; AMX for the tiles of gemm.h) is a header here, a branch below, and an Isa in toolchain.py.
//
//   I16, I32, F32      vectors of int16, int32, float
//   load_, store_, splat, zero_, broadcast, mul, div, sub, fma, to_float, round_to_int, narrow, widen_low, widen_high
//   madd(acc, a, b)    acc[j] + a[2j]·b[2j] + a[2j+1]·b[2j+1], int16 into int32
//   transpose_dwords   8 dwords of each of kFloats rows, turned into 8 vectors
//   dot8(acc, a, b)    acc[j] + Σ a[4j+i]·b[4j+i], a unsigned, b signed bytes (AUTOQ_DOT8 only)
//   add_pairs8(acc, a, b)  acc[j] + a[2j]·b[2j] + a[2j+1]·b[2j+1], the same in int16 (AUTOQ_PAIRS8 only)
#pragma once

#include <cstdint>
#include <cstring>

#if defined(AUTOQ_EMULATION)  // a header that says which set it emulates; see tests/kernels/emulation.h
#include AUTOQ_EMULATION
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__AVX512VNNI__)
#define AUTOQ_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define AUTOQ_AVX2 1
#ifdef __AVXVNNI__
#define AUTOQ_AVXVNNI 1
#endif
#endif

#if defined(AUTOQ_AVX512) || defined(AUTOQ_AVXVNNI)
#define AUTOQ_DOT8 1
#elif defined(AUTOQ_AVX2)
#define AUTOQ_PAIRS8 1
#endif

#if defined(AUTOQ_AVX512)
#include "vec_avx512.h"
#elif defined(AUTOQ_AVX2)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

namespace autoq {
namespace {

constexpr int kFloats = sizeof(F32) / sizeof(float);    // floats or int32 in a vector
constexpr int kShorts = 2 * kFloats;                    // int16 in a vector
constexpr int kParts = 32 / kShorts;                    // vectors of int16 in a block of 32 inputs
constexpr int kFloatParts = 32 / kFloats;               // vectors of floats in one

}  // namespace
}  // namespace autoq
