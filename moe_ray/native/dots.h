// How panels of 16 outputs are multiplied with rows of inputs, for each way to hold weights. A panel class has
//   Input   what the inputs are converted to (activations.h)
//   part    the weights of a panel for one input, or a few: kParts parts of kInputs inputs follow each other in kBytes
//   inputs  those of a row, beside every output
//   add     the products to a row's sums: Lanes of floats; of integers whole numbers, a group at a time
#pragma once

#if defined(__aarch64__)
#include "dots_neon.h"
#else
#include "dots_x86.h"
#endif

namespace moe_ray {

// Panels of floats: [K][16].
template <class T>
struct Floats {
  using Input = float;
  using Sums = Lanes;
  static constexpr bool kIntegers = false;
  static constexpr int kInputs = 2, kParts = 2, kBytes = 2 * 16 * sizeof(T);
  static Lanes part(const uint8_t* w, const Whole&, int q) { return load(reinterpret_cast<const T*>(w) + 16 * q); }
  static Lanes inputs(const float* x, int q) { return all(x[q]); }
  static void add(Lanes& sum, const Lanes& weights, const Lanes& x) { sum = plus_product(weights, x, sum); }
};

// Panels of bfloat16: [K/2][16][2], pairs of inputs beside each other.
#if defined(__AVX512BF16__)
struct Pairs {
  using Input = bf16;
  using Sums = Lanes;
  static constexpr bool kIntegers = false;
  static constexpr int kInputs = 2, kParts = 1, kBytes = 64;
  static __m512bh part(const uint8_t* w, const Whole&, int) { return (__m512bh)_mm512_loadu_si512(w); }
  static __m512bh inputs(const bf16* x, int) {
    int pair;
    std::memcpy(&pair, x, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static void add(Lanes& sum, __m512bh weights, __m512bh x) { sum.v = _mm512_dpbf16_ps(sum.v, x, weights); }
};
#else
struct Pairs {
  using Input = float;
  using Sums = Lanes;
  static constexpr bool kIntegers = false;
  static constexpr int kInputs = 2, kParts = 2, kBytes = 64;
  static Lanes part(const uint8_t* w, const Whole&, int q) { return q ? second_of_pairs(w) : first_of_pairs(w); }
  static Lanes inputs(const float* x, int q) { return all(x[q]); }
  static void add(Lanes& sum, const Lanes& weights, const Lanes& x) {
    sum = plus_product(weights, x, sum);
    settle_now(sum);
  }
};
#endif

// Adds the products of kBytes of PANELS panels, `stride` bytes apart, with ROWS rows, `ldx` inputs apart.
template <class Of, int ROWS, int PANELS>
inline void step(const uint8_t* w, int64_t stride, const Whole& table, const typename Of::Input* x, int64_t ldx,
                 typename Of::Sums (*sums)[ROWS]) {
#pragma GCC unroll 4
  for (int q = 0; q < Of::kParts; q++) {
    decltype(Of::part(w, table, q)) weights[PANELS];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++) weights[p] = Of::part(w + p * stride, table, q);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
      const auto beside = Of::inputs(x + i * ldx, q);
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; p++) Of::add(sums[p][i], weights[p], beside);
    }
  }
}

}  // namespace moe_ray
