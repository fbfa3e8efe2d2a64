// How one panel of 16 outputs is multiplied with rows of inputs, for each way to hold weights. A panel class has
//   Input    what the inputs are converted to (activations.h)
//   step     adds the products of a few inputs of ROWS rows
// and those of floats sum in Lanes, those of integers in whole numbers, a group at a time.
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
  static constexpr bool kIntegers = false;
  static constexpr int kInputs = 2, kBytes = 2 * 16 * sizeof(T);  // of a step

  template <int ROWS>
  static void step(const uint8_t* w, const float* x, int64_t ldx, Lanes* sums) {
    for (int j = 0; j < 2; j++) {
      const Lanes weights = load(reinterpret_cast<const T*>(w) + 16 * j);
#pragma GCC unroll 12
      for (int i = 0; i < ROWS; i++) sums[i] = plus_product(weights, all(x[i * ldx + j]), sums[i]);
    }
  }
};

// Panels of bfloat16: [K/2][16][2], pairs of inputs beside each other.
#if defined(__AVX512BF16__)
struct Pairs {
  using Input = bf16;
  static constexpr bool kIntegers = false;
  static constexpr int kInputs = 2, kBytes = 64;

  template <int ROWS>
  static void step(const uint8_t* w, const bf16* x, int64_t ldx, Lanes* sums) {
    const __m512bh weights = (__m512bh)_mm512_loadu_si512(w);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
      int pair;
      std::memcpy(&pair, x + i * ldx, 4);
      sums[i].v = _mm512_dpbf16_ps(sums[i].v, (__m512bh)_mm512_set1_epi32(pair), weights);
    }
  }
};
#else
struct Pairs {
  using Input = float;
  static constexpr bool kIntegers = false;
  static constexpr int kInputs = 2, kBytes = 64;

  template <int ROWS>
  static void step(const uint8_t* w, const float* x, int64_t ldx, Lanes* sums) {
    const Lanes even = first_of_pairs(w);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) sums[i] = plus_product(even, all(x[i * ldx]), sums[i]), settle_now(sums[i]);
    const Lanes odd = second_of_pairs(w);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) sums[i] = plus_product(odd, all(x[i * ldx + 1]), sums[i]), settle_now(sums[i]);
  }
};
#endif

}  // namespace moe_ray
