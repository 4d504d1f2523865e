// One vector type per instruction set, with the same few operations, so that a kernel is written once.
//
// VecSse2, VecAvx2 and VecAvx512 are thin names for intrinsics and exist only where the including file asks for them.
// VecGeneric<W> is plain C++: the stand-in with which tests run the AVX-512 code on machines that lack it. No STL and no torch header: files that include this are compiled for instruction sets that the running
// machine may not have, and the linker must not pick their copies of inline functions for anyone else.
#pragma once

#include <cstdint>

// The including file says which types it wants: g++ reads a whole file before it obeys `#pragma GCC target`, so the
// compiler's own macros (__AVX2__) do not tell (mended in GCC 13).
#if defined(PLANMILL_SSE2) || defined(PLANMILL_AVX2) || defined(PLANMILL_AVX512)
// GCC 12's own AVX-512 header trips these warnings (GCC PR 105593, mended in GCC 13).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace planmill {
namespace {

template <int W>
struct VecGeneric {
  static constexpr int kWidth = W;
  struct F {
    float v[W];
  };
  struct I {
    int32_t v[W];
  };

  static F zero() { return set1(0.0f); }
  static F set1(float x) {
    F r;
    for (int i = 0; i < W; ++i) r.v[i] = x;
    return r;
  }
  static F load(const float* p) {
    F r;
    for (int i = 0; i < W; ++i) r.v[i] = p[i];
    return r;
  }
  static void store(float* p, F a) {
    for (int i = 0; i < W; ++i) p[i] = a.v[i];
  }
  static F add(F a, F b) {
    for (int i = 0; i < W; ++i) a.v[i] += b.v[i];
    return a;
  }
  static F sub(F a, F b) {
    for (int i = 0; i < W; ++i) a.v[i] -= b.v[i];
    return a;
  }
  static F mul(F a, F b) {
    for (int i = 0; i < W; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static F fma(F a, F b, F c) {
    for (int i = 0; i < W; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static F max(F a, F b) {  // like maxps: b where the comparison is false
    for (int i = 0; i < W; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  static F min(F a, F b) {  // like minps: b where the comparison is false
    for (int i = 0; i < W; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  static F div(F a, F b) {
    for (int i = 0; i < W; ++i) a.v[i] /= b.v[i];
    return a;
  }
  static F where_positive(F x, F a, F b) {  // a where x > 0, b elsewhere
    for (int i = 0; i < W; ++i) a.v[i] = x.v[i] > 0.0f ? a.v[i] : b.v[i];
    return a;
  }
  static F power_of_two(I n) {  // exact for -126 <= n <= 127, some float for others
    F r;
    for (int i = 0; i < W; ++i) r.v[i] = __builtin_bit_cast(float, (static_cast<uint32_t>(n.v[i]) + 127u) << 23);
    return r;
  }
  static uint32_t mask_ge(F a, F b) {
    uint32_t m = 0;
    for (int i = 0; i < W; ++i) m |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i;
    return m;
  }
  static I izero() {
    I r;
    for (int i = 0; i < W; ++i) r.v[i] = 0;
    return r;
  }
  static I iload(const int32_t* p) {
    I r;
    for (int i = 0; i < W; ++i) r.v[i] = p[i];
    return r;
  }
  static void istore(int32_t* p, I a) {
    for (int i = 0; i < W; ++i) p[i] = a.v[i];
  }
  static I ibroadcast(const uint32_t* p) {
    I r;
    for (int i = 0; i < W; ++i) r.v[i] = static_cast<int32_t>(*p);
    return r;
  }
  // acc + a.low * b.low + a.high * b.high, the halves of each lane taken as signed 16-bit integers
  static I dot_pairs(I acc, I a, I b) {
    for (int i = 0; i < W; ++i) {
      const int32_t low = static_cast<int16_t>(a.v[i]) * static_cast<int16_t>(b.v[i]);
      const int32_t high = static_cast<int16_t>(a.v[i] >> 16) * static_cast<int16_t>(b.v[i] >> 16);
      acc.v[i] += low + high;
    }
    return acc;
  }
  // Four products of unsigned bytes of a and signed bytes of b per lane, summed: here and with VNNI in 32 bits, elsewhere
  // in two 16-bit halves that wrap. They begin from 64 times two 16-bit numbers; `end_quads` adds them to `total`.
  static I start_quads(I start) {
    for (int i = 0; i < W; ++i)
      start.v[i] = 64 * (static_cast<int16_t>(start.v[i]) + static_cast<int16_t>(start.v[i] >> 16));
    return start;
  }
  static I dot_quads(I acc, I a, I b) {
    for (int i = 0; i < W; ++i)
      for (int byte = 0; byte < 32; byte += 8)
        acc.v[i] += static_cast<uint8_t>(a.v[i] >> byte) * static_cast<int8_t>(b.v[i] >> byte);
    return acc;
  }
  static I end_quads(I total, I acc) {
    for (int i = 0; i < W; ++i) total.v[i] += acc.v[i];
    return total;
  }
  static F to_float(I a) {
    F r;
    for (int i = 0; i < W; ++i) r.v[i] = static_cast<float>(a.v[i]);
    return r;
  }
  static I round_to_int(F a) {
    I r;
    for (int i = 0; i < W; ++i) r.v[i] = static_cast<int32_t>(__builtin_rintf(a.v[i]));
    return r;
  }
  // 2 * kWidth 16-bit numbers
  static void store_int16(int16_t* p, I a, I b) {
    for (int i = 0; i < W; ++i) p[i] = static_cast<int16_t>(a.v[i]), p[W + i] = static_cast<int16_t>(b.v[i]);
  }
  static float sum(F a) {
    for (int w = W / 2; w > 0; w /= 2)
      for (int i = 0; i < w; ++i) a.v[i] += a.v[i + w];
    return a.v[0];
  }
  static float max_lane(F a) {
    for (int i = 1; i < W; ++i) a.v[0] = a.v[i] > a.v[0] ? a.v[i] : a.v[0];
    return a.v[0];
  }
};

#if defined(PLANMILL_SSE2)
struct VecSse2 {  // what every x86-64 processor has
  static constexpr int kWidth = 4;
  using F = __m128;
  using I = __m128i;

  static F zero() { return _mm_setzero_ps(); }
  static F set1(float x) { return _mm_set1_ps(x); }
  static F load(const float* p) { return _mm_loadu_ps(p); }
  static void store(float* p, F a) { _mm_storeu_ps(p, a); }
  static F add(F a, F b) { return _mm_add_ps(a, b); }
  static F sub(F a, F b) { return _mm_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
  static F max(F a, F b) { return _mm_max_ps(a, b); }
  static F min(F a, F b) { return _mm_min_ps(a, b); }
  static F div(F a, F b) { return _mm_div_ps(a, b); }
  static F where_positive(F x, F a, F b) {
    const F positive = _mm_cmpgt_ps(x, zero());
    return _mm_or_ps(_mm_and_ps(positive, a), _mm_andnot_ps(positive, b));
  }
  static F power_of_two(I n) { return _mm_castsi128_ps(_mm_slli_epi32(_mm_add_epi32(n, _mm_set1_epi32(127)), 23)); }
  static uint32_t mask_ge(F a, F b) { return static_cast<uint32_t>(_mm_movemask_ps(_mm_cmpge_ps(a, b))); }
  static I izero() { return _mm_setzero_si128(); }
  static I iload(const int32_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static void istore(int32_t* p, I a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a); }
  static I ibroadcast(const uint32_t* p) { return _mm_set1_epi32(static_cast<int32_t>(*p)); }
  static I dot_pairs(I acc, I a, I b) { return _mm_add_epi32(acc, _mm_madd_epi16(a, b)); }
  static F to_float(I a) { return _mm_cvtepi32_ps(a); }
  static I round_to_int(F a) { return _mm_cvtps_epi32(a); }
  static void store_int16(int16_t* p, I a, I b) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(a, b)); }
  static float sum(F a) {
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
  }
  static float max_lane(F a) {
    a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps(a, a, 1)));
  }
};
#endif

#if defined(PLANMILL_AVX2)
struct VecAvx2 {
  static constexpr int kWidth = 8;
  using F = __m256;
  using I = __m256i;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F where_positive(F x, F a, F b) { return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, zero(), _CMP_GT_OQ)); }
  static F power_of_two(I n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  static uint32_t mask_ge(F a, F b) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ))); }
  static I izero() { return _mm256_setzero_si256(); }
  static I iload(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void istore(int32_t* p, I a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static I ibroadcast(const uint32_t* p) { return _mm256_set1_epi32(static_cast<int32_t>(*p)); }
  // The sum is written as assembly so that it stays in its register: GCC 12 otherwise reorders the unrolled loop, and
  // spills half of the sums or copies them.
  static I dot_pairs(I acc, I a, I b) {
    const I products = _mm256_madd_epi16(a, b);
    asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(products));
    return acc;
  }
  static I start_quads(I start) { return _mm256_slli_epi16(start, 6); }
  static I dot_quads(I acc, I a, I b) {
    const I products = _mm256_maddubs_epi16(a, b);
    asm("vpaddw %1, %0, %0" : "+x"(acc) : "x"(products));
    return acc;
  }
  static I end_quads(I total, I acc) { return _mm256_add_epi32(total, _mm256_madd_epi16(acc, _mm256_set1_epi16(1))); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static I round_to_int(F a) { return _mm256_cvtps_epi32(a); }
  static void store_int16(int16_t* p, I a, I b) {
    const I packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
  }
  static float sum(F a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static float max_lane(F a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
};
#endif

#if defined(PLANMILL_AVX512)
struct VecAvx512 {
  static constexpr int kWidth = 16;
  using F = __m512;
  using I = __m512i;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F where_positive(F x, F a, F b) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_GT_OQ), b, a); }
  static F power_of_two(I n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
  }
  static uint32_t mask_ge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static I izero() { return _mm512_setzero_si512(); }
  static I iload(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void istore(int32_t* p, I a) { _mm512_storeu_si512(p, a); }
  static I ibroadcast(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int32_t>(*p)); }
  static I dot_pairs(I acc, I a, I b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
  }
  static I start_quads(I start) { return _mm512_madd_epi16(start, _mm512_set1_epi16(64)); }
  static I dot_quads(I acc, I a, I b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
  }
  static I end_quads(I total, I acc) { return _mm512_add_epi32(total, acc); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static I round_to_int(F a) { return _mm512_cvtps_epi32(a); }
  static void store_int16(int16_t* p, I a, I b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(a));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + kWidth), _mm512_cvtsepi32_epi16(b));
  }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static float max_lane(F a) { return _mm512_reduce_max_ps(a); }
};
#endif

}  // namespace
}  // namespace planmill
