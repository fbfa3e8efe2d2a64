// Attention of single query tokens over a paged KV cache, all query heads of one KV head together (GQA).
// A prefill chunk is many such tokens: each sees the cache up to its own position, so chunks, prefix hits and decodes
// are one case and a token's result does not depend on how its sequence was cut up.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cache.h"

namespace moe_ray {

constexpr int64_t kKeysAhead = 16;  // from a key, or value, that is asked of memory to the one that is computed with
constexpr int64_t kTogether = 64;   // values that are summed in all their parts before the next: they stay in the cache

struct AttentionRoom {  // of the thread that calls; grows to the longest context
  std::vector<float> scores;
  std::vector<int32_t> slots;
};

template <class T>
void fetch(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) prefetch(row + i);
}

// Adds `count` values by their weights to out [GROUP, dim], of a group's heads `from` to `from` + `heads`, `PIECES` Lanes of
// a value at a time. scores: [tiles][16], lane key * GROUP + head.
template <class T, int GROUP, int ROWS, int PIECES>
void add_values(const PagedCache<T>& cache, const float* scores, const int32_t* slots, int64_t count, int from, int heads,
                float* out) {
  constexpr int kKeys = 16 / GROUP;
  const int64_t dim = cache.head_dim, row = cache.row();
  for (int64_t d = 0; d < dim; d += 16 * PIECES) {
    float* sums = out + from * dim + d;
    Lanes acc[ROWS][PIECES];
    for (int g = 0; g < ROWS; g++)
      for (int i = 0; i < PIECES; i++) acc[g][i] = g < heads ? load(sums + g * dim + i * 16) : all(0.0f);
    for (int64_t t = 0, k = 0; k < count; t++) {
      const float* p = scores + t * 16 + from;
      for (int j = 0; j < kKeys && k < count; j++, k++) {
        const T* value = cache.v + slots[k] * row + d;
        if (d == 0 && from == 0) fetch(cache.v + slots[k + kKeysAhead] * row, dim);
        Lanes v[PIECES];
#pragma GCC unroll 4
        for (int i = 0; i < PIECES; i++) v[i] = load(value + i * 16);
#pragma GCC unroll 16
        for (int g = 0; g < ROWS; g++) {
          if (g >= heads) continue;
          const Lanes weight = all(p[j * GROUP + g]);
#pragma GCC unroll 4
          for (int i = 0; i < PIECES; i++) acc[g][i] = plus_product(weight, v[i], acc[g][i]);
        }
      }
    }
    for (int g = 0; g < heads; g++)
      for (int i = 0; i < PIECES; i++) store(sums + g * dim + i * 16, acc[g][i]);
  }
}

// Weights times the scales of their values.
template <class T, int GROUP>
void weigh_scales(const PagedCache<T>& cache, float* weights, const int32_t* slots, int64_t count) {
  constexpr int kKeys = 16 / GROUP;
  for (int64_t k = 0; k < count; weights += 16)
    for (int j = 0; j < kKeys && k < count; j++, k++) {
      const float scale = cache.v_scales[slots[k] * cache.kv_heads];
      for (int g = 0; g < GROUP; g++) weights[j * GROUP + g] *= scale;
    }
}

// q [GROUP, head_dim] (contiguous) over positions [first, last) → out [GROUP, head_dim]; head_dim: a multiple of 32.
// `scales` [GROUP]: what a head's products with keys are multiplied by.
// Softmax in two passes (all scores, then values), so any context takes scores of GROUP * 16 / (16 / GROUP) floats.
template <class T, int GROUP>
void attend_one(const PagedCache<T>& cache, const typename Scores<T>::Query* q, const float* scales, int64_t first,
                int64_t last, AttentionRoom& room, float* out) {
  constexpr int kKeys = 16 / GROUP, kUsed = kKeys * GROUP;  // keys per tile; lane key * GROUP + head
  constexpr int kHeads = std::min(GROUP, kRegisters == 32 ? 16 : 4);  // summed at once
  constexpr int kStep = Scores<T>::kStep;
  const int64_t dim = cache.head_dim, row = cache.row();
  const int64_t count = last - first, tiles = (count + kKeys - 1) / kKeys;
  if (static_cast<int64_t>(room.scores.size()) < tiles * 16) room.scores.resize(tiles * 16 * 2);
  const int64_t padded = count + kKeysAhead + kKeys;  // behind the last: the last
  if (static_cast<int64_t>(room.slots.size()) < padded) room.slots.resize(2 * padded);
  float* scores = room.scores.data();
  int32_t* slots = room.slots.data();
  cache.find_slots(first, last, slots);
  std::fill(slots + count, slots + padded, slots[count - 1]);

  alignas(64) float lanes[16], most[GROUP], total[GROUP];
  for (int i = 0; i < 16; i++) lanes[i] = scales[i % GROUP];
  const Lanes by = load(lanes);
  const Lanes none = all(-std::numeric_limits<float>::infinity());
  Lanes top = none;
  for (int64_t t = 0; t < tiles; t++) {
    Lanes dots[16];
    const int32_t* at = slots + t * kKeys;
    const int keys = static_cast<int>(std::min<int64_t>(kKeys, count - t * kKeys));
    for (int j = 0; j < kKeys; j++) {
      const int64_t slot = at[j];
      const T* key = cache.k + slot * row;
      fetch(cache.k + at[j + kKeysAhead] * row, dim);
      for (int from = 0; from < GROUP; from += kHeads) {
        const int heads = std::min(kHeads, GROUP - from);
        typename Scores<T>::Sum sums[kHeads];
#pragma GCC unroll 16
        for (int g = 0; g < kHeads; g++) sums[g] = Scores<T>::none();
        for (int64_t d = 0; d < dim; d += kStep) {
          const auto part = Scores<T>::key(key + d);
#pragma GCC unroll 16
          for (int g = 0; g < kHeads; g++)
            if (g < heads) sums[g] = Scores<T>::add(part, q + (from + g) * dim + d, sums[g]);
        }
        for (int g = 0; g < heads; g++) {
          if constexpr (PagedCache<T>::kScaled)
            dots[j * GROUP + from + g] = floats_of(sums[g]) * all(cache.k_scales[slot * cache.kv_heads]);
          else dots[j * GROUP + from + g] = sums[g];
        }
      }
    }
    for (int j = kUsed; j < 16; j++) dots[j] = all(0.0f);
    const Lanes tile = first_lanes(keys * GROUP, sum_each(dots) * by, none);
    top = maximum(top, tile);
    store(scores + t * 16, tile);
  }

  store(lanes, top);
  for (int g = 0; g < GROUP; g++) {
    most[g] = lanes[g];
    for (int j = 1; j < kKeys; j++) most[g] = std::max(most[g], lanes[j * GROUP + g]);
  }
  for (int i = 0; i < 16; i++) lanes[i] = i < kUsed ? most[i % GROUP] : 0.0f;
  const Lanes shift = load(lanes);
  Lanes sums = all(0.0f);
  for (int64_t t = 0; t < tiles; t++) {
    const Lanes s = load(scores + t * 16);
    const Lanes p = zero_where(exponential(s - shift), s, none);
    sums = sums + p;
    store(scores + t * 16, p);
  }
  store(lanes, sums);
  for (int g = 0; g < GROUP; g++) {
    total[g] = 0.0f;
    for (int j = 0; j < kKeys; j++) total[g] += lanes[j * GROUP + g];
  }

  if constexpr (PagedCache<T>::kScaled) weigh_scales<T, GROUP>(cache, scores, slots, count);
  // As many sums as leave a register for a value and a weight.
  constexpr int kPieces = kRegisters < 32 ? 1 : GROUP <= 10 ? 2 : 1;
  constexpr int kRows = std::min(GROUP, kRegisters == 32 ? 16 : 6);
  std::fill(out, out + GROUP * dim, 0.0f);
  for (int64_t k = 0; k < count; k += kTogether / kKeys * kKeys) {
    const int64_t here = std::min(count - k, kTogether / kKeys * kKeys);
    const float* weights = scores + k / kKeys * 16;
    for (int from = 0; from < GROUP; from += kRows) {
      const int heads = std::min(kRows, GROUP - from);
      if (kRegisters == 32 && GROUP <= 5 && dim % 64 == 0)
        add_values<T, GROUP, kRows, kRegisters == 32 ? 4 : 1>(cache, weights, slots + k, here, from, heads, out);
      else add_values<T, GROUP, kRows, kPieces>(cache, weights, slots + k, here, from, heads, out);
    }
  }
  for (int g = 0; g < GROUP; g++)
    for (int64_t d = 0; d < dim; d += 16) store(out + g * dim + d, load(out + g * dim + d) / all(total[g]));
}

template <class T>
using Attend = void (*)(const PagedCache<T>&, const typename Scores<T>::Query*, const float*, int64_t, int64_t,
                        AttentionRoom&, float*);

// The kernel for so many query heads per KV head, or nullptr where there is none.
template <class T>
Attend<T> attend_for(int64_t group) {
  switch (group) {
    case 1: return attend_one<T, 1>;
    case 2: return attend_one<T, 2>;
    case 3: return attend_one<T, 3>;
    case 4: return attend_one<T, 4>;
    case 5: return attend_one<T, 5>;
    case 6: return attend_one<T, 6>;
    case 7: return attend_one<T, 7>;
    case 8: return attend_one<T, 8>;
    case 16: return attend_one<T, 16>;
  }
  return nullptr;
}

}  // namespace moe_ray
