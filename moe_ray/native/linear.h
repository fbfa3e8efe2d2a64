// x W^T for matrices of matrix.h, with float32 sums.
//
// Every output is one sum whose terms are added in one order, whatever the number of rows or threads: for floats over the
// inputs one after the other; for integers exactly within a group, and over the groups in float32. So a row's result does
// not depend on the rows beside it.
#pragma once

#include "activations.h"

namespace moe_ray {

constexpr int kGroup = 4;  // panels per chunk of work
constexpr int kMostRows = kRegisters == 32 ? 12 : 6;  // of one tile
constexpr int kAhead = 2048;                          // bytes of a panel fetched ahead of use
constexpr int64_t kAloneBytes = 160 << 10;            // a smaller product is done before a helper wakes
constexpr int64_t kCachedBytes = 256 << 10;           // panels that stay in the cache while rows pass by

struct Tile {
  alignas(64) float value[kMostRows][kGroup * kPanel];
};

// How many panels of so many rows are summed at once: what the registers hold. Integers have a sum of floats beside theirs.
constexpr int panels_at_once(int rows, bool integers) {
  if (kRegisters == 32) return rows <= (integers ? 4 : 6) ? 4 : 2;
  return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
}

// One step of all panels, `at` bytes from their beginnings: together where the registers hold their weights, else one panel
// after the other.
template <class Of, int ROWS, int PANELS>
inline void steps(const uint8_t* w, int64_t at, int64_t stride, const Whole& table, const typename Of::Input* x, int64_t ldx,
                  typename Of::Sums (*sums)[ROWS]) {
  // Behind the end of these panels come those that are multiplied next.
  const uint8_t* soon = w + kAhead + (at + kAhead < stride ? 0 : (PANELS - 1) * stride);
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; p++)
    for (int line = 0; line < Of::kBytes; line += 64) prefetch(soon + p * stride + line);
  if constexpr (kRegisters == 32) {
    step<Of, ROWS, PANELS>(w, stride, table, x, ldx, sums);
  } else {
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++) step<Of, ROWS, 1>(w + p * stride, stride, table, x, ldx, sums + p);
  }
}

template <class Of, int ROWS, int PANELS>
void float_tile(const Inputs& in, int64_t row, const Matrix& m, int64_t panel, Tile& out, int column) {
  Lanes sums[PANELS][ROWS];
  for (int p = 0; p < PANELS; p++)
    for (int i = 0; i < ROWS; i++) sums[p][i] = all(0.0f);
  const auto* x = static_cast<const typename Of::Input*>(in.rows) + row * in.ld;
  const uint8_t* w = m.data + panel * m.panel_bytes();
  const int64_t stride = m.panel_bytes();
  const Whole no_table = whole_zero();
  for (int64_t at = 0; at < stride; at += Of::kBytes, w += Of::kBytes, x += Of::kInputs)
    steps<Of, ROWS, PANELS>(w, at, stride, no_table, x, in.ld, sums);
  for (int p = 0; p < PANELS; p++)
    for (int i = 0; i < ROWS; i++) store(out.value[i] + (column + p) * kPanel, sums[p][i]);
}

template <class Of, int ROWS, int PANELS>
void integer_tile(const Inputs& in, int64_t row, const Matrix& m, int64_t panel, Tile& out, int column) {
  Lanes totals[PANELS][ROWS];
  for (int p = 0; p < PANELS; p++)
    for (int i = 0; i < ROWS; i++) totals[p][i] = all(0.0f);
  const Whole table = whole_table(m.head->table);
  const int64_t groups = m.groups(), stride = m.panel_bytes(), blocks = m.head->group / 32;
  const auto* x = static_cast<const typename Of::Input*>(in.rows) + row * in.ld;
  const uint8_t* w = m.data + panel * stride;
  for (int64_t g = 0, at = 0; g < groups; g++) {
    typename Of::Sums sums[PANELS][ROWS];
    for (int p = 0; p < PANELS; p++)
      for (int i = 0; i < ROWS; i++) sums[p][i] = Of::begun(in.starts[(row + i) * groups + g]);
    for (int64_t b = 0; b < blocks; b++) {
#pragma GCC unroll 4
      for (int eight = 0; eight < 4; eight++, at += Of::kBytes, w += Of::kBytes, x += Of::kInputs)
        steps<Of, ROWS, PANELS>(w, at, stride, table, x, in.ld, sums);
      for (int p = 0; p < PANELS; p++)
        for (int i = 0; i < ROWS; i++) Of::settle(sums[p][i]);
    }
    for (int p = 0; p < PANELS; p++) {
      const int64_t at = ((panel + p) * groups + g) * kPanel;
      const Lanes scales = load(m.scales + at);
      for (int i = 0; i < ROWS; i++) {
        const Lanes scale = scales * all(in.scales[(row + i) * groups + g]);
        totals[p][i] = plus_product(whole_floats(Of::total(sums[p][i])), scale, totals[p][i]);
      }
      if (m.offsets) {
        const Lanes offsets = load(m.offsets + at);
        for (int i = 0; i < ROWS; i++)
          totals[p][i] = plus_product(offsets, all(in.sums[(row + i) * groups + g]), totals[p][i]);
      }
    }
  }
  const Lanes multiplier = all(m.head->multiplier);
  for (int p = 0; p < PANELS; p++)
    for (int i = 0; i < ROWS; i++) store(out.value[i] + (column + p) * kPanel, totals[p][i] * multiplier);
}

template <class Of, int ROWS, int PANELS>
void tile(const Inputs& in, int64_t row, const Matrix& m, int64_t panel, Tile& out, int column) {
  if constexpr (Of::kIntegers) integer_tile<Of, ROWS, PANELS>(in, row, m, panel, out, column);
  else float_tile<Of, ROWS, PANELS>(in, row, m, panel, out, column);
}

// ROWS rows and `count` panels, from `panel` on.
template <class Of, int ROWS>
void strip(const Inputs& in, int64_t row, const Matrix& m, int64_t panel, int count, Tile& out) {
  constexpr int kAtOnce = panels_at_once(ROWS, Of::kIntegers);
  int done = 0;
  for (; done + kAtOnce <= count; done += kAtOnce) tile<Of, ROWS, kAtOnce>(in, row, m, panel + done, out, done);
  for (; done < count; done++) tile<Of, ROWS, 1>(in, row, m, panel + done, out, done);
}

template <class Of>
void strip_of(int rows, const Inputs& in, int64_t row, const Matrix& m, int64_t panel, int count, Tile& out) {
  switch (rows) {
    case 1: return strip<Of, 1>(in, row, m, panel, count, out);
    case 2: return strip<Of, 2>(in, row, m, panel, count, out);
    case 3: return strip<Of, 3>(in, row, m, panel, count, out);
    case 4: return strip<Of, 4>(in, row, m, panel, count, out);
    case 5: return strip<Of, 5>(in, row, m, panel, count, out);
    case 6: return strip<Of, 6>(in, row, m, panel, count, out);
  }
  if constexpr (kMostRows > 6) {
    switch (rows) {
      case 7: return strip<Of, 7>(in, row, m, panel, count, out);
      case 8: return strip<Of, 8>(in, row, m, panel, count, out);
      case 9: return strip<Of, 9>(in, row, m, panel, count, out);
      case 10: return strip<Of, 10>(in, row, m, panel, count, out);
      case 11: return strip<Of, 11>(in, row, m, panel, count, out);
      case 12: return strip<Of, 12>(in, row, m, panel, count, out);
    }
  }
}

// In products.cpp.
extern template void strip_of<Floats<float>>(int, const Inputs&, int64_t, const Matrix&, int64_t, int, Tile&);
extern template void strip_of<Floats<half>>(int, const Inputs&, int64_t, const Matrix&, int64_t, int, Tile&);
extern template void strip_of<Pairs>(int, const Inputs&, int64_t, const Matrix&, int64_t, int, Tile&);
extern template void strip_of<Bytes>(int, const Inputs&, int64_t, const Matrix&, int64_t, int, Tile&);
extern template void strip_of<WideBytes>(int, const Inputs&, int64_t, const Matrix&, int64_t, int, Tile&);
extern template void strip_of<Nibbles<true>>(int, const Inputs&, int64_t, const Matrix&, int64_t, int, Tile&);
extern template void strip_of<Nibbles<false>>(int, const Inputs&, int64_t, const Matrix&, int64_t, int, Tile&);

// Rows that pass through the registers together. The shorter the groups, the more often their integers become floats.
inline int most_rows(const Matrix& m) {
  if (kRegisters < 32 || !m.head->group) return kMostRows;
  return m.head->group < 128 ? 6 : 8;
}

template <class Of, class Store>
void linear_of(Pool& pool, const Inputs& in, int64_t rows, const Matrix& m, const Store& store_panel, int64_t sets) {
  const int64_t panels = m.panels() / sets, chunks = (panels + kGroup - 1) / kGroup;
  const bool alone = rows * m.panels() * m.panel_bytes() < kAloneBytes;
  const int most = most_rows(m);
  pool.run(static_cast<int>(sets * chunks), alone, [&](int chunk, int) {
    Tile out;
    const int64_t set = chunk / chunks, begin = set * panels, from = set * rows;
    const int64_t first = begin + chunk % chunks * kGroup, end = std::min<int64_t>(first + kGroup, begin + panels);
    // All panels of the chunk for each block of rows, as long as they stay in the cache; else a pair (gate and up) at a time.
    const int64_t at_once = rows > most && kGroup * m.panel_bytes() > kCachedBytes ? 2 : kGroup;
    for (int64_t panel = first; panel < end; panel += at_once) {
      const int count = static_cast<int>(std::min(at_once, end - panel));
      for (int64_t row = 0, blocks = (rows + most - 1) / most, some; row < rows; row += some, blocks--) {
        some = (rows - row + blocks - 1) / blocks;  // blocks of like sizes
        strip_of<Of>(static_cast<int>(some), in, from + row, m, panel, count, out);
        for (int i = 0; i < some; i++)
          for (int p = 0; p < count; p++) store_panel(from + row + i, panel + p, out.value[i] + p * kPanel);
      }
    }
  });
}

// Multiplies inputs (of `inputs_for`) with a matrix and hands each finished piece to store_panel(row, panel, values): the
// 16 outputs of one panel, aligned. Those of an odd panel follow those of the even one before it in memory, so that gate and
// up can be taken together. With `sets`, inputs are so many times `rows`, and those of each set are multiplied with its own
// share of the outputs alone: whole panels.
template <class Store>
void linear(Pool& pool, const Inputs& in, int64_t rows, const Matrix& m, const Store& store_panel, int64_t sets = 1) {
  switch (m.head->kind) {
    case kFloat32: return linear_of<Floats<float>>(pool, in, rows, m, store_panel, sets);
    case kFloat16: return linear_of<Floats<half>>(pool, in, rows, m, store_panel, sets);
    case kBfloat16: return linear_of<Pairs>(pool, in, rows, m, store_panel, sets);
    case kInt8:
      if (m.head->wide_inputs) return linear_of<WideBytes>(pool, in, rows, m, store_panel, sets);
      return linear_of<Bytes>(pool, in, rows, m, store_panel, sets);
    default:
      if (m.head->has_table) linear_of<Nibbles<true>>(pool, in, rows, m, store_panel, sets);
      else linear_of<Nibbles<false>>(pool, in, rows, m, store_panel, sets);
  }
}

}  // namespace moe_ray
