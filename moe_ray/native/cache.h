// What a KV cache holds of a token: floats, of 8 bits or more, or whole numbers of 8 bits with a scale for each head, and how
// a query is held to be multiplied with its keys. What is written for a token depends on that token alone.
#pragma once

#include <algorithm>
#include <type_traits>

#include "whole.h"

namespace moe_ray {

// One head of a sequence's keys and values.
template <class T>
struct PagedCache {
  const T* k;  // [slots, kv_heads, head_dim]
  const T* v;
  const float *k_scales, *v_scales;  // [slots, kv_heads] what one of int8_t is worth; floats: null
  const int32_t* table;              // the sequence's blocks
  int64_t block_size, kv_heads, head_dim;

  static constexpr bool kScaled = std::is_same_v<T, int8_t>;
  // The slots of positions [first, last).
  void find_slots(int64_t first, int64_t last, int32_t* slots) const {
    for (int64_t block = first / block_size, position = first; position < last; block++) {
      const int64_t end = std::min(last, (block + 1) * block_size), ahead = (table[block] - block) * block_size;
      for (; position < end; position++) *slots++ = static_cast<int32_t>(position + ahead);
    }
  }
  int64_t row() const { return kv_heads * head_dim; }  // elements from one slot to the next
};

// Rounds n numbers to whole ones from -most to most. Returns what one of these is worth: the largest magnitude over `most`
// (absmax), and NaN where a number is NaN or infinite. Magnitudes below 1e-30 alone become 0.
template <class Whole>
float rounded(const float* x, int64_t n, float most, Whole* out) {
  const Magnitude of = magnitude_of(x, n);
  const Lanes factor = all(of.largest > 1e-30f ? most / of.largest : 0.0f);
  for (int64_t i = 0; i < n; i += 16) store_whole(out + i, whole_within(load(x + i) * factor, most));
  return of.largest / most + of.unsound;
}

// Writes n numbers (a multiple of 16) as T. Returns what one of T is worth.
template <class T>
float keep(const float* x, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i += 16) store(out + i, load(x + i));
  return 1.0f;
}
inline float keep(const float* x, int64_t n, int8_t* out) { return rounded(x, n, 127.0f, out); }
// Queries of 16 bits: as wide as exact sums of their products with codes of 8 bits allow, which stay below 2^31.
inline float keep(const float* x, int64_t n, int16_t* out) {
  return rounded(x, n, static_cast<float>(std::min<int64_t>(32767, 0x7fffffff / (127 * n))), out);
}

// Products of query and key, `kStep` elements at a time.
template <class T>
struct Scores {
  static constexpr int kStep = 16;
  using Query = float;
  using Sum = Lanes;
  struct Key {
    Lanes part;
  };
  static Sum none() { return all(0.0f); }
  static Key key(const T* p) { return {load(p)}; }
  static Sum add(Key key, const float* query, Sum sum) { return plus_product(key.part, load(query), sum); }
};

#if defined(__AVX512BF16__)
template <>
struct Scores<bf16> {
  static constexpr int kStep = 32;
  using Query = bf16;
  using Sum = Lanes;
  struct Key {
    __m512bh part;
  };
  static Sum none() { return all(0.0f); }
  static Key key(const bf16* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
  static Sum add(Key key, const bf16* query, Sum sum) {
    return {_mm512_dpbf16_ps(sum.v, key.part, (__m512bh)_mm512_loadu_si512(query))};
  }
};
#endif

// Queries of 16 bits lose less than bfloat16 does. Sums are exact: see `keep`, which leaves queries of kWidestHead 14 bits.
constexpr int64_t kWidestHead = 1024;
template <>
struct Scores<int8_t> {
  static constexpr int kStep = 32;
  using Query = int16_t;
  using Sum = PairSums;
  struct Key {
    Shorts part;
  };
  static Sum none() { return no_pairs(); }
  static Key key(const int8_t* p) { return {load_shorts(p)}; }
  static Sum add(Key key, const int16_t* query, Sum sum) { return plus_pairs(key.part, query, sum); }
};

}  // namespace moe_ray
