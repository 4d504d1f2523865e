// The kernels behind RowKernels, written once over a vector type of common/vec.h.
#pragma once

#include "common/vec.h"
#include "routing/rows.h"

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

// Four vectors of columns at a time, all rows: the sums stay in registers.
template <class V, class T>
void sum_of(const void* const* rows, const float* weights, int64_t count, int64_t n, float factor, void* out) {
  using Stored = typename T::Stored;
  constexpr int64_t kStep = 4 * V::kWidth;
  auto* target = static_cast<Stored*>(out);
  const auto vfactor = V::set1(factor);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    typename V::F sum[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sum[c] = V::zero();
    for (int64_t k = 0; k < count; ++k) {
      const auto* row = static_cast<const Stored*>(rows[k]) + i;
      const auto weight = V::set1(weights == nullptr ? 1.0f : weights[k]);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sum[c] = V::fma(weight, load_row<V, T>(row + c * V::kWidth), sum[c]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) store_row<V, T>(target + i + c * V::kWidth, V::mul(vfactor, sum[c]));
  }
  for (; i < n; ++i) {
    float sum = 0.0f;
    for (int64_t k = 0; k < count; ++k)
      sum += (weights == nullptr ? 1.0f : weights[k]) * T::read(static_cast<const Stored*>(rows[k])[i]);
    target[i] = T::round(factor * sum);
  }
}

template <class V>
void sum_rows(Element type, const void* const* rows, const float* weights, int64_t count, int64_t n, float factor,
              void* out) {
  if (type == Element::kFloat) sum_of<V, Float32>(rows, weights, count, n, factor, out);
  else if (type == Element::kBFloat16) sum_of<V, BFloat16>(rows, weights, count, n, factor, out);
  else sum_of<V, Half>(rows, weights, count, n, factor, out);
}

template <class V, class T>
void add_to(const void* residual, const float* scale, const void* row, int64_t n, void* out) {
  using Stored = typename T::Stored;
  const auto* base = static_cast<const Stored*>(residual);
  const auto* from = static_cast<const Stored*>(row);
  auto* target = static_cast<Stored*>(out);
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) {
    const auto factor = scale == nullptr ? V::set1(1.0f) : V::load(scale + i);
    const auto sum = base == nullptr ? V::zero() : load_row<V, T>(base + i);
    store_row<V, T>(target + i, V::fma(factor, load_row<V, T>(from + i), sum));
  }
  for (; i < n; ++i) {
    const float x = (scale == nullptr ? 1.0f : scale[i]) * T::read(from[i]);
    target[i] = T::round(base == nullptr ? x : T::read(base[i]) + x);
  }
}

template <class V>
void add_row(Element type, const void* residual, const float* scale, const void* row, int64_t n, void* out) {
  if (type == Element::kFloat) add_to<V, Float32>(residual, scale, row, n, out);
  else if (type == Element::kBFloat16) add_to<V, BFloat16>(residual, scale, row, n, out);
  else add_to<V, Half>(residual, scale, row, n, out);
}

template <class V>
constexpr RowKernels row_kernels() {
  return {&sum_rows<V>, &add_row<V>};
}

}  // namespace
}  // namespace planmill
