// Attention of several query tokens at once: a key or value that is loaded, and widened, serves all their heads. They are
// tokens of one chunk, or of sequences whose tables begin with the same blocks. What each of them gets is what attend_one
// computes, bit for bit: here a lane is a row (one head of one token), there it is a part of one product, so products are
// taken apart as sum_each adds them.
#pragma once

#include "attention.h"

namespace moe_ray {

constexpr int64_t kTileRows = 64;  // heads of tokens that are computed together, at most
constexpr int64_t kBlockKeys = 32;  // keys, or values, that are widened at once: they stay in the nearest cache

// How queries and keys lie to be multiplied with one row a lane: `Unit` is what is taken of a key for all lanes at once.
template <class T, class Query = typename Scores<T>::Query>
struct Tiled {
  using Unit = float;
  static constexpr bool kOrdered = true;  // whether sums are rounded, so that their order counts
  static constexpr int kPerUnit = 1;
  using Sum = Lanes;
  static void widen(const T* key, int64_t dim, Unit* out) {
    for (int64_t d = 0; d < dim; d += 16) store(out + d, load(key + d));
  }
  static int64_t place(int64_t d, int row) { return d * 16 + row; }  // of a query's element
  static Sum none() { return all(0.0f); }
  static Sum add(const Unit* key, const Query* queries, Sum sum) { return plus_product(all(*key), load(queries), sum); }
};

#if defined(__AVX512BF16__)
template <>
struct Tiled<bf16, bf16> {
  using Unit = bf16;
  static constexpr bool kOrdered = true;
  static constexpr int kPerUnit = 2;
  using Sum = Lanes;
  static void widen(const bf16* key, int64_t dim, Unit* out) { std::memcpy(out, key, dim * sizeof(bf16)); }
  static int64_t place(int64_t d, int row) { return d / 2 * 32 + 2 * row + d % 2; }
  static Sum none() { return all(0.0f); }
  static Sum add(const Unit* key, const bf16* queries, Sum sum) {
    int32_t pair;
    std::memcpy(&pair, key, sizeof pair);
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(queries))};
  }
};
#endif

template <>
struct Tiled<int8_t, int16_t> {
  using Unit = int16_t;
  static constexpr bool kOrdered = false;
  static constexpr int kPerUnit = 2;
  using Sum = PairSums;
  static void widen(const int8_t* key, int64_t dim, Unit* out) {
    for (int64_t d = 0; d < dim; d++) out[d] = key[d];
  }
  static int64_t place(int64_t d, int row) { return d / 2 * 32 + pair_place(row, static_cast<int>(d % 2)); }
  static Sum none() { return no_pairs(); }
  static Sum add(const Unit* key, const int16_t* queries, Sum sum) { return plus_pairs(pair_for_all(key), queries, sum); }
};

// Products of KEYS keys [KEYS, dim] with 16 rows, one a lane: the 2^LEVEL parts that sum_each adds first, from part FROM on.
template <class T, int KEYS, int LEVEL, int FROM>
inline __attribute__((always_inline)) void products_of(const typename Tiled<T>::Unit* keys, int64_t dim,
                                                       const typename Scores<T>::Query* queries, Lanes (&out)[KEYS]) {
  if constexpr (LEVEL == 0) {
    constexpr int kPer = Tiled<T>::kPerUnit;
    for (int k = 0; k < KEYS; k++) out[k] = Tiled<T>::none();
    for (int64_t d = kSumOrder[FROM] * kPer; d < dim; d += 16 * kPer) {
#pragma GCC unroll 8
      for (int k = 0; k < KEYS; k++) out[k] = Tiled<T>::add(keys + k * dim + d, queries + d * 16, out[k]);
    }
  } else {
    Lanes second[KEYS];
    products_of<T, KEYS, LEVEL - 1, FROM>(keys, dim, queries, out);
    products_of<T, KEYS, LEVEL - 1, FROM + (1 << (LEVEL - 1))>(keys, dim, queries, second);
#pragma GCC unroll 8
    for (int k = 0; k < KEYS; k++) out[k] = out[k] + second[k];
  }
}

// Scores [keys, 16] of 16 rows; keys [keys, dim], of which there is memory for whole multiples of 8. worth: of each key.
template <class T>
void score_rows(const typename Tiled<T>::Unit* keys, int64_t dim, int64_t count, const typename Scores<T>::Query* queries,
                Lanes by, const float* worth, float* scores) {
  constexpr int kKeys = kRegisters == 32 ? 8 : 4;
  for (int64_t k = 0; k < count; k += kKeys) {
    Lanes products[kKeys];
    if constexpr (Tiled<T>::kOrdered) {
      products_of<T, kKeys, 4, 0>(keys + k * dim, dim, queries, products);
    } else {
      typename Tiled<T>::Sum sums[kKeys];
      for (int i = 0; i < kKeys; i++) sums[i] = Tiled<T>::none();
      for (int64_t d = 0; d < dim; d += Tiled<T>::kPerUnit) {
#pragma GCC unroll 8
        for (int i = 0; i < kKeys; i++) sums[i] = Tiled<T>::add(keys + (k + i) * dim + d, queries + d * 16, sums[i]);
      }
      for (int i = 0; i < kKeys; i++) products[i] = floats_of(sums[i]);
    }
    for (int i = 0; i < kKeys; i++) {
      if constexpr (PagedCache<T>::kScaled) products[i] = products[i] * all(worth[k + i]);
      store(scores + (k + i) * 16, products[i] * by);
    }
  }
}

// Adds values [count, dim] by their weights (lane `row` of [count, 16]) to sums [ROWS, dim].
template <int ROWS>
void weigh_rows(const float* values, int64_t dim, int64_t count, const float* weights, float* sums) {
  constexpr int kPieces = kRegisters == 32 ? 2 : 1;
  for (int64_t d = 0; d < dim; d += 16 * kPieces) {
    Lanes acc[ROWS][kPieces];
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < kPieces; i++) acc[r][i] = load(sums + r * dim + d + i * 16);
    for (int64_t k = 0; k < count; k++) {
      Lanes v[kPieces];
      for (int i = 0; i < kPieces; i++) v[i] = load(values + k * dim + d + i * 16);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const Lanes weight = all(weights[k * 16 + r]);
        for (int i = 0; i < kPieces; i++) acc[r][i] = plus_product(weight, v[i], acc[r][i]);
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int i = 0; i < kPieces; i++) store(sums + r * dim + d + i * 16, acc[r][i]);
  }
}

inline void weigh_set(const float* values, int64_t dim, int64_t count, const float* weights, int64_t rows, float* sums) {
  constexpr int64_t kMost = kRegisters == 32 ? 8 : 6;
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r, take = left == 10 ? 5 : std::min(left, kMost);
    const float* p = weights + r;
    float* to = sums + r * dim;
    switch (take) {
      case 1: weigh_rows<1>(values, dim, count, p, to); break;
      case 2: weigh_rows<2>(values, dim, count, p, to); break;
      case 3: weigh_rows<3>(values, dim, count, p, to); break;
      case 4: weigh_rows<4>(values, dim, count, p, to); break;
      case 5: weigh_rows<5>(values, dim, count, p, to); break;
      case 6: weigh_rows<6>(values, dim, count, p, to); break;
      case 7: weigh_rows<7>(values, dim, count, p, to); break;
      default: weigh_rows<8>(values, dim, count, p, to);
    }
    r += take;
  }
}

struct TileToken {
  int64_t first, last;  // positions that it sees
  const void* queries;  // [group, dim] of Scores<T>::Query
  const float* scales;  // [group]
  Running* so_far;      // [group]
  float* out;           // [group, dim]
};

// What attend_one does for each of `tokens`, of `group` heads each (kTileRows in all), over the positions that each sees of
// [first, last).
template <class T>
void attend_tile(const PagedCache<T>& cache, const TileToken* tokens, int64_t num_tokens, int64_t group, int64_t first,
                 int64_t last, AttentionRoom& room) {
  using Query = typename Scores<T>::Query;
  using Unit = typename Tiled<T>::Unit;
  const int64_t dim = cache.head_dim, row = cache.row(), rows = num_tokens * group, sets = (rows + 15) / 16;
  const int64_t set_size = kPartition * 16, keys_apart = 16 / group;  // whose weights are summed apart: attend_one's tile
  auto* queries = reinterpret_cast<Query*>(floats_in(room.queries, sets * 16 * dim));
  float* widened = floats_in(room.keys, kBlockKeys * dim);
  float* scores = floats_in(room.scores, sets * set_size);
  float* sums = floats_in(room.sums, rows * dim);
  int32_t* slots = slots_in(room.slots);
  const Lanes none = all(-std::numeric_limits<float>::infinity());
  alignas(64) float by[kTileRows] = {}, most[kTileRows], total[kTileRows];
  std::fill(queries, queries + sets * 16 * dim, Query{});
  for (int64_t r = 0; r < rows; r++) {
    const TileToken& token = tokens[r / group];
    const Query* q = static_cast<const Query*>(token.queries) + r % group * dim;
    Query* to = queries + r / 16 * 16 * dim;
    for (int64_t d = 0; d < dim; d++) to[Tiled<T>::place(d, static_cast<int>(r % 16))] = q[d];
    by[r] = token.scales[r % group];
  }
  for (int64_t begin = first; begin < last;) {
    const int64_t partition = begin / kPartition * kPartition, end = std::min(last, partition + kPartition);
    const int64_t count = end - begin;
    cache.find_slots(begin, end, slots);
    std::fill(slots + count, slots + count + kKeysAhead, slots[count - 1]);

    for (int64_t k = 0; k < count; k += kBlockKeys) {
      const int64_t here = std::min(kBlockKeys, count - k);
      auto* keys = reinterpret_cast<Unit*>(widened);
      alignas(64) float worth[kBlockKeys] = {};
      for (int64_t i = 0; i < here; i++) {
        Tiled<T>::widen(cache.k + slots[k + i] * row, dim, keys + i * dim);
        fetch(cache.k + slots[k + i + kKeysAhead] * row, dim);
        if constexpr (PagedCache<T>::kScaled) worth[i] = cache.k_scales[slots[k + i] * cache.kv_heads];
      }
      for (int64_t s = 0; s < sets; s++)
        score_rows<T>(keys, dim, here, queries + s * 16 * dim, load(by + s * 16), worth, scores + s * set_size + k * 16);
    }

    int64_t all_from = begin, all_to = end;  // what every token sees
    for (int64_t t = 0; t < num_tokens; t++) {
      const int64_t from = std::min(std::max(tokens[t].first, begin), end), to = std::max(std::min(tokens[t].last, end), from);
      all_from = std::max(all_from, from), all_to = std::min(all_to, to);
      for (int64_t r = t * group; r < (t + 1) * group; r++) {
        float* lane = scores + r / 16 * set_size + r % 16;
        for (int64_t k = 0; k < from - begin; k++) lane[k * 16] = -std::numeric_limits<float>::infinity();
        for (int64_t k = to - begin; k < count; k++) lane[k * 16] = -std::numeric_limits<float>::infinity();
      }
    }
    for (int64_t s = 0; s < sets; s++) {
      float* weights = scores + s * set_size;
      Lanes top = none, apart[16];
      for (int64_t k = 0; k < count; k++) top = maximum(top, load(weights + k * 16));
      for (int64_t j = 0; j < keys_apart; j++) apart[j] = all(0.0f);
      for (int64_t k = 0, j = (begin - partition) % keys_apart; k < count; k++, j = j + 1 == keys_apart ? 0 : j + 1) {
        const Lanes score = load(weights + k * 16);
        const Lanes p = zero_where(exponential(score - top), score, none);
        apart[j] = apart[j] + p;
        store(weights + k * 16, p);
      }
      Lanes sum = all(0.0f);
      for (int64_t j = 0; j < keys_apart; j++) sum = sum + apart[j];
      store(most + s * 16, top);
      store(total + s * 16, sum);
      if constexpr (PagedCache<T>::kScaled)
        for (int64_t k = 0; k < count; k++)
          store(weights + k * 16, load(weights + k * 16) * all(cache.v_scales[slots[k] * cache.kv_heads]));
    }

    // Values in ascending order for each row: before those that all see, those, and behind them. What a row does not see
    // is not even multiplied by 0: it may be no number.
    std::fill(sums, sums + rows * dim, 0.0f);
    const auto alone = [&](int64_t t, int64_t from, int64_t to) {
      for (int64_t position = from; position < to; position++) {
        const int64_t k = position - begin;
        const T* value = cache.v + slots[k] * row;
        for (int64_t r = t * group; r < (t + 1) * group; r++) {
          const Lanes weight = all(scores[r / 16 * set_size + k * 16 + r % 16]);
          for (int64_t d = 0; d < dim; d += 16)
            store(sums + r * dim + d, plus_product(weight, load(value + d), load(sums + r * dim + d)));
        }
      }
    };
    all_to = std::max(all_from, all_to);
    for (int64_t t = 0; t < num_tokens; t++)
      alone(t, std::max(tokens[t].first, begin), std::min(std::min(tokens[t].last, end), all_from));
    for (int64_t k = all_from - begin; k < all_to - begin; k += kBlockKeys) {
      const int64_t here = std::min(kBlockKeys, all_to - begin - k);
      for (int64_t i = 0; i < here; i++) {
        const T* value = cache.v + slots[k + i] * row;
        for (int64_t d = 0; d < dim; d += 16) store(widened + i * dim + d, load(value + d));
        fetch(cache.v + slots[k + i + kKeysAhead] * row, dim);
      }
      for (int64_t s = 0; s < sets; s++)
        weigh_set(widened, dim, here, scores + s * set_size + k * 16, std::min<int64_t>(16, rows - s * 16),
                  sums + s * 16 * dim);
    }
    for (int64_t t = 0; t < num_tokens; t++) {
      const TileToken& token = tokens[t];
      const int64_t to = std::min(token.last, end);
      alone(t, std::max(std::max(token.first, begin), all_to), to);
      if (std::max(token.first, begin) >= to) continue;  // it sees nothing here
      for (int64_t g = 0, r = t * group; g < group; g++, r++)
        merge(token.so_far[g], token.out + g * dim, most[r], total[r], sums + r * dim, dim);
    }
    begin = end;
  }
}

}  // namespace moe_ray
