// Sixteen float32 lanes on any instruction set, and the numbers that are stored narrower. What differs between CPUs is in
// simd_*.h and dots_*.h; everything above them is written once.
//
// A Lanes is one AVX-512 register, two of AVX2 or four of NEON. Sums over lanes run in one fixed order.
#pragma once

#include <cstdint>
#include <cstring>

namespace moe_ray {

struct bf16 {  // bfloat16, by its bits
  uint16_t bits;
};
struct half {  // IEEE binary16, by its bits
  uint16_t bits;
};
struct e4m3 {  // 8 bits of sign, 4 of exponent, 3 of mantissa (OCP OFP8, E4M3): no infinity, at most 448, 0x7f is NaN
  uint8_t bits;
};
// A magnitude of E4M3, shifted left by 7, is that of a binary16, subnormals included, of which it is worth 2^8.
constexpr float kE4m3Most = 448.0f, kE4m3FromHalf = 256.0f;
constexpr float kE4m3Normal = 0x1p-6f;  // the least magnitude that is not subnormal
// Added to a subnormal magnitude, leaves its code, rounded to nearest even, in the sum's lowest bits.
constexpr float kE4m3Subnormal = 0x1p14f;

}  // namespace moe_ray

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(__aarch64__)
#include "simd_neon.h"
#else
#error "no kernels for this instruction set"
#endif

namespace moe_ray {

// e^x. Range reduction by ln 2 in two parts and a degree 6 polynomial (Cephes, Moshier 1984), within 2 ulp.
inline Lanes exponential(Lanes x) {
  x = minimum(maximum(x, all(-87.3f)), all(88.3f));
  const Lanes n = nearest(x * all(1.44269504088896341f));
  Lanes r = minus_product(n, all(0.693359375f), x);
  r = minus_product(n, all(-2.12194440e-4f), r);
  Lanes y = all(1.9875691500e-4f);
  y = plus_product(y, r, all(1.3981999507e-3f));
  y = plus_product(y, r, all(8.3334519073e-3f));
  y = plus_product(y, r, all(4.1665795894e-2f));
  y = plus_product(y, r, all(1.6666665459e-1f));
  y = plus_product(y, r, all(5.0000001201e-1f));
  y = plus_product(y, r * r, r + all(1.0f));
  return times_power_of_two(y, n);
}

inline Lanes silu(Lanes x) { return x / (all(1.0f) + exponential(all(0.0f) - x)); }  // x / (1 + e^-x)

}  // namespace moe_ray
