// Rows of inputs in the form that a matrix is multiplied with: as they come, widened, narrowed, or as small integers with a
// scale for each group. A row's form depends on that row alone.
#pragma once

#include <vector>

#include "matrix.h"
#include "whole.h"

namespace moe_ray {

struct Inputs {
  const void* rows;  // [T, ld] of the panel class's Input
  int64_t ld;
  const float* scales;    // [T, groups], of integers
  const int32_t* starts;  // [T, groups] what a sum begins with: -kMiddle times the sum of the group's inputs
  const float* sums;      // [T, groups] the sum of the group's inputs
};

// Memory that grows to what was needed most.
template <class T>
T* room(std::vector<T>& v, int64_t n) {
  if (static_cast<int64_t>(v.size()) < n) v.resize(n);
  return v.data();
}

struct InputRoom {
  std::vector<float> floats, scales, sums;
  std::vector<bf16> narrow;
  std::vector<int16_t> integers;  // or twice as many of 8 bits
  std::vector<int32_t> starts;
};

template <class PanelClass>
void integers_of(const float* x, int64_t n, float most, typename PanelClass::Input* out, Lanes& total, Lanes factor) {
  for (int64_t j = 0; j < n; j += 16) {
    const Lanes whole = whole_within(load(x + j) * factor, most);
    total = total + whole;
    store_whole(out + j, whole);
  }
  for (int64_t j = 0; j < n; j += 4) PanelClass::arrange(out + j);
}

// One row as integers. The scale of a group is its largest magnitude over the largest integer (absmax).
template <class PanelClass, class T>
void quantise_row(const T* x, const Matrix& m, typename PanelClass::Input* out, float* scales, int32_t* starts,
                  float* sums) {
  constexpr float most = sizeof(*out) == 1 ? 127.0f : 32512.0f;  // 127 * 256: of 16 bits both halves are signed
  const int64_t group = m.head->group;
  alignas(64) float values[128];
  for (int64_t g = 0; g < m.groups(); g++) {
    if (m.order) {
      alignas(64) T picked[16];
      for (int64_t j = 0; j < group; j += 16) {
        for (int64_t i = 0; i < 16; i++) picked[i] = x[m.order[g * group + j + i]];
        store(values + j, load(picked));
      }
    } else {
      for (int64_t j = 0; j < group; j += 16) store(values + j, load(x + g * group + j));
    }
    const Magnitude of = magnitude_of(values, group);
    const float peak = of.largest, scale = peak / most + of.unsound;
    Lanes total = all(0.0f);
    integers_of<PanelClass>(values, group, most, out + g * group, total, all(peak > 0.0f ? most / peak : 0.0f));
    const float whole = sum(total);  // exact: below 2^24
    scales[g] = scale;
    starts[g] = -PanelClass::kMiddle * static_cast<int32_t>(whole);
    sums[g] = scale * whole;
  }
}

template <class PanelClass, class T>
Inputs quantised(Pool& pool, InputRoom& r, const Matrix& m, const T* x, int64_t ldx, int64_t rows) {
  using Input = typename PanelClass::Input;
  const int64_t k = m.k(), groups = m.groups();
  auto* out = reinterpret_cast<Input*>(room(r.integers, rows * k));
  float* scales = room(r.scales, rows * groups);
  float* sums = room(r.sums, rows * groups);
  int32_t* starts = room(r.starts, rows * groups);
  const int64_t batch = 4;  // rows per chunk of work
  pool.run(static_cast<int>((rows + batch - 1) / batch), rows * k < (64 << 10), [&](int chunk, int) {
    for (int64_t t = chunk * batch; t < std::min(rows, (chunk + 1) * batch); t++)
      quantise_row<PanelClass>(x + t * ldx, m, out + t * k, scales + t * groups, starts + t * groups, sums + t * groups);
  });
  return {out, k, scales, starts, sums};
}

template <class To, class T>
Inputs converted(Pool& pool, std::vector<To>& memory, int64_t k, const T* x, int64_t ldx, int64_t rows) {
  To* out = room(memory, rows * k);
  const int64_t batch = 8;
  pool.run(static_cast<int>((rows + batch - 1) / batch), rows * k < (256 << 10), [&](int chunk, int) {
    for (int64_t t = chunk * batch; t < std::min(rows, (chunk + 1) * batch); t++)
      for (int64_t j = 0; j < k; j += 16) store(out + t * k + j, load(x + t * ldx + j));
  });
  return {out, k, nullptr, nullptr, nullptr};
}

inline Inputs floats_for(Pool&, InputRoom&, int64_t, const float* x, int64_t ldx, int64_t, const float*) {
  return {x, ldx, nullptr, nullptr, nullptr};
}
inline Inputs floats_for(Pool&, InputRoom&, int64_t, const bf16* x, int64_t ldx, int64_t, const bf16*) {
  return {x, ldx, nullptr, nullptr, nullptr};
}
template <class T>
Inputs floats_for(Pool& pool, InputRoom& r, int64_t k, const T* x, int64_t ldx, int64_t rows, const float*) {
  return converted(pool, r.floats, k, x, ldx, rows);
}
template <class T>
Inputs floats_for(Pool& pool, InputRoom& r, int64_t k, const T* x, int64_t ldx, int64_t rows, const bf16*) {
  return converted(pool, r.narrow, k, x, ldx, rows);
}

// What `m` multiplies x [rows, k] in. The result is valid until `r` is used again, and while x is.
template <class T>
Inputs inputs_for(Pool& pool, InputRoom& r, const Matrix& m, const T* x, int64_t ldx, int64_t rows) {
  switch (m.head->kind) {
    case kInt8:
      return m.head->wide_inputs ? quantised<WideBytes>(pool, r, m, x, ldx, rows) : quantised<Bytes>(pool, r, m, x, ldx, rows);
    case kInt4:
      return m.head->has_table ? quantised<Nibbles<true>>(pool, r, m, x, ldx, rows)
                               : quantised<Nibbles<false>>(pool, r, m, x, ldx, rows);
    case kBfloat16: return floats_for(pool, r, m.k(), x, ldx, rows, static_cast<const Pairs::Input*>(nullptr));
    default: return floats_for(pool, r, m.k(), x, ldx, rows, static_cast<const float*>(nullptr));
  }
}

}  // namespace moe_ray
