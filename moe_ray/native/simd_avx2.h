// Lanes of AVX2 with FMA and F16C: two registers of eight.
#pragma once

#include <immintrin.h>

namespace moe_ray {

struct Lanes {
  __m256 a, b;
};

constexpr int kRegisters = 8;  // how many Lanes the register file holds

// Keeps the compiler from computing what comes later before this: it would not all fit into registers.
inline void settle_now(Lanes& x) { asm("" : "+x"(x.a), "+x"(x.b)); }
inline Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes operator+(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Lanes operator-(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Lanes operator*(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Lanes operator/(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Lanes plus_product(Lanes x, Lanes y, Lanes z) {  // z + x y
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Lanes minus_product(Lanes x, Lanes y, Lanes z) {  // z - x y
  return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
inline Lanes minimum(Lanes x, Lanes y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Lanes maximum(Lanes x, Lanes y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Lanes magnitude(Lanes x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline Lanes nearest(Lanes x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }  // integer, ties to even
inline Lanes times_power_of_two(Lanes x, Lanes n) {  // for results that are normal numbers
  const auto exponent = [](__m256 m) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(m), _mm256_set1_epi32(127)), 23));
  };
  return {_mm256_mul_ps(x.a, exponent(n.a)), _mm256_mul_ps(x.b, exponent(n.b))};
}
// The first n lanes of x, then those of y.
inline Lanes first_lanes(int n, Lanes x, Lanes y) {
  const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), count = _mm256_set1_epi32(n);
  const __m256i high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
  return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, low))),
          _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, high)))};
}
// 0 where key equals value, else x.
inline Lanes zero_where(Lanes x, Lanes key, Lanes value) {
  return {_mm256_and_ps(x.a, _mm256_cmp_ps(key.a, value.a, _CMP_NEQ_UQ)),
          _mm256_and_ps(x.b, _mm256_cmp_ps(key.b, value.b, _CMP_NEQ_UQ))};
}

inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Lanes load(const bf16* p) {
  const auto widen = [](const bf16* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16));
  };
  return {widen(p), widen(p + 8)};
}
inline Lanes load(const half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline Lanes load(const int32_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)p)),
          _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)(p + 8)))};
}
inline Lanes load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
inline Lanes load(const e4m3* p) {
  const __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), most = _mm256_set1_epi16(0x3f80);
  const __m256i part = _mm256_and_si256(_mm256_slli_epi16(x, 7), most);
  const __m256i sign = _mm256_and_si256(x, _mm256_set1_epi16(static_cast<short>(0x8000)));
  const __m256i bits = _mm256_or_si256(_mm256_or_si256(part, sign), _mm256_cmpeq_epi16(part, most));  // all ones: NaN
  const __m256 by = _mm256_set1_ps(kE4m3FromHalf);
  return {_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(bits)), by),
          _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1)), by)};
}

struct Shorts {  // 32 whole numbers of 16 bits
  __m256i a, b;
};
struct PairSums {  // 16 sums of their products, two to each
  __m256i a, b;
};
inline Shorts load_shorts(const int8_t* p) {
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(p + 16)))};
}
inline PairSums no_pairs() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline PairSums plus_pairs(Shorts x, const int16_t* y, PairSums z) {
  const __m256i a = _mm256_loadu_si256((const __m256i*)y), b = _mm256_loadu_si256((const __m256i*)(y + 16));
#if defined(__AVXVNNI__)
  return {_mm256_dpwssd_avx_epi32(z.a, x.a, a), _mm256_dpwssd_avx_epi32(z.b, x.b, b)};
#else
  return {_mm256_add_epi32(z.a, _mm256_madd_epi16(x.a, a)), _mm256_add_epi32(z.b, _mm256_madd_epi16(x.b, b))};
#endif
}
inline Lanes floats_of(PairSums x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

// The first, the second of 16 pairs of bfloat16.
inline Lanes first_of_pairs(const void* p) {
  const auto* q = static_cast<const __m256i*>(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(q), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(q + 1), 16))};
}
inline Lanes second_of_pairs(const void* p) {
  const auto* q = static_cast<const __m256i*>(p);
  const __m256i high = _mm256_set1_epi32(~0xffff);
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(q), high)),
          _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(q + 1), high))};
}

inline void store(float* p, Lanes x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline void store(half* p, Lanes x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, 0));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, 0));
}
inline __m256i rounded_to_bf16(__m256 x) {  // nearest even, in the low halves of 32 bits
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
}
inline void store(bf16* p, Lanes x) {
  const __m256i pairs = _mm256_packus_epi32(rounded_to_bf16(x.a), rounded_to_bf16(x.b));  // by 128-bit halves
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(pairs, 0xd8));
}
inline __m256i rounded_to_e4m3(__m256 x) {  // nearest even, in the lowest bytes of 32 bits; what is not finite: NaN
  const __m256 sign_bit = _mm256_set1_ps(-0.0f), whole = _mm256_andnot_ps(sign_bit, x);
  const __m256 most = _mm256_min_ps(whole, _mm256_set1_ps(kE4m3Most));
  const __m256i bits = _mm256_castps_si256(most);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7ffff - (120 << 23))));
  const __m256i normal = _mm256_srli_epi32(up, 20);
  const __m256 base = _mm256_set1_ps(kE4m3Subnormal);
  const __m256i small = _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(most, base)), _mm256_castps_si256(base));
  const __m256i is_small = _mm256_castps_si256(_mm256_cmp_ps(most, _mm256_set1_ps(kE4m3Normal), _CMP_LT_OQ));
  const __m256i sign = _mm256_srli_epi32(_mm256_castps_si256(_mm256_and_ps(sign_bit, x)), 24);
  const __m256i code = _mm256_or_si256(_mm256_blendv_epi8(normal, small, is_small), sign);
  const __m256 unsound = _mm256_cmp_ps(whole, _mm256_set1_ps(__builtin_inff()), _CMP_NLT_UQ);
  return _mm256_blendv_epi8(code, _mm256_set1_epi32(0x7f), _mm256_castps_si256(unsound));
}
inline void store(e4m3* p, Lanes x) {
  const __m256i pairs = _mm256_packus_epi32(rounded_to_e4m3(x.a), rounded_to_e4m3(x.b));  // by 128-bit halves
  const __m256i shorts = _mm256_permute4x64_epi64(pairs, 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1)));
}
inline __m256i shorts_of(Lanes x) {  // saturated, in order
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
}
inline void store_bytes(int8_t* p, Lanes x) {  // whole numbers from -128 to 127
  const __m256i shorts = shorts_of(x);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1)));
}
inline void store_shorts(int16_t* p, Lanes x) {  // whole numbers of 16 bits
  _mm256_storeu_si256((__m256i*)p, shorts_of(x));
}

inline float sum(Lanes x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(Lanes x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// Lane i of the result is the sum of the lanes of v[i].
inline Lanes sum_each(const Lanes v[16]) {
  __m256 out[2];
  for (int i = 0; i < 2; i++) {
    __m256 s[8];
    for (int j = 0; j < 8; j++) s[j] = _mm256_add_ps(v[8 * i + j].a, v[8 * i + j].b);
    for (int j = 0; j < 4; j++) s[j] = _mm256_hadd_ps(s[2 * j], s[2 * j + 1]);
    const __m256 low = _mm256_hadd_ps(s[0], s[1]), high = _mm256_hadd_ps(s[2], s[3]);
    out[i] = _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  }
  return {out[0], out[1]};
}

// Whole sums as floats: there is no rounding before the last step, so no order either.
inline Lanes sum_each(const PairSums v[16]) {
  __m256i out[2];
  for (int i = 0; i < 2; i++) {
    __m256i s[8];
    for (int j = 0; j < 8; j++) s[j] = _mm256_add_epi32(v[8 * i + j].a, v[8 * i + j].b);
    for (int j = 0; j < 4; j++) s[j] = _mm256_hadd_epi32(s[2 * j], s[2 * j + 1]);
    const __m256i low = _mm256_hadd_epi32(s[0], s[1]), high = _mm256_hadd_epi32(s[2], s[3]);
    out[i] = _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
  }
  return floats_of(PairSums{out[0], out[1]});
}

// The order in which sum_each adds 16 lanes: neighbours, then neighbouring sums, and so on.
constexpr int kSumOrder[16] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};

// Two whole numbers for every lane of plus_pairs, and where its other factors of one lane lie.
inline Shorts pair_for_all(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return {_mm256_set1_epi32(pair), _mm256_set1_epi32(pair)};
}
constexpr int pair_place(int lane, int which) { return 2 * lane + which; }

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace moe_ray
