// Reads the header of a packed weight; every later access relies on these checks.
#include "packed.h"

#include <cstring>

namespace autoq {
namespace {

constexpr int64_t kTrailingBytes = 64;  // kernels read whole vectors, so the last section is never the end
constexpr int64_t kMaxSize = int64_t{1} << 40;

struct Fields {  // the sixteen int64 in order
  int64_t magic, version, kind, bits, n, k, group_size, groups;
  int64_t codes, scale, minimum, row_scale, column_scale;
  int64_t activation_bits, m_switch, total;
};
static_assert(sizeof(Fields) == kHeaderBytes);

bool known_bits(const Fields& f) {
  switch (static_cast<Kind>(f.kind)) {
    case Kind::kDense: return f.bits == 16 || f.bits == 17 || f.bits == 32;
    case Kind::kInt8: return f.bits == 8;
    case Kind::kAffine: return f.bits == 3 || f.bits == 4 || f.bits == 5 || f.bits == 6 || f.bits == 8;
    case Kind::kFp6E3M2:
    case Kind::kFp6E2M3: return f.bits == 6;
  }
  return false;
}

int64_t padded_inputs(const Fields& f) {
  switch (static_cast<Kind>(f.kind)) {
    case Kind::kAffine: return f.groups * f.group_size;
    case Kind::kFp6E3M2:
    case Kind::kFp6E2M3: return (f.k + kBlock - 1) / kBlock * kBlock;
    default: return f.k;
  }
}

const char* check_form(const Fields& f) {
  if (f.n < 1 || f.k < 1 || f.n > kMaxSize / f.k) return "its header has an impossible shape";
  if (!known_bits(f)) return "its header has an unknown kind or bit width";
  if (f.kind == static_cast<int64_t>(Kind::kAffine)) {
    if (f.group_size < kBlock || f.group_size % kBlock || f.group_size > kMaxSize / f.n ||
        f.groups != (f.k + f.group_size - 1) / f.group_size) {
      return "its header has an impossible group size";
    }
  }
  const auto kind = static_cast<Kind>(f.kind);
  if (f.activation_bits != 0 && (f.activation_bits != 8 || (kind != Kind::kInt8 && kind != Kind::kAffine))) {
    return "its header has activation bits this kernel does not know";
  }
  if (f.m_switch < 0 || (f.m_switch > 0 && f.activation_bits == 0)) return "its header has an impossible m_switch";
  return nullptr;
}

const char* check_sections(const Fields& f) {
  const bool affine = f.kind == static_cast<int64_t>(Kind::kAffine);
  const bool dense = f.kind == static_cast<int64_t>(Kind::kDense);
  const int64_t code_bits = dense ? (f.bits == 32 ? 32 : 16) : f.bits;
  const int64_t scale_bytes = affine ? 2 * f.n * f.groups : 4 * f.n;
  const struct {
    int64_t offset, bytes;
    bool required;
  } sections[] = {
      {f.codes, f.n * padded_inputs(f) * code_bits / 8, true},
      {f.scale, scale_bytes, !dense},
      {f.minimum, scale_bytes, false},
      {f.row_scale, 4 * f.n, false},
      {f.column_scale, 4 * f.k, false},
  };
  for (const auto& s : sections) {
    if (s.offset == 0 && !s.required) continue;
    if (s.offset < kHeaderBytes || s.offset % 64 || s.offset > f.total - kTrailingBytes - s.bytes) {
      return "its header has a section outside the buffer";
    }
  }
  return nullptr;
}

}  // namespace

const char* parse(const uint8_t* head, int64_t available, Packed* packed) {
  Fields f;
  if (available < kHeaderBytes) return "it is shorter than a header";
  std::memcpy(&f, head, sizeof f);
  if (f.magic != kMagic) return "it does not start with the mark of a packed weight";
  if (f.version != kVersion) return "it is of another version than this kernel reads";
  if (f.total < kHeaderBytes + kTrailingBytes) return "its header has an impossible size";
  if (f.total > available) return "it was copied without its weight: pass a view of the packed buffer's first bytes";
  if (const char* broken = check_form(f)) return broken;
  if (const char* broken = check_sections(f)) return broken;
  const auto at = [&](int64_t offset) { return offset ? head + offset : nullptr; };
  const bool affine = f.kind == static_cast<int64_t>(Kind::kAffine);
  *packed = {
      static_cast<Kind>(f.kind), f.bits, f.n, f.k, f.group_size, f.groups, f.activation_bits, f.m_switch,
      padded_inputs(f),
      at(f.codes), at(f.scale), reinterpret_cast<const uint16_t*>(affine ? at(f.minimum) : nullptr),
      reinterpret_cast<const float*>(affine ? at(f.row_scale) : nullptr), reinterpret_cast<const float*>(at(f.column_scale))};
  return nullptr;
}

}  // namespace autoq
