// Attention of single query tokens over a paged bfloat16 KV cache, all query heads of one KV head together (GQA).
// A prefill chunk is many such tokens: each sees the cache up to its own position, so chunks, prefix hits and decodes
// are one case and a token's result does not depend on how its sequence was cut up.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

namespace moe_ray {

struct PagedCache {
  const bf16* k;  // [slots, kv_heads, head_dim]
  const bf16* v;
  const int32_t* table;  // the sequence's blocks
  int64_t block_size, row;  // row: elements from one slot to the next

  int64_t at(int64_t position) const {
    return (table[position / block_size] * block_size + position % block_size) * row;
  }
};

// q [GROUP, head_dim] (bfloat16, contiguous) over positions [first, last) → out [GROUP, head_dim].
// Softmax in two passes (all scores, then values), so any context takes scores of GROUP * 16 / (16 / GROUP) floats.
template <int GROUP, int HALVES>  // head_dim = 32 * HALVES
void attend_one(const PagedCache& cache, const bf16* q, int64_t first, int64_t last, float scale,
                std::vector<float>& scratch, bf16* out) {
  constexpr int kKeys = 16 / GROUP, kUsed = kKeys * GROUP;  // keys per tile; lane key * GROUP + head
  const int64_t tiles = (last - first + kKeys - 1) / kKeys;
  if (static_cast<int64_t>(scratch.size()) < tiles * 16) scratch.resize(tiles * 16 * 2);
  float* scores = scratch.data();
  __m512bh query[GROUP][HALVES];
  for (int g = 0; g < GROUP; g++)
    for (int h = 0; h < HALVES; h++) query[g][h] = (__m512bh)_mm512_loadu_si512(q + (g * HALVES + h) * 32);

  const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 top = none;
  for (int64_t t = 0; t < tiles; t++) {
    __m512 dots[16];
    const int64_t base = first + t * kKeys;
    const int keys = static_cast<int>(std::min<int64_t>(kKeys, last - base));
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; j++) {
      const bf16* key = cache.k + cache.at(base + std::min(j, keys - 1));
#pragma GCC unroll 16
      for (int g = 0; g < GROUP; g++) dots[j * GROUP + g] = _mm512_setzero_ps();
#pragma GCC unroll 8
      for (int h = 0; h < HALVES; h++) {
        const __m512bh part = (__m512bh)_mm512_loadu_si512(key + h * 32);
#pragma GCC unroll 16
        for (int g = 0; g < GROUP; g++)
          dots[j * GROUP + g] = _mm512_dpbf16_ps(dots[j * GROUP + g], part, query[g][h]);
      }
    }
#pragma GCC unroll 16
    for (int j = kUsed; j < 16; j++) dots[j] = _mm512_setzero_ps();
    const __mmask16 used = static_cast<__mmask16>((1u << (keys * GROUP)) - 1);
    const __m512 tile = _mm512_mask_mul_ps(none, used, sum_each(dots), _mm512_set1_ps(scale));
    top = _mm512_max_ps(top, tile);
    _mm512_storeu_ps(scores + t * 16, tile);
  }

  alignas(64) float lanes[16], most[GROUP], total[GROUP];
  _mm512_store_ps(lanes, top);
  for (int g = 0; g < GROUP; g++) {
    most[g] = lanes[g];
    for (int j = 1; j < kKeys; j++) most[g] = std::max(most[g], lanes[j * GROUP + g]);
  }
  for (int i = 0; i < 16; i++) lanes[i] = i < kUsed ? most[i % GROUP] : 0.0f;
  const __m512 shift = _mm512_load_ps(lanes);
  __m512 sums = _mm512_setzero_ps();
  for (int64_t t = 0; t < tiles; t++) {
    const __m512 s = _mm512_loadu_ps(scores + t * 16);
    const __mmask16 seen = _mm512_cmp_ps_mask(s, none, _CMP_NEQ_OQ);
    const __m512 p = _mm512_maskz_mov_ps(seen, exp512(_mm512_sub_ps(s, shift)));
    sums = _mm512_add_ps(sums, p);
    _mm512_storeu_ps(scores + t * 16, p);
  }
  _mm512_store_ps(lanes, sums);
  for (int g = 0; g < GROUP; g++) {
    total[g] = 0.0f;
    for (int j = 0; j < kKeys; j++) total[g] += lanes[j * GROUP + g];
  }

  constexpr int kWide = 2 * HALVES;  // 16-float pieces of a value row
  constexpr int kStep = GROUP <= 5 ? (kWide < 4 ? kWide : 4) : (GROUP <= 10 ? 2 : 1);
  for (int d = 0; d < kWide; d += kStep) {
    __m512 acc[GROUP][kStep];
    for (int g = 0; g < GROUP; g++)
      for (int i = 0; i < kStep; i++) acc[g][i] = _mm512_setzero_ps();
    for (int64_t t = 0, position = first; position < last; t++) {
      const float* p = scores + t * 16;
      for (int j = 0; j < kKeys && position < last; j++, position++) {
        const bf16* value = cache.v + cache.at(position) + d * 16;
        __m512 v[kStep];
#pragma GCC unroll 4
        for (int i = 0; i < kStep; i++) v[i] = widen(value + i * 16);
#pragma GCC unroll 16
        for (int g = 0; g < GROUP; g++) {
          const __m512 weight = _mm512_set1_ps(p[j * GROUP + g]);
#pragma GCC unroll 4
          for (int i = 0; i < kStep; i++) acc[g][i] = _mm512_fmadd_ps(weight, v[i], acc[g][i]);
        }
      }
    }
    for (int g = 0; g < GROUP; g++)
      for (int i = 0; i < kStep; i++)
        narrow(out + g * 32 * HALVES + (d + i) * 16, _mm512_div_ps(acc[g][i], _mm512_set1_ps(total[g])));
  }
}

using Attend = void (*)(const PagedCache&, const bf16*, int64_t, int64_t, float, std::vector<float>&, bf16*);

template <int HALVES>
Attend attend_for_group(int group) {
  switch (group) {
    case 1: return attend_one<1, HALVES>;
    case 2: return attend_one<2, HALVES>;
    case 3: return attend_one<3, HALVES>;
    case 4: return attend_one<4, HALVES>;
    case 5: return attend_one<5, HALVES>;
    case 6: return attend_one<6, HALVES>;
    case 7: return attend_one<7, HALVES>;
    case 8: return attend_one<8, HALVES>;
    case 16: return attend_one<16, HALVES>;
  }
  return nullptr;
}

// The kernel for so many query heads per KV head, or nullptr where there is none.
inline Attend attend_for(int group, int head_dim) {
  switch (head_dim) {
    case 32: return attend_for_group<1>(group);
    case 64: return attend_for_group<2>(group);
    case 96: return attend_for_group<3>(group);
    case 128: return attend_for_group<4>(group);
    case 256: return attend_for_group<8>(group);
  }
  return nullptr;
}

}  // namespace moe_ray
