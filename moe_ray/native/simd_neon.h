// Lanes of arm64 NEON: four registers of four.
#pragma once

#include <arm_neon.h>

namespace moe_ray {

struct Lanes {
  float32x4_t v[4];
};

constexpr int kRegisters = 8;  // how many Lanes the register file holds

template <class Each>
inline Lanes each_quarter(const Each& work) {
  return {{work(0), work(1), work(2), work(3)}};
}

// Keeps the compiler from computing what comes later before this: it would not all fit into registers.
inline void settle_now(Lanes& x) { asm("" : "+w"(x.v[0]), "+w"(x.v[1]), "+w"(x.v[2]), "+w"(x.v[3])); }
inline Lanes all(float x) {
  const float32x4_t v = vdupq_n_f32(x);
  return {{v, v, v, v}};
}
inline Lanes operator+(Lanes x, Lanes y) { return each_quarter([&](int i) { return vaddq_f32(x.v[i], y.v[i]); }); }
inline Lanes operator-(Lanes x, Lanes y) { return each_quarter([&](int i) { return vsubq_f32(x.v[i], y.v[i]); }); }
inline Lanes operator*(Lanes x, Lanes y) { return each_quarter([&](int i) { return vmulq_f32(x.v[i], y.v[i]); }); }
inline Lanes operator/(Lanes x, Lanes y) { return each_quarter([&](int i) { return vdivq_f32(x.v[i], y.v[i]); }); }
inline Lanes plus_product(Lanes x, Lanes y, Lanes z) {  // z + x y
  return each_quarter([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); });
}
inline Lanes minus_product(Lanes x, Lanes y, Lanes z) {  // z - x y
  return each_quarter([&](int i) { return vfmsq_f32(z.v[i], x.v[i], y.v[i]); });
}
inline Lanes minimum(Lanes x, Lanes y) { return each_quarter([&](int i) { return vminq_f32(x.v[i], y.v[i]); }); }
inline Lanes maximum(Lanes x, Lanes y) { return each_quarter([&](int i) { return vmaxq_f32(x.v[i], y.v[i]); }); }
inline Lanes magnitude(Lanes x) { return each_quarter([&](int i) { return vabsq_f32(x.v[i]); }); }
inline Lanes nearest(Lanes x) { return each_quarter([&](int i) { return vrndnq_f32(x.v[i]); }); }  // ties to even
inline Lanes times_power_of_two(Lanes x, Lanes n) {  // for results that are normal numbers
  return each_quarter([&](int i) {
    const int32x4_t exponent = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23);
    return vmulq_f32(x.v[i], vreinterpretq_f32_s32(exponent));
  });
}
// The first n lanes of x, then those of y.
inline Lanes first_lanes(int n, Lanes x, Lanes y) {
  const int32_t numbers[4] = {0, 1, 2, 3};
  return each_quarter([&](int i) {
    return vbslq_f32(vcgtq_s32(vdupq_n_s32(n - 4 * i), vld1q_s32(numbers)), x.v[i], y.v[i]);
  });
}
// 0 where key equals value, else x.
inline Lanes zero_where(Lanes x, Lanes key, Lanes value) {
  return each_quarter([&](int i) { return vbslq_f32(vceqq_f32(key.v[i], value.v[i]), vdupq_n_f32(0.0f), x.v[i]); });
}

inline Lanes load(const float* p) {
  return each_quarter([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline Lanes load(const bf16* p) {
  return each_quarter([&](int i) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p) + 4 * i), 16));
  });
}
inline Lanes load(const half* p) {
  return each_quarter([&](int i) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p) + 4 * i)));
  });
}
inline Lanes load(const int32_t* p) {
  return each_quarter([&](int i) { return vcvtq_f32_s32(vld1q_s32(p + 4 * i)); });
}
inline Lanes load(const int8_t* p) {
  const int8x16_t x = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_s8(vget_high_s8(x));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
inline Lanes load(const e4m3* p) {
  const int8x16_t x = vld1q_s8(reinterpret_cast<const int8_t*>(p));
  const auto widen = [](int8x8_t eight) {
    const uint16x8_t wide = vreinterpretq_u16_s16(vmovl_s8(eight)), most = vdupq_n_u16(0x3f80);
    const uint16x8_t part = vandq_u16(vshlq_n_u16(wide, 7), most);
    return vorrq_u16(vorrq_u16(part, vandq_u16(wide, vdupq_n_u16(0x8000))), vceqq_u16(part, most));  // all ones: NaN
  };
  const uint16x8_t low = widen(vget_low_s8(x)), high = widen(vget_high_s8(x));
  const auto value = [](uint16x4_t bits) {
    return vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(bits)), kE4m3FromHalf);
  };
  return {{value(vget_low_u16(low)), value(vget_high_u16(low)), value(vget_low_u16(high)), value(vget_high_u16(high))}};
}

struct Shorts {  // 32 whole numbers of 16 bits
  int16x8_t v[4];
};
struct PairSums {  // 16 sums of their products, two to each
  int32x4_t v[4];
};
inline Shorts load_shorts(const int8_t* p) {
  const int8x16_t x = vld1q_s8(p), y = vld1q_s8(p + 16);
  return {{vmovl_s8(vget_low_s8(x)), vmovl_s8(vget_high_s8(x)), vmovl_s8(vget_low_s8(y)), vmovl_s8(vget_high_s8(y))}};
}
inline PairSums no_pairs() {
  const int32x4_t zero = vdupq_n_s32(0);
  return {{zero, zero, zero, zero}};
}
inline PairSums plus_pairs(Shorts x, const int16_t* y, PairSums z) {
  for (int i = 0; i < 4; i++) {
    const int16x8_t other = vld1q_s16(y + 8 * i);
    z.v[i] = vmlal_s16(z.v[i], vget_low_s16(x.v[i]), vget_low_s16(other));
    z.v[i] = vmlal_high_s16(z.v[i], x.v[i], other);
  }
  return z;
}
inline Lanes floats_of(PairSums x) { return each_quarter([&](int i) { return vcvtq_f32_s32(x.v[i]); }); }

// The first, the second of 16 pairs of bfloat16.
inline Lanes first_of_pairs(const void* p) {
  const auto* q = static_cast<const uint32_t*>(p);
  return each_quarter([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(vld1q_u32(q + 4 * i), 16)); });
}
inline Lanes second_of_pairs(const void* p) {
  const auto* q = static_cast<const uint32_t*>(p);
  return each_quarter([&](int i) {
    return vreinterpretq_f32_u32(vandq_u32(vld1q_u32(q + 4 * i), vdupq_n_u32(0xffff0000u)));
  });
}

inline void store(float* p, Lanes x) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
}
inline void store(half* p, Lanes x) {
  for (int i = 0; i < 4; i++)
    vst1_u16(reinterpret_cast<uint16_t*>(p) + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
}
inline void store(bf16* p, Lanes x) {  // nearest even
  for (int i = 0; i < 4; i++) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x.v[i]);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t kept = vbslq_u32(vceqq_f32(x.v[i], x.v[i]), rounded, vdupq_n_u32(0x7fc00000));
    vst1_u16(reinterpret_cast<uint16_t*>(p) + 4 * i, vshrn_n_u32(kept, 16));
  }
}
inline uint32x4_t rounded_to_e4m3(float32x4_t x) {  // nearest even; what is not finite: NaN
  const float32x4_t whole = vabsq_f32(x), most = vminq_f32(whole, vdupq_n_f32(kE4m3Most));
  const uint32x4_t bits = vreinterpretq_u32_f32(most);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 20), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7ffffu - (120u << 23))));
  const float32x4_t base = vdupq_n_f32(kE4m3Subnormal);
  const uint32x4_t small = vsubq_u32(vreinterpretq_u32_f32(vaddq_f32(most, base)), vreinterpretq_u32_f32(base));
  const uint32x4_t part = vbslq_u32(vcltq_f32(most, vdupq_n_f32(kE4m3Normal)), small, vshrq_n_u32(up, 20));
  const uint32x4_t sign = vandq_u32(vshrq_n_u32(vreinterpretq_u32_f32(x), 24), vdupq_n_u32(0x80));
  return vbslq_u32(vcltq_f32(whole, vdupq_n_f32(__builtin_inff())), vorrq_u32(part, sign), vdupq_n_u32(0x7f));
}
inline void store(e4m3* p, Lanes x) {
  const auto eight = [&](int i) {
    return vmovn_u16(vcombine_u16(vmovn_u32(rounded_to_e4m3(x.v[i])), vmovn_u32(rounded_to_e4m3(x.v[i + 1]))));
  };
  vst1q_u8(reinterpret_cast<uint8_t*>(p), vcombine_u8(eight(0), eight(2)));
}
inline int16x8_t shorts_of(float32x4_t a, float32x4_t b) {
  return vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(a)), vqmovn_s32(vcvtnq_s32_f32(b)));
}
inline void store_bytes(int8_t* p, Lanes x) {  // whole numbers from -128 to 127
  vst1q_s8(p, vcombine_s8(vqmovn_s16(shorts_of(x.v[0], x.v[1])), vqmovn_s16(shorts_of(x.v[2], x.v[3]))));
}
inline void store_shorts(int16_t* p, Lanes x) {  // whole numbers of 16 bits
  vst1q_s16(p, shorts_of(x.v[0], x.v[1]));
  vst1q_s16(p + 8, shorts_of(x.v[2], x.v[3]));
}

inline float sum(Lanes x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3]))); }
inline float largest(Lanes x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3]))); }

// Lane i of the result is the sum of the lanes of v[i].
inline Lanes sum_each(const Lanes v[16]) {
  return each_quarter([&](int i) {
    float32x4_t s[4];
    for (int j = 0; j < 4; j++) {
      const Lanes& x = v[4 * i + j];
      s[j] = vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3]));
    }
    return vpaddq_f32(vpaddq_f32(s[0], s[1]), vpaddq_f32(s[2], s[3]));
  });
}

// Whole sums as floats: there is no rounding before the last step, so no order either.
inline Lanes sum_each(const PairSums v[16]) {
  return each_quarter([&](int i) {
    int32x4_t s[4];
    for (int j = 0; j < 4; j++) {
      const PairSums& x = v[4 * i + j];
      s[j] = vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3]));
    }
    return vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(s[0], s[1]), vpaddq_s32(s[2], s[3])));
  });
}

// The order in which sum_each adds 16 lanes: neighbours, then neighbouring sums, and so on.
constexpr int kSumOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};

// Two whole numbers for every lane of plus_pairs, and where its other factors of one lane lie.
inline Shorts pair_for_all(const int16_t* p) {
  const int16x8_t both = vcombine_s16(vdup_n_s16(p[0]), vdup_n_s16(p[1]));
  return {{both, both, both, both}};
}
constexpr int pair_place(int lane, int which) { return lane / 4 * 8 + which * 4 + lane % 4; }

inline void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace moe_ray
