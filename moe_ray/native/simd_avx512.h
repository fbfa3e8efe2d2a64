// Lanes of AVX-512 (F, BW, VL, DQ).
#pragma once

#include <immintrin.h>

namespace moe_ray {

struct Lanes {
  __m512 v;
};

constexpr int kRegisters = 32;  // how many Lanes the register file holds

// Keeps the compiler from computing what comes later before this: it would not all fit into registers.
inline void settle_now(Lanes& x) { asm("" : "+v"(x.v)); }
inline Lanes all(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes plus_product(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // c + a b
inline Lanes minus_product(Lanes a, Lanes b, Lanes c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
inline Lanes minimum(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes maximum(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes magnitude(Lanes a) { return {_mm512_abs_ps(a.v)}; }
inline Lanes nearest(Lanes a) { return {_mm512_roundscale_ps(a.v, 8)}; }  // integer, ties to even
inline Lanes times_power_of_two(Lanes a, Lanes n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// The first n lanes of a, then those of b.
inline Lanes first_lanes(int n, Lanes a, Lanes b) {
  return {_mm512_mask_mov_ps(b.v, static_cast<__mmask16>((1u << n) - 1), a.v)};
}
// 0 where key equals value, else a.
inline Lanes zero_where(Lanes a, Lanes key, Lanes value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(key.v, value.v, _CMP_NEQ_UQ), a.v)};
}

inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Lanes load(const bf16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline Lanes load(const half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline Lanes load(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
inline Lanes load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
inline Lanes load(const e4m3* p) {
  const __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), most = _mm256_set1_epi16(0x3f80);
  const __m256i part = _mm256_and_si256(_mm256_slli_epi16(x, 7), most);
  const __m256i sign = _mm256_and_si256(x, _mm256_set1_epi16(static_cast<short>(0x8000)));
  const __m256i bits = _mm256_or_si256(_mm256_or_si256(part, sign), _mm256_cmpeq_epi16(part, most));  // all ones: NaN
  return {_mm512_mul_ps(_mm512_cvtph_ps(bits), _mm512_set1_ps(kE4m3FromHalf))};
}

struct Shorts {  // 32 whole numbers of 16 bits
  __m512i v;
};
struct PairSums {  // 16 sums of their products, two to each
  __m512i v;
};
inline Shorts load_shorts(const int8_t* p) { return {_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p))}; }
inline PairSums no_pairs() { return {_mm512_setzero_si512()}; }
inline PairSums plus_pairs(Shorts x, const int16_t* y, PairSums z) {
#if defined(__AVX512VNNI__)
  return {_mm512_dpwssd_epi32(z.v, x.v, _mm512_loadu_si512(y))};
#else
  return {_mm512_add_epi32(z.v, _mm512_madd_epi16(x.v, _mm512_loadu_si512(y)))};
#endif
}
inline Lanes floats_of(PairSums x) { return {_mm512_cvtepi32_ps(x.v)}; }

// The first, the second of 16 pairs of bfloat16.
inline Lanes first_of_pairs(const void* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
inline Lanes second_of_pairs(const void* p) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(~0xffff)))};
}

inline void store(float* p, Lanes x) { _mm512_storeu_ps(p, x.v); }
inline void store(half* p, Lanes x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, 0)); }
inline void store(bf16* p, Lanes x) {  // nearest even
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x.v));
#else
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
#endif
}
inline void store(e4m3* p, Lanes x) {  // nearest even; what is not finite: NaN
  const __m512 whole = _mm512_abs_ps(x.v), most = _mm512_min_ps(whole, _mm512_set1_ps(kE4m3Most));
  const __m512i bits = _mm512_castps_si512(most);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff - (120 << 23))));
  const __m512 base = _mm512_set1_ps(kE4m3Subnormal);
  const __m512i small = _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(most, base)), _mm512_castps_si512(base));
  const __mmask16 is_small = _mm512_cmp_ps_mask(most, _mm512_set1_ps(kE4m3Normal), _CMP_LT_OQ);
  const __m512i part = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 20), is_small, small);
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(x.v), 24), _mm512_set1_epi32(0x80));
  const __mmask16 unsound = _mm512_cmp_ps_mask(whole, _mm512_set1_ps(__builtin_inff()), _CMP_NLT_UQ);
  const __m512i code = _mm512_mask_mov_epi32(_mm512_or_si512(part, sign), unsound, _mm512_set1_epi32(0x7f));
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(code));
}
inline void store_bytes(int8_t* p, Lanes x) {  // whole numbers from -128 to 127
  _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
inline void store_shorts(int16_t* p, Lanes x) {  // whole numbers of 16 bits
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x.v)));
}

inline float sum(Lanes x) { return _mm512_reduce_add_ps(x.v); }
inline float largest(Lanes x) { return _mm512_reduce_max_ps(x.v); }

// Lane i of the result is the sum of the lanes of v[i].
inline Lanes sum_each(const Lanes v[16]) {
  __m512 a[8], b[4];
  for (int i = 0; i < 8; i++)  // pairs (2i, 2i+1): within 128-bit lanes
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i].v, v[2 * i + 1].v), _mm512_unpackhi_ps(v[2 * i].v, v[2 * i + 1].v));
  for (int i = 0; i < 4; i++) {
    const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  // b[i]: in each 128-bit lane the partial sums of v[4i..4i+3]; now add the four 128-bit lanes.
  const __m512 lo = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
  const __m512 hi = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xdd))};
}

// Whole sums as floats: there is no rounding before the last step, so no order either.
inline Lanes sum_each(const PairSums v[16]) {
  __m512i a[8], b[4];
  for (int i = 0; i < 8; i++)
    a[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * i].v, v[2 * i + 1].v),
                            _mm512_unpackhi_epi32(v[2 * i].v, v[2 * i + 1].v));
  for (int i = 0; i < 4; i++)
    b[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_epi64(a[2 * i], a[2 * i + 1]));
  const auto halves = [](__m512i x, __m512i y) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
  };
  return floats_of(PairSums{halves(halves(b[0], b[1]), halves(b[2], b[3]))});
}

// The order in which sum_each adds 16 lanes: neighbours, then neighbouring sums, and so on.
constexpr int kSumOrder[16] = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};

// Two whole numbers for every lane of plus_pairs, and where its other factors of one lane lie.
inline Shorts pair_for_all(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return {_mm512_set1_epi32(pair)};
}
constexpr int pair_place(int lane, int which) { return 2 * lane + which; }

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace moe_ray
