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
constexpr int64_t kPartition = 512;  // positions whose softmax is one
constexpr int64_t kTogether = 64;   // values that are summed in all their parts before the next: they stay in the cache

struct AttentionRoom {  // of the thread that calls; what it takes does not grow with contexts
  std::vector<float> scores, sums, queries, keys;
  std::vector<int32_t> slots;
};

struct Running {  // softmax of one query head over the positions so far; total 0: over none
  float most = 0.0f, total = 0.0f;
};

// Adds a partition's sums [dim], of weights that sum to `total` and are e^(score - most), to what there is in out [dim].
// `sums` may be `out` where there is nothing yet. (Milakov & Gimelshein 2018, arXiv:1805.02867.)
inline void merge(Running& so_far, float* out, float most, float total, const float* sums, int64_t dim) {
  if (so_far.total == 0.0f) {
    so_far = {most, total};
    if (sums != out) std::copy(sums, sums + dim, out);
    return;
  }
  const float top = std::max(so_far.most, most);
  const Lanes before = exponential(all(so_far.most - top)), now = exponential(all(most - top));
  for (int64_t d = 0; d < dim; d += 16) store(out + d, plus_product(load(sums + d), now, load(out + d) * before));
  alignas(64) float lanes[16];
  store(lanes, plus_product(all(total), now, all(so_far.total) * before));
  so_far = {top, lanes[0]};
}

inline float* floats_in(std::vector<float>& memory, int64_t count) {
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}
inline int32_t* slots_in(std::vector<int32_t>& memory) {
  memory.resize(kPartition + 2 * kKeysAhead + 16);
  return memory.data();
}

template <class T>
void fetch(const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) prefetch(row + i);
}

// Adds the values from `skip` (less than a tile) to `count` by their weights to out [GROUP, dim], of a group's heads `from`
// to `from` + `heads`, `PIECES` Lanes of a value at a time. scores: [tiles][16], lane key * GROUP + head.
template <class T, int GROUP, int ROWS, int PIECES>
void add_values(const PagedCache<T>& cache, const float* scores, const int32_t* slots, int64_t skip, int64_t count, int from,
                int heads, float* out) {
  constexpr int kKeys = 16 / GROUP;
  const int64_t dim = cache.head_dim, row = cache.row();
  for (int64_t d = 0; d < dim; d += 16 * PIECES) {
    float* sums = out + from * dim + d;
    Lanes acc[ROWS][PIECES];
    for (int g = 0; g < ROWS; g++)
      for (int i = 0; i < PIECES; i++) acc[g][i] = g < heads ? load(sums + g * dim + i * 16) : all(0.0f);
    for (int64_t t = 0, k = skip; k < count; t++) {
      const float* p = scores + t * 16 + from;
      for (int64_t j = k - t * kKeys; j < kKeys && k < count; j++, k++) {
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

// Attends as attend_one does to positions of one partition.
template <class T, int GROUP>
void attend_part(const PagedCache<T>& cache, const typename Scores<T>::Query* q, const float* scales, int64_t first,
                 int64_t end, int64_t last, AttentionRoom& room, Running* so_far, float* out) {
  constexpr int kKeys = 16 / GROUP, kUsed = kKeys * GROUP;  // keys per tile; lane key * GROUP + head
  constexpr int kHeads = std::min(GROUP, kRegisters == 32 ? 16 : 4);  // summed at once
  constexpr int kStep = Scores<T>::kStep;
  const int64_t dim = cache.head_dim, row = cache.row();
  // Tiles begin with their partition, so that a token's sums do not depend on where a window begins for others.
  const int64_t skip = first % kPartition % kKeys, count = end - first + skip, tiles = (count + kKeys - 1) / kKeys;
  const int64_t ahead = std::min(last, end + kKeysAhead) - first + skip, padded = count + kKeysAhead + kKeys;
  float* scores = floats_in(room.scores, (kPartition + 1) * 16);
  int32_t* slots = slots_in(room.slots);
  cache.find_slots(first, first + ahead - skip, slots + skip);
  std::fill(slots, slots + skip, slots[skip]);
  std::fill(slots + ahead, slots + std::max(ahead, padded), slots[ahead - 1]);  // behind the last: the last

  alignas(64) float lanes[16], most[GROUP], total[GROUP];
  for (int i = 0; i < 16; i++) lanes[i] = scales[i % GROUP];
  const Lanes by = load(lanes);
  const Lanes none = all(-std::numeric_limits<float>::infinity());
  Lanes top = none;
  for (int64_t t = 0; t < tiles; t++) {
    typename Scores<T>::Sum dots[16];
    alignas(64) float worth[16] = {};
    const int32_t* at = slots + t * kKeys;
    const int keys = static_cast<int>(std::min<int64_t>(kKeys, count - t * kKeys));
    for (int j = 0; j < kKeys; j++) {
      const int64_t slot = at[j];
      const T* key = cache.k + slot * row;
      fetch(cache.k + at[j + kKeysAhead] * row, dim);
      if constexpr (PagedCache<T>::kScaled)
        std::fill(worth + j * GROUP, worth + (j + 1) * GROUP, cache.k_scales[slot * cache.kv_heads]);
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
        for (int g = 0; g < heads; g++) dots[j * GROUP + from + g] = sums[g];
      }
    }
    for (int j = kUsed; j < 16; j++) dots[j] = Scores<T>::none();
    Lanes products = sum_each(dots);
    if constexpr (PagedCache<T>::kScaled) products = products * load(worth);
    Lanes tile = first_lanes(keys * GROUP, products * by, none);
    if (t == 0) tile = first_lanes(static_cast<int>(skip) * GROUP, none, tile);
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
  float* added = so_far->total == 0.0f ? out : floats_in(room.sums, GROUP * dim);
  std::fill(added, added + GROUP * dim, 0.0f);
  for (int64_t k = 0; k < count; k += kTogether / kKeys * kKeys) {
    const int64_t here = std::min(count - k, kTogether / kKeys * kKeys), begin = k == 0 ? skip : 0;
    const float* weights = scores + k / kKeys * 16;
    for (int from = 0; from < GROUP; from += kRows) {
      const int heads = std::min(kRows, GROUP - from);
      if (kRegisters == 32 && GROUP <= 5 && dim % 64 == 0)
        add_values<T, GROUP, kRows, kRegisters == 32 ? 4 : 1>(cache, weights, slots + k, begin, here, from, heads, added);
      else add_values<T, GROUP, kRows, kPieces>(cache, weights, slots + k, begin, here, from, heads, added);
    }
  }
  for (int g = 0; g < GROUP; g++) merge(so_far[g], out + g * dim, most[g], total[g], added + g * dim, dim);
}

// q [GROUP, head_dim] (contiguous) over positions [first, last), added to `so_far` [GROUP] and out [GROUP, head_dim];
// head_dim: a multiple of 32. `scales` [GROUP]: what a head's products with keys are multiplied by.
// Positions are taken in partitions of kPartition, whose bounds are the same for every token: softmax in two passes within
// one (all scores, then values), and partitions merged in their order.
template <class T, int GROUP>
void attend_one(const PagedCache<T>& cache, const typename Scores<T>::Query* q, const float* scales, int64_t first,
                int64_t last, AttentionRoom& room, Running* so_far, float* out) {
  while (first < last) {
    const int64_t end = std::min(last, (first / kPartition + 1) * kPartition);
    attend_part<T, GROUP>(cache, q, scales, first, end, last, room, so_far, out);
    first = end;
  }
}

template <class T>
using Attend = void (*)(const PagedCache<T>&, const typename Scores<T>::Query*, const float*, int64_t, int64_t,
                        AttentionRoom&, Running*, float*);

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
