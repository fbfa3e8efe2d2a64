// What a product could reach if nothing had to be fetched: sums of a panel class in registers, the same few weights and inputs
// over and over. For comparison only (`moe-ray bench kernels`).
#pragma once

#include "linear.h"

namespace moe_ray {

// Adds to as many sums as hide the latency of one, `times` each. Returns the multiplications with a weight.
template <class Of>
int64_t bare(Pool& pool, int64_t times) {
  constexpr int kChunks = 16, kSums = kRegisters == 32 ? 12 : 6;
  alignas(64) static const uint8_t weights[256] = {};
  alignas(64) static const typename Of::Input rows[kSums * 16] = {};
  pool.run(kChunks, false, [&](int, int) {
    const Whole table = whole_zero();
    typename Of::Sums sums[kSums];
#pragma GCC unroll 12
    for (int j = 0; j < kSums; j++) {
      typename Of::Sums begun{};
      asm volatile("" : "+m"(begun));  // so that the compiler cannot know them to be the same
      sums[j] = begun;
    }
    const uint8_t* w = weights;
    const typename Of::Input* x = rows;
    for (int64_t i = 0; i < times; i++) {
      asm("" : "+r"(w), "+r"(x));  // nor products to repeat
      const auto part = Of::part(w, table, 0);
#pragma GCC unroll 12
      for (int j = 0; j < kSums; j++) Of::add(sums[j], part, Of::inputs(x + 16 * j, 0));
    }
#pragma GCC unroll 12
    for (int j = 0; j < kSums; j++) {
      const typename Of::Sums kept = sums[j];
      asm volatile("" : : "m"(kept));  // so that they are computed
    }
  });
  return kChunks * times * kSums * kPanel * Of::kInputs / Of::kParts;
}

}  // namespace moe_ray
