// Rows of float32, bfloat16 or float16 as vectors of float32: what kernels read and write in the dtype of their tensors.
#pragma once

#include "common/element.h"
#include "common/vec.h"

namespace planmill {
namespace {

// A stored number and its float32 value.
struct Float32 {
  using Stored = float;
  static float read(Stored x) { return x; }
  static Stored round(float x) { return x; }
};

struct BFloat16 {
  using Stored = uint16_t;
  static float read(Stored x) {
    const uint32_t word = static_cast<uint32_t>(x) << 16;
    float value;
    __builtin_memcpy(&value, &word, 4);
    return value;
  }
  static Stored round(float x) {  // nearest even; NaN stays NaN
    uint32_t word;
    __builtin_memcpy(&word, &x, 4);
    const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    return static_cast<Stored>((word & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
};

struct Half {
  using Stored = _Float16;
  static float read(Stored x) { return static_cast<float>(x); }
  static Stored round(float x) { return static_cast<Stored>(x); }
};

template <class V, class T>
inline typename V::F load_row(const typename T::Stored* p) {
  if constexpr (sizeof(typename T::Stored) == 4) {
    return V::load(p);
  } else {
    float wide[V::kWidth];
    for (int i = 0; i < V::kWidth; ++i) wide[i] = T::read(p[i]);
    return V::load(wide);
  }
}

template <class V, class T>
inline void store_row(typename T::Stored* p, typename V::F x) {
  if constexpr (sizeof(typename T::Stored) == 4) {
    V::store(p, x);
  } else {
    float wide[V::kWidth];
    V::store(wide, x);
    for (int i = 0; i < V::kWidth; ++i) p[i] = T::round(wide[i]);
  }
}

// GCC 12 leaves the loops above one number at a time.
#if defined(PLANMILL_AVX2)
template <>
inline __m256 load_row<VecAvx2, BFloat16>(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}

template <>
inline void store_row<VecAvx2, BFloat16>(uint16_t* p, __m256 x) {
  const __m256i word = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(word, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

template <>
inline __m256 load_row<VecAvx2, Half>(const _Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <>
inline void store_row<VecAvx2, Half>(_Float16* p, __m256 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(PLANMILL_AVX512)
template <>
inline __m512 load_row<VecAvx512, BFloat16>(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

template <>
inline void store_row<VecAvx512, BFloat16>(uint16_t* p, __m512 x) {
  const __m512i word = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(word, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i kept = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(kept));
}

template <>
inline __m512 load_row<VecAvx512, Half>(const _Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

template <>
inline void store_row<VecAvx512, Half>(_Float16* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#endif

}  // namespace
}  // namespace planmill
