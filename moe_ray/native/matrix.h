// Matrices as the kernels read them: one block of memory that begins with a Header and describes itself, so that it can be
// copied to another replica as it is. Outputs lie in panels of 16; several matrices of one shape may alternate by panel.
#pragma once

#include <algorithm>

#include "dots.h"
#include "pool.h"

namespace moe_ray {

enum Kind : int32_t { kFloat32 = 1, kBfloat16 = 2, kFloat16 = 3, kInt8 = 4, kInt4 = 5 };  // the wire's numbers of dtypes

constexpr int kPanel = 16;

struct Header {
  int32_t kind, group;  // group: inputs that share a scale: 32, 64 or 128; floats: 0
  int64_t n, k, count;  // outputs and inputs of each matrix; matrices
  int32_t has_offsets, has_table, has_order;
  float multiplier;  // of every scale and offset: a power of two that keeps them in float16's range
  int8_t table[16];    // values of codes
  int32_t wide_inputs;  // of 8-bit codes: multiplied by inputs of 16 bits, where fewer would be faster
  int8_t unused[188];
};
static_assert(sizeof(Header) == 256);

inline int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }
inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Matrix {
  const Header* head;
  half *scales, *offsets;  // [panels][groups][16]
  int32_t* order;          // [k] the input of each column
  uint8_t* data;           // [panels][...]

  int64_t k() const { return head->k; }
  int64_t panels() const { return head->count * panels_of(head->n); }
  int64_t groups() const { return head->group ? head->k / head->group : 0; }
  int64_t panel_bytes() const {
    switch (head->kind) {
      case kFloat32: return k() * kPanel * 4;
      case kInt8: return k() * kPanel;
      case kInt4: return k() * kPanel / 2;
      default: return k() * kPanel * 2;
    }
  }
};

// The parts of the block at `memory`, of which only the header needs to be written.
inline Matrix matrix_at(const void* memory) {
  auto* at = const_cast<uint8_t*>(static_cast<const uint8_t*>(memory));
  Matrix m{reinterpret_cast<const Header*>(at), nullptr, nullptr, nullptr, nullptr};
  at += sizeof(Header);
  const int64_t of_groups = aligned(m.panels() * m.groups() * kPanel * sizeof(half));
  m.scales = reinterpret_cast<half*>(at);
  at += of_groups;
  m.offsets = m.head->has_offsets ? reinterpret_cast<half*>(at) : nullptr;
  at += m.head->has_offsets ? of_groups : 0;
  m.order = m.head->has_order ? reinterpret_cast<int32_t*>(at) : nullptr;
  at += m.head->has_order ? aligned(m.k() * 4) : 0;
  m.data = at;
  return m;
}

inline int64_t matrix_bytes(const Matrix& m) {
  return m.data - reinterpret_cast<const uint8_t*>(m.head) + m.panels() * m.panel_bytes();
}

// Where weight (row, column) of a panel lies: its byte, or half of one.
inline int64_t place_of(int32_t kind, int64_t row, int64_t column) {
  switch (kind) {
    case kFloat32: return (column * kPanel + row) * 4;
    case kFloat16: return (column * kPanel + row) * 2;
    case kBfloat16: return (column / 2 * kPanel + row) * 4 + column % 2 * 2;
    case kInt8: return (column / 4 * kPanel + row) * 4 + column % 4;
    default: return (column / 8 * kPanel + row) * 4 + column % 4;  // int4: low half for inputs 0 to 3 of 8, high for 4 to 7
  }
}

// Writes the rows of matrix `which` panel by panel, 16 rows side by side by unit: the weights that fill sizeof(Unit) bytes
// there. unit(row, u): unit `u` of a row.
template <class Unit, class UnitOf>
void interleave(Pool& pool, const Matrix& m, int64_t which, const UnitOf& unit) {
  const int64_t units = m.panel_bytes() / (kPanel * sizeof(Unit));
  pool.run(static_cast<int>(panels_of(m.head->n)), false, [&](int p, int) {
    auto* panel = reinterpret_cast<Unit*>(m.data + (which + p * m.head->count) * m.panel_bytes());
    const int64_t first = p * kPanel, rows = m.head->n - first;
    for (int64_t u = 0; u < units; u++)
      for (int64_t r = 0; r < kPanel; r++) panel[u * kPanel + r] = r < rows ? unit(first + r, u) : Unit{0};
  });
}

template <class Unit>
Unit unit_at(const uint8_t* from) {
  Unit unit;
  std::memcpy(&unit, from, sizeof(Unit));
  return unit;
}

// Packs matrix `which`, w [n, k] of the block's own float type.
inline void pack_floats(Pool& pool, const Matrix& m, int64_t which, const uint8_t* w) {
  const int64_t row_bytes = m.panel_bytes() / kPanel;
  const auto two = [&](int64_t row, int64_t u) { return unit_at<uint16_t>(w + row * row_bytes + u * 2); };
  const auto four = [&](int64_t row, int64_t u) { return unit_at<uint32_t>(w + row * row_bytes + u * 4); };
  if (m.head->kind == kFloat16) interleave<uint16_t>(pool, m, which, two);
  else interleave<uint32_t>(pool, m, which, four);  // float32, or pairs of bfloat16
}

// Packs matrix `which` of codes [n, k] and scales, offsets [n, k / group] that are divided by the multiplier already;
// `group`: theirs, a multiple of the block's.
inline void pack_codes(Pool& pool, const Matrix& m, int64_t which, const uint8_t* codes, const float* scales,
                       const float* offsets, int64_t group) {
  const int64_t n = m.head->n, k = m.k(), groups = m.groups(), finer = group / m.head->group;
  const auto bytes = [&](int64_t row, int64_t u) { return unit_at<uint32_t>(codes + row * k + u * 4); };
  const auto halves = [&](int64_t row, int64_t u) {  // inputs 0 to 3 of 8 in the low halves, 4 to 7 in the high ones
    const auto eight = unit_at<uint64_t>(codes + row * k + u * 8);
    return static_cast<uint32_t>(eight | eight >> 28);
  };
  if (m.head->kind == kInt8) interleave<uint32_t>(pool, m, which, bytes);
  else interleave<uint32_t>(pool, m, which, halves);
  pool.run(static_cast<int>(panels_of(n)), false, [&](int p, int) {
    const int64_t panel = which + p * m.head->count;
    for (int64_t g = 0; g < groups; g++) {
      float of_scales[kPanel], of_offsets[kPanel];
      for (int64_t r = 0; r < kPanel; r++) {
        const int64_t row = p * kPanel + r, at = row * (groups / finer) + g / finer;
        of_scales[r] = row < n ? scales[at] : 0.0f;
        of_offsets[r] = row < n && offsets ? offsets[at] : 0.0f;
      }
      store(m.scales + (panel * groups + g) * kPanel, load(of_scales));
      if (m.offsets) store(m.offsets + (panel * groups + g) * kPanel, load(of_offsets));
    }
  });
}

inline int table_value(const Matrix& m, int code) {
  const int stored = m.head->table[code];
  return Nibbles<true>::kTableMiddle ? (stored & 255) - Nibbles<true>::kTableMiddle : stored;
}

// Rows `ids` of the first matrix, as float32 [count, k].
inline void unpack_rows(const Matrix& m, const int64_t* ids, int64_t count, float* out) {
  const int64_t k = m.k(), group = m.head->group;
  for (int64_t i = 0; i < count; i++) {
    const int64_t panel = ids[i] / kPanel * m.head->count, r = ids[i] % kPanel;
    const uint8_t* data = m.data + panel * m.panel_bytes();
    float lanes[kPanel], scale = 0.0f, offset = 0.0f;
    for (int64_t j = 0; j < k; j++) {
      const uint8_t* at = data + place_of(m.head->kind, r, j);
      float value = 0.0f;
      if (group && j % group == 0) {
        const int64_t g = (panel * m.groups() + j / group) * kPanel;
        store(lanes, load(m.scales + g));
        scale = lanes[r] * m.head->multiplier;
        if (m.offsets) store(lanes, load(m.offsets + g));
        offset = m.offsets ? lanes[r] * m.head->multiplier : 0.0f;
      }
      switch (m.head->kind) {
        case kFloat32: std::memcpy(&value, at, 4); break;
        case kBfloat16: {
          uint16_t bits;
          std::memcpy(&bits, at, 2);
          const uint32_t wide = static_cast<uint32_t>(bits) << 16;
          std::memcpy(&value, &wide, 4);
          break;
        }
        case kFloat16: {
          half several[kPanel] = {};
          std::memcpy(several, at, 2);
          store(lanes, load(several));
          value = lanes[0];
          break;
        }
        case kInt8: value = scale * (*at - 128) + offset; break;
        case kInt4: {
          const int code = j % 8 < 4 ? *at & 15 : *at >> 4;
          value = scale * (m.head->has_table ? table_value(m, code) : code - 8) + offset;
          break;
        }
      }
      out[i * k + (m.order ? m.order[j] : j)] = value;
    }
  }
}

}  // namespace moe_ray
