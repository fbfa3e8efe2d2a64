// Products of small integers on arm64: 16 sums of 32 bits, each over four inputs at a time. With the dot product extension
// (SDOT) in one instruction, else through 16 bits. Weights and inputs are signed.
#pragma once

#include <arm_neon.h>

#include "simd.h"

namespace moe_ray {

struct Whole {  // 64 bytes: 16 outputs, four inputs each; or 16 sums
  int8x16_t v[4];
};
inline Whole whole_same(int32_t x) {
  const int8x16_t v = vreinterpretq_s8_s32(vdupq_n_s32(x));
  return {{v, v, v, v}};
}
inline Whole whole_zero() { return whole_same(0); }
inline Whole whole_load(const void* p) {
  const auto* bytes = static_cast<const int8_t*>(p);
  return {{vld1q_s8(bytes), vld1q_s8(bytes + 16), vld1q_s8(bytes + 32), vld1q_s8(bytes + 48)}};
}
inline void whole_store(void* p, Whole x) {
  for (int i = 0; i < 4; i++) vst1q_s8(static_cast<int8_t*>(p) + 16 * i, x.v[i]);
}
inline Lanes whole_floats(Whole x) {
  return each_quarter([&](int i) { return vcvtq_f32_s32(vreinterpretq_s32_s8(x.v[i])); });
}
inline Whole whole_table(const int8_t* p) {
  const int8x16_t table = vld1q_s8(p);
  return {{table, table, table, table}};
}
inline int8x16_t same_four(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

inline int32x4_t dot8(int32x4_t sum, int8x16_t w, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, w, x);
#else
  // Two products of at most 128 * 127 fit into 16 bits.
  return vpadalq_s16(sum, vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)), vmull_high_s8(w, x)));
#endif
}

// Four sums of one register each.
struct Signed {
  using Input = int8_t;
  using Sums = Whole;
  static constexpr bool kIntegers = true;
  static constexpr int kInputs = 8, kParts = 2;
  static Sums begun(int32_t start) { return whole_same(start); }
  static Whole total(Sums s) { return s; }
  static void settle(Sums&) {}
  static void arrange(Input*) {}
  static int8x16_t inputs(const Input* x, int q) { return same_four(x + 4 * q); }
  static void add(Sums& sum, const Whole& weights, int8x16_t x) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
      sum.v[j] = vreinterpretq_s8_s32(dot8(vreinterpretq_s32_s8(sum.v[j]), weights.v[j], x));
  }
};

// Weights of 8 bits, stored as their codes; the sign is put in when they are read.
struct Bytes : Signed {
  static constexpr int kMiddle = 0, kBytes = 128;
  static Whole part(const uint8_t* w, const Whole&, int q) {
    Whole codes = whole_load(w + 64 * q);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) codes.v[j] = veorq_s8(codes.v[j], vdupq_n_s8(-128));
    return codes;
  }
};

// The same times inputs of 16 bits, as two of 8: four high halves, then four low ones.
struct WideBytes : Bytes {
  using Input = int16_t;
  struct Halves {
    int8x16_t high, low;
  };
  static void arrange(Input* four) {
    int8_t halves[8];
    for (int i = 0; i < 4; i++) {
      halves[i + 4] = static_cast<int8_t>(four[i]);
      halves[i] = static_cast<int8_t>((four[i] - halves[i + 4]) >> 8);
    }
    std::memcpy(four, halves, sizeof halves);
  }
  static Halves inputs(const Input* x, int q) {
    const auto* halves = reinterpret_cast<const int8_t*>(x + 4 * q);
    return {same_four(halves), same_four(halves + 4)};
  }
  static void add(Sums& sum, const Whole& weights, const Halves& x) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const int32x4_t high = vshlq_n_s32(dot8(vdupq_n_s32(0), weights.v[j], x.high), 8);
      sum.v[j] = vreinterpretq_s8_s32(vaddq_s32(vreinterpretq_s32_s8(sum.v[j]), dot8(high, weights.v[j], x.low)));
    }
  }
};

template <bool TABLE>
struct Nibbles : Signed {
  static constexpr int kMiddle = TABLE ? 0 : 8, kBytes = 64, kTableMiddle = 0;
  static Whole part(const uint8_t* w, const Whole& table, int q) {
    const Whole both = whole_load(w);
    Whole out;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const uint8x16_t bytes = vreinterpretq_u8_s8(both.v[j]);
      const uint8x16_t codes = q ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15));
      out.v[j] = TABLE ? vqtbl1q_s8(table.v[0], codes) : vreinterpretq_s8_u8(codes);
    }
    return out;
  }
};

}  // namespace moe_ray
