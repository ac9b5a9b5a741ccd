// Single numbers of the three float types, and scratch memory.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <memory>
#include <type_traits>
#include <vector>

#include "packed.h"

namespace autoq {
namespace {

inline float half_to_float(uint16_t bits) { return c10::Half(bits, c10::Half::from_bits()); }

// Calls f with the array as a pointer of its own type.
template <class F>
auto with_type(Typed a, F&& f) {
  switch (a.dtype) {
    case DType::kHalf: return f(static_cast<c10::Half*>(a.data));
    case DType::kBFloat16: return f(static_cast<c10::BFloat16*>(a.data));
    default: return f(static_cast<float*>(a.data));
  }
}

inline float load(Typed a, int64_t i) {
  return with_type(a, [i](const auto* p) { return static_cast<float>(p[i]); });
}

inline void store(Typed a, int64_t i, float v) {
  with_type(a, [=](auto* p) { p[i] = static_cast<std::decay_t<decltype(*p)>>(v); });
}

// Memory that a thread keeps between calls, from a cache line's start (a vector load across two lines costs two);
// grown, never shrunk, so callers ask for bounded sizes only.
template <class T>
class Scratch {
 public:
  T* reserve(int64_t count) {
    constexpr size_t kLine = 64;
    if (memory_.size() < count * sizeof(T) + kLine) memory_.resize(count * sizeof(T) + kLine);
    void* start = memory_.data();
    size_t space = memory_.size();
    return static_cast<T*>(std::align(kLine, count * sizeof(T), start, space));
  }

 private:
  std::vector<char> memory_;
};

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace
}  // namespace autoq
