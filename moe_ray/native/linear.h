// x W^T for bfloat16 x and W with float32 sums. W [N, K] is packed in panels of 16 outputs: [N/16][K/2][16][2], so one
// 64-byte load feeds 16 outputs with two steps of k (VDPBF16PS), and a panel is read once, front to back.
// Every output is one accumulator that runs over k in order, whatever the number of rows or threads: a row's result
// does not depend on the rows beside it.
#pragma once

#include <cstring>

#include "pool.h"
#include "simd.h"

namespace moe_ray {

constexpr int kPanel = 16;
constexpr int kGroup = 4;      // panels per chunk of work
constexpr int kFewRows = 6;    // up to here: all rows and 4 panels at a time
constexpr int kManyRows = 12;  // else: blocks of 12 rows and 2 panels
constexpr int kAhead = 2048;   // bytes of a panel fetched ahead of use
constexpr int64_t kAloneBytes = 160 << 10;  // a smaller product is done before a helper wakes

struct Tile {
  alignas(64) float value[kManyRows][kGroup * kPanel];
};

template <int ROWS, int PANELS>
inline void tile(const bf16* x, int64_t ldx, const bf16* panels, int64_t k, Tile& out) {
  __m512 acc[ROWS][PANELS];
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < PANELS; j++) acc[i][j] = _mm512_setzero_ps();
  const int64_t stride = k * kPanel;
  for (int64_t kk = 0; kk < k; kk += 2) {
    __m512bh w[PANELS];
#pragma GCC unroll 4
    for (int j = 0; j < PANELS; j++) {
      const bf16* p = panels + j * stride + kk * kPanel;
      _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead, _MM_HINT_T0);
      w[j] = (__m512bh)_mm512_loadu_si512(p);
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
      int pair;
      std::memcpy(&pair, x + i * ldx + kk, 4);
      const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int j = 0; j < PANELS; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], a, w[j]);
    }
  }
  for (int i = 0; i < ROWS; i++)
    for (int j = 0; j < PANELS; j++) _mm512_store_ps(out.value[i] + j * kPanel, acc[i][j]);
}

template <int PANELS>
inline void tile_of(int rows, const bf16* x, int64_t ldx, const bf16* panels, int64_t k, Tile& out) {
  switch (rows) {
    case 1: return tile<1, PANELS>(x, ldx, panels, k, out);
    case 2: return tile<2, PANELS>(x, ldx, panels, k, out);
    case 3: return tile<3, PANELS>(x, ldx, panels, k, out);
    case 4: return tile<4, PANELS>(x, ldx, panels, k, out);
    case 5: return tile<5, PANELS>(x, ldx, panels, k, out);
    case 6: return tile<6, PANELS>(x, ldx, panels, k, out);
  }
  if constexpr (PANELS <= 2) {
    switch (rows) {
      case 7: return tile<7, PANELS>(x, ldx, panels, k, out);
      case 8: return tile<8, PANELS>(x, ldx, panels, k, out);
      case 9: return tile<9, PANELS>(x, ldx, panels, k, out);
      case 10: return tile<10, PANELS>(x, ldx, panels, k, out);
      case 11: return tile<11, PANELS>(x, ldx, panels, k, out);
      case 12: return tile<12, PANELS>(x, ldx, panels, k, out);
    }
  }
}

// Computes x [rows, k] times packed panels and hands each finished piece to store(row, panel, values): `values` are the 16
// outputs of one panel, aligned. Those of an odd panel follow those of the even one before it in memory, so that a store
// can take gate and up together.
template <class Store>
void linear(Pool& pool, const bf16* x, int64_t ldx, int64_t rows, const bf16* w, int64_t k, int64_t panels,
            const Store& store) {
  const int64_t groups = (panels + kGroup - 1) / kGroup, stride = k * kPanel;
  const bool alone = rows * panels * stride * 2 < kAloneBytes;
  pool.run(static_cast<int>(groups), alone, [&](int group, int) {
    Tile out;
    const int64_t first = static_cast<int64_t>(group) * kGroup;
    const int64_t many = std::min<int64_t>(kGroup, panels - first);
    if (rows <= kFewRows && many == kGroup) {
      tile_of<kGroup>(static_cast<int>(rows), x, ldx, w + first * stride, k, out);
      for (int64_t i = 0; i < rows; i++)
        for (int j = 0; j < kGroup; j++) store(i, first + j, out.value[i] + j * kPanel);
      return;
    }
    for (int64_t p = first; p < first + many; p += 2) {
      const int two = std::min<int64_t>(2, first + many - p);
      for (int64_t i = 0; i < rows; i += kManyRows) {
        const int count = static_cast<int>(std::min<int64_t>(kManyRows, rows - i));
        if (two == 2) tile_of<2>(count, x + i * ldx, ldx, w + p * stride, k, out);
        else tile_of<1>(count, x + i * ldx, ldx, w + p * stride, k, out);
        for (int r = 0; r < count; r++)
          for (int j = 0; j < two; j++) store(i + r, p + j, out.value[r] + j * kPanel);
      }
    }
  });
}

}  // namespace moe_ray
