// Products of small integers on x86-64: 16 sums of 32 bits, each over four inputs at a time.
//
// With VNNI one instruction multiplies unsigned weights by signed inputs of 8 bits, or of 16 at half the rate. Without, 4-bit
// codes are summed in 16 bits (32 products of at most 15 * 127, pairwise, stay below 2^15), and 8-bit weights are always
// multiplied by inputs of 16 bits, for the same price as 8 bits.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace moe_ray {

#if defined(__AVX512F__)

using Whole = __m512i;  // 64 bytes: 16 outputs, four inputs each
inline Whole whole_zero() { return _mm512_setzero_si512(); }
inline Whole whole_load(const void* p) { return _mm512_loadu_si512(p); }
inline void whole_store(void* p, Whole x) { _mm512_storeu_si512(p, x); }
inline Whole whole_same(int32_t x) { return _mm512_set1_epi32(x); }
inline Whole whole_table(const int8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
inline Lanes whole_floats(Whole x) { return {_mm512_cvtepi32_ps(x)}; }
inline void settle_now(Whole& x) { asm("" : "+v"(x)); }  // see simd_avx512.h
inline Whole low_nibbles(Whole x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Whole high_nibbles(Whole x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
inline Whole looked_up(Whole table, Whole index) { return _mm512_shuffle_epi8(table, index); }
inline Whole add32(Whole x, Whole y) { return _mm512_add_epi32(x, y); }
inline Whole add16(Whole x, Whole y) { return _mm512_add_epi16(x, y); }
inline Whole pairs16(Whole x, Whole y) { return _mm512_madd_epi16(x, y); }
inline Whole pairs8(Whole unsigned8, Whole signed8) { return _mm512_maddubs_epi16(unsigned8, signed8); }
inline Whole odd_codes(Whole x) { return _mm512_srli_epi16(x, 8); }
inline Whole even_codes(Whole x) { return _mm512_and_si512(x, _mm512_set1_epi16(255)); }
inline Whole odd_bytes(Whole x) { return _mm512_srai_epi16(x, 8); }
inline Whole even_bytes(Whole x) { return _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8); }
#if defined(__AVX512VNNI__)
#define MOE_RAY_VNNI 1
inline Whole dot8(Whole sum, Whole unsigned8, Whole signed8) { return _mm512_dpbusd_epi32(sum, unsigned8, signed8); }
inline Whole dot16(Whole sum, Whole x, Whole y) { return _mm512_dpwssd_epi32(sum, x, y); }
#endif

#else

struct Whole {
  __m256i a, b;
};
inline Whole whole_same(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Whole whole_zero() { return whole_same(0); }
inline Whole whole_load(const void* p) {
  const auto* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void whole_store(void* p, Whole x) {
  auto* q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, x.a);
  _mm256_storeu_si256(q + 1, x.b);
}
inline Whole whole_table(const int8_t* p) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  return {table, table};
}
inline Lanes whole_floats(Whole x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline void settle_now(Whole& x) { asm("" : "+x"(x.a), "+x"(x.b)); }  // see simd_avx2.h
inline __m256i nibbles(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline Whole low_nibbles(Whole x) { return {nibbles(x.a), nibbles(x.b)}; }
inline Whole high_nibbles(Whole x) {
  return {nibbles(_mm256_srli_epi16(x.a, 4)), nibbles(_mm256_srli_epi16(x.b, 4))};
}
inline Whole looked_up(Whole t, Whole i) { return {_mm256_shuffle_epi8(t.a, i.a), _mm256_shuffle_epi8(t.b, i.b)}; }
inline Whole add32(Whole x, Whole y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Whole add16(Whole x, Whole y) { return {_mm256_add_epi16(x.a, y.a), _mm256_add_epi16(x.b, y.b)}; }
inline Whole pairs16(Whole x, Whole y) { return {_mm256_madd_epi16(x.a, y.a), _mm256_madd_epi16(x.b, y.b)}; }
inline Whole pairs8(Whole unsigned8, Whole signed8) {
  return {_mm256_maddubs_epi16(unsigned8.a, signed8.a), _mm256_maddubs_epi16(unsigned8.b, signed8.b)};
}
inline Whole odd_codes(Whole x) { return {_mm256_srli_epi16(x.a, 8), _mm256_srli_epi16(x.b, 8)}; }
inline Whole even_codes(Whole x) {  // by shifts: a mask would take one of sixteen registers
  return {_mm256_srli_epi16(_mm256_slli_epi16(x.a, 8), 8), _mm256_srli_epi16(_mm256_slli_epi16(x.b, 8), 8)};
}
inline Whole odd_bytes(Whole x) { return {_mm256_srai_epi16(x.a, 8), _mm256_srai_epi16(x.b, 8)}; }
inline Whole even_bytes(Whole x) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(x.a, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(x.b, 8), 8)};
}
#if defined(__AVXVNNI__)
#define MOE_RAY_VNNI 1
inline Whole dot8(Whole sum, Whole unsigned8, Whole signed8) {
  return {_mm256_dpbusd_avx_epi32(sum.a, unsigned8.a, signed8.a), _mm256_dpbusd_avx_epi32(sum.b, unsigned8.b, signed8.b)};
}
inline Whole dot16(Whole sum, Whole x, Whole y) {
  return {_mm256_dpwssd_avx_epi32(sum.a, x.a, y.a), _mm256_dpwssd_avx_epi32(sum.b, x.b, y.b)};
}
#endif

#endif

inline Whole same_four(const int8_t* x) {  // four inputs beside every output
  int32_t four;
  std::memcpy(&four, x, 4);
  return whole_same(four);
}
inline Whole same_two(const int16_t* x) {
  int32_t two;
  std::memcpy(&two, x, 4);
  return whole_same(two);
}

// Weights of 8 bits, stored as their codes, times inputs of 16, of which four lie in the order 0 2 1 3: the even ones, then
// the odd ones. A sum of 128 products and its start stay below 2^31.
struct WideBytes {
  using Input = int16_t;
  using Sums = Whole;
  static constexpr bool kIntegers = true;
  static constexpr int kMiddle = 128, kInputs = 8, kParts = 4, kBytes = 128;
  static Sums begun(int32_t start) { return whole_same(start); }
  static Whole total(Sums s) { return s; }
  static void settle(Sums&) {}
  static void arrange(Input* four) { std::swap(four[1], four[2]); }
  static Whole part(const uint8_t* w, Whole, int q) {
    const Whole codes = whole_load(w + 64 * (q / 2));
    return q % 2 ? odd_codes(codes) : even_codes(codes);
  }
  static Whole inputs(const Input* x, int q) { return same_two(x + 2 * q); }
  static void add(Sums& sum, Whole weights, Whole x) {
#if defined(MOE_RAY_VNNI)
    sum = dot16(sum, weights, x);
#else
    sum = add32(sum, pairs16(weights, x));
#endif
    settle_now(sum);
  }
};

#if defined(MOE_RAY_VNNI)

// Unsigned weights times signed inputs.
struct Unsigned {
  using Input = int8_t;
  using Sums = Whole;
  static constexpr bool kIntegers = true;
  static constexpr int kInputs = 8, kParts = 2;
  static Sums begun(int32_t start) { return whole_same(start); }
  static Whole total(Sums s) { return s; }
  static void settle(Sums&) {}
  static void arrange(Input*) {}
  static Whole inputs(const Input* x, int q) { return same_four(x + 4 * q); }
  static void add(Sums& sum, Whole weights, Whole x) { sum = dot8(sum, weights, x); }
};

// Weights of 8 bits, stored as their codes.
struct Bytes : Unsigned {
  static constexpr int kMiddle = 128, kBytes = 128;
  static Whole part(const uint8_t* w, Whole, int q) { return whole_load(w + 64 * q); }
};

// Codes of 4 bits. TABLE: they are looked up.
template <bool TABLE>
struct Nibbles : Unsigned {
  static constexpr int kMiddle = TABLE ? 128 : 8, kBytes = 64;
  static constexpr int kTableMiddle = 128;  // what is added to a table's values
  static Whole part(const uint8_t* w, Whole table, int q) {
    const Whole codes = q ? high_nibbles(whole_load(w)) : low_nibbles(whole_load(w));
    return TABLE ? looked_up(table, codes) : codes;
  }
};

#else

using Bytes = WideBytes;
#define MOE_RAY_BYTES_ARE_WIDE

template <bool TABLE>
struct Nibbles;

template <>
struct Nibbles<true> : WideBytes {
  static constexpr int kMiddle = 0, kBytes = 64, kTableMiddle = 0;
  static Whole part(const uint8_t* w, Whole table, int q) {
    const Whole weights = looked_up(table, q / 2 ? high_nibbles(whole_load(w)) : low_nibbles(whole_load(w)));
    return q % 2 ? odd_bytes(weights) : even_bytes(weights);
  }
};

template <>
struct Nibbles<false> {
  using Input = int8_t;
  struct Sums {
    Whole now, before;  // of 16 bits, since the last settling; of 32 bits
  };
  static constexpr bool kIntegers = true;
  static constexpr int kMiddle = 8, kInputs = 8, kParts = 2, kBytes = 64, kTableMiddle = 0;
  static Sums begun(int32_t start) { return {whole_zero(), whole_same(start)}; }
  static Whole total(Sums s) { return s.before; }
  static void settle(Sums& s) {  // after 32 inputs at the latest
    s.before = add32(s.before, pairs16(s.now, whole_same(0x00010001)));
    s.now = whole_zero();
  }
  static void arrange(Input*) {}
  static Whole part(const uint8_t* w, Whole, int q) {
    return q ? high_nibbles(whole_load(w)) : low_nibbles(whole_load(w));
  }
  static Whole inputs(const Input* x, int q) { return same_four(x + 4 * q); }
  static void add(Sums& sum, Whole weights, Whole x) {
    sum.now = add16(sum.now, pairs8(weights, x));
    settle_now(sum.now);
  }
};

#endif

}  // namespace moe_ray
