// Floats as whole numbers of 8 or 16 bits with one scale, by their largest magnitude (absmax).
#pragma once

#include "simd.h"

namespace moe_ray {

inline void store_whole(int8_t* p, Lanes x) { store_bytes(p, x); }
inline void store_whole(int16_t* p, Lanes x) { store_shorts(p, x); }

struct Magnitude {
  float largest, unsound;  // unsound: NaN where a number is NaN or infinite, else 0
};

inline Magnitude magnitude_of(const float* x, int64_t n) {  // n: a multiple of 16
  Lanes top = all(0.0f), unsound = all(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    top = maximum(top, magnitude(load(x + i)));
    unsound = plus_product(load(x + i), all(0.0f), unsound);
  }
  return {largest(top), sum(unsound)};
}

inline Lanes whole_within(Lanes x, float most) { return maximum(minimum(nearest(x), all(most)), all(-most)); }

}  // namespace moe_ray
