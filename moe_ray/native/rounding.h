// Floats to codes, as formats/rounding.py rounds them: the nearest level under the scale, of those tried for a group, that
// loses least.
#pragma once

#include <cmath>
#include <limits>

#include "matrix.h"

namespace moe_ray {

struct Rounding {
  int32_t bits;
  int64_t group;        // inputs that share a scale; divides k
  bool offsets;         // asymmetric
  const float* levels;  // 16 ascending values; null: whole numbers
};

inline float storable(float x) {  // exact in bfloat16, and 1 where all values of a group are 0
  alignas(64) float lanes[16];
  alignas(64) bf16 narrow[16];
  store(narrow, all(x));
  store(lanes, load(narrow));
  return lanes[0] == 0.0f ? 1.0f : lanes[0];
}

struct Grid {
  float scale, low, high, zero;  // a code is nearest(x / scale) within [low, high], plus zero
};

// The squared error of a group.
inline float loss(const float* x, int64_t n, const Grid& grid) {
  const float inverse = 1.0f / grid.scale;
  Lanes lost = all(0.0f);
  for (int64_t j = 0; j < n; j += 16) {  // n: a multiple of 16
    const Lanes v = load(x + j);
    const Lanes whole = maximum(minimum(nearest(v * all(inverse)), all(grid.high)), all(grid.low));
    const Lanes error = minus_product(whole, all(grid.scale), v);
    lost = plus_product(error, error, lost);
  }
  return sum(lost);
}

inline void round_group(const float* x, int64_t n, const Rounding& how, uint8_t* codes, float* scale, float* offset) {
  constexpr float kShrinks[] = {1.0f, 0.96f, 0.92f, 0.88f, 0.84f, 0.8f, 0.76f};
  const int tries = how.bits == 4 ? 7 : 1;
  float low = 0.0f, high = 0.0f;
  for (int64_t j = 0; j < n; j++) {
    low = std::min(low, x[j]);
    high = std::max(high, x[j]);
  }
  const float largest = std::max(high, -low);
  const float middle = how.bits == 4 ? 8.0f : 128.0f, last = 2.0f * middle - 1.0f, most = middle - 1.0f;
  Grid best{1.0f, -middle, most, middle};
  float least = std::numeric_limits<float>::infinity();
  const auto consider = [&](const Grid& grid) {
    const float lost = loss(x, n, grid);
    if (lost < least) {
      least = lost;
      best = grid;
    }
  };
  if (how.levels) {
    best.scale = storable(largest);
  } else if (how.offsets) {
    for (int i = 0; i < tries; i++) {
      const float s = storable((high - low) * (kShrinks[i] / last));
      const float zero = std::min(last, std::max(0.0f, std::nearbyint(-low * kShrinks[i] / s)));
      consider({s, -zero, last - zero, zero});
    }
  } else if (tries == 1) {
    consider({storable(largest / most), -middle, most, middle});
  } else {
    // There is one code more below 0 than above it. The sign of the scale puts it where the largest value is.
    const float signed_largest = high > -low ? -largest : largest;
    for (int i = 0; i < tries; i++) {
      consider({storable(signed_largest / -most * kShrinks[i]), -middle, most, middle});
      consider({storable(signed_largest / middle * kShrinks[i]), -middle, most, middle});
    }
  }
  *scale = best.scale;
  if (offset) *offset = best.scale * (middle - best.zero);
  const float inverse = 1.0f / best.scale;
  for (int64_t j = 0; j < n; j++) {
    const float v = x[j] * inverse;
    if (how.levels) {
      int code = 0;
      while (code < 15 && v > 0.5f * (how.levels[code] + how.levels[code + 1])) code++;
      codes[j] = static_cast<uint8_t>(code);
    } else {
      codes[j] = static_cast<uint8_t>(std::min(best.high, std::max(best.low, std::nearbyint(v))) + best.zero);
    }
  }
}

// w [n, k] → codes [n, k], scales and offsets [n, k / group].
template <class T>
void round_rows(Pool& pool, const T* w, int64_t n, int64_t k, const Rounding& how, uint8_t* codes, float* scales,
                float* offsets) {
  const int64_t groups = k / how.group, batch = 16;
  pool.run(static_cast<int>((n + batch - 1) / batch), false, [&](int chunk, int) {
    std::vector<float> row(k);
    for (int64_t r = chunk * batch; r < std::min(n, (chunk + 1) * batch); r++) {
      for (int64_t j = 0; j < k; j += 16) store(row.data() + j, load(w + r * k + j));
      for (int64_t g = 0; g < groups; g++)
        round_group(row.data() + g * how.group, how.group, how, codes + r * k + g * how.group, scales + r * groups + g,
                    offsets ? offsets + r * groups + g : nullptr);
    }
  });
}

}  // namespace moe_ray
