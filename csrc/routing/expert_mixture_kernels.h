// The kernels behind ExpertMixtureKernels, written once over a vector type of common/vec.h.
//
// Weights are read from their plain layout and packed a panel at a time, [channels][columns], into a buffer of the size of
// the first-level cache, as float32 whatever their storage. Every sum then runs over the channels in order in one lane: one
// kernel for all sizes and dtypes, and a token's result has the same bits in every batch.
#pragma once

#include "common/vec.h"
#include "common/vec_math.h"
#include "routing/expert_mixture.h"

namespace planmill {
namespace {

inline float widen(float x) { return x; }

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float widen(BFloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }

inline float widen(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  if ((x.bits & 0x7c00) == 0x7c00) return __builtin_bit_cast(float, sign | magnitude | 0x7f800000u);  // infinity, NaN
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, scaled) | sign);
}

// Channels [begin, end) of 8 rows into columns of the panel.
template <class T>
void pack_plain(const T* const* rows, int64_t begin, int64_t end, float* panel, int64_t width) {
  for (int64_t c = begin; c < end; ++c)
    for (int r = 0; r < 8; ++r) panel[c * width + r] = widen(rows[r][c]);
}

#if defined(PLANMILL_AVX2) || defined(PLANMILL_AVX512)
inline __m128 load4(const float* x) { return _mm_loadu_ps(x); }
inline __m128 load4(const Half* x) { return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))); }
inline __m256 join(__m128 low, __m128 high) { return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1); }

// Four rows of two four-number halves each -> four columns of eight.
inline void transpose4(__m256& a, __m256& b, __m256& c, __m256& d) {
  const __m256 ab0 = _mm256_unpacklo_ps(a, b), ab1 = _mm256_unpackhi_ps(a, b);
  const __m256 cd0 = _mm256_unpacklo_ps(c, d), cd1 = _mm256_unpackhi_ps(c, d);
  a = _mm256_shuffle_ps(ab0, cd0, 0x44);
  b = _mm256_shuffle_ps(ab0, cd0, 0xee);
  c = _mm256_shuffle_ps(ab1, cd1, 0x44);
  d = _mm256_shuffle_ps(ab1, cd1, 0xee);
}

template <class T>
int64_t pack_vector(const T* const* rows, int64_t k, float* panel, int64_t width) {
  int64_t c = 0;
  for (; c + 4 <= k; c += 4) {
    __m256 v0 = join(load4(rows[0] + c), load4(rows[4] + c)), v1 = join(load4(rows[1] + c), load4(rows[5] + c));
    __m256 v2 = join(load4(rows[2] + c), load4(rows[6] + c)), v3 = join(load4(rows[3] + c), load4(rows[7] + c));
    transpose4(v0, v1, v2, v3);
    float* out = panel + c * width;
    _mm256_storeu_ps(out, v0);
    _mm256_storeu_ps(out + width, v1);
    _mm256_storeu_ps(out + 2 * width, v2);
    _mm256_storeu_ps(out + 3 * width, v3);
  }
  return c;
}

// Pairs of bfloat16 travel as one number; the even channel of a pair is its low half.
inline int64_t pack_vector(const BFloat16* const* rows, int64_t k, float* panel, int64_t width) {
  int64_t c = 0;
  const auto load = [&](int r) { return _mm_loadu_ps(reinterpret_cast<const float*>(rows[r] + c)); };
  const auto store = [&](float* out, __m256 pairs) {
    const __m256i bits = _mm256_castps_si256(pairs);
    _mm256_storeu_ps(out, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
    _mm256_storeu_ps(out + width, _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-65536))));
  };
  for (; c + 8 <= k; c += 8) {
    __m256 v0 = join(load(0), load(4)), v1 = join(load(1), load(5));
    __m256 v2 = join(load(2), load(6)), v3 = join(load(3), load(7));
    transpose4(v0, v1, v2, v3);
    float* out = panel + c * width;
    store(out, v0);
    store(out + 2 * width, v1);
    store(out + 4 * width, v2);
    store(out + 6 * width, v3);
  }
  return c;
}
#else
template <class T>
int64_t pack_vector(const T* const*, int64_t, float*, int64_t) {
  return 0;
}
#endif

template <class V, class T>
void pack_as(const T* w, int64_t ld, int64_t rows, int64_t k, int64_t ahead, float* panel) {
  constexpr int64_t width = 2 * V::kWidth;
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t first = 0; first < width; first += 8) {
    const T* row[8];
    for (int64_t r = 0; r < 8; ++r) row[r] = w + (first + r < rows ? first + r : rows - 1) * ld;
    if (ahead != 0)
      for (int64_t r = 0; r < 8; ++r)
        for (int64_t c = 0; c < k; c += line) __builtin_prefetch(row[r] + ahead * ld + c, 0, 2);
    const int64_t done = pack_vector(row, k, panel + first, width);
    pack_plain(row, done, k, panel + first, width);
  }
}

template <class V>
void pack(const void* w, Storage storage, int64_t ld, int64_t rows, int64_t k, int64_t ahead, float* panel) {
  switch (storage) {
    case Storage::kFloat:
      return pack_as<V>(static_cast<const float*>(w), ld, rows, k, ahead, panel);
    case Storage::kBFloat16:
      return pack_as<V>(static_cast<const BFloat16*>(w), ld, rows, k, ahead, panel);
    case Storage::kHalf:
      return pack_as<V>(static_cast<const Half*>(w), ld, rows, k, ahead, panel);
  }
}

// N rows of x times a panel: 2N sums in registers; a channel costs two loads and N broadcasts for 2N multiply-adds.
template <class V, int N>
void multiply_tile(const float* x, const float* panel, int64_t k, float* z, int64_t ldz, bool first) {
  using F = typename V::F;
  constexpr int W = V::kWidth;
  F low[N], high[N];
#pragma GCC unroll 12
  for (int r = 0; r < N; ++r) low[r] = high[r] = V::zero();
  for (int64_t c = 0; c < k; ++c) {
    const F a = V::load(panel + c * 2 * W), b = V::load(panel + c * 2 * W + W);
#pragma GCC unroll 12
    for (int r = 0; r < N; ++r) {
      const F v = V::set1(x[r * kChannelBlock + c]);
      low[r] = V::fma(v, a, low[r]);
      high[r] = V::fma(v, b, high[r]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < N; ++r) {
    float* out = z + r * ldz;
    V::store(out, first ? low[r] : V::add(V::load(out), low[r]));
    V::store(out + W, first ? high[r] : V::add(V::load(out + W), high[r]));
  }
}

template <class V, int N>
void multiply_rows(int64_t n, const float* x, const float* panel, int64_t k, float* z, int64_t ldz, bool first) {
  if (n == N) return multiply_tile<V, N>(x, panel, k, z, ldz, first);
  if constexpr (N > 1) multiply_rows<V, N - 1>(n, x, panel, k, z, ldz, first);
}

template <class V>
constexpr int kRowTile = V::kWidth == 16 ? 12 : 6;  // as many as the registers hold

// Tiles of equal height, as far as that goes: a low tile waits for its own sums.
template <class V>
void multiply(const float* x, int64_t rows, const float* panel, int64_t k, float* z, int64_t ldz, bool first) {
  const int64_t tiles = (rows + kRowTile<V> - 1) / kRowTile<V>;
  for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
    const int64_t n = (rows - row) / (tiles - tile);
    multiply_rows<V, kRowTile<V>>(n, x + row * kChannelBlock, panel, k, z + row * ldz, ldz, first);
    row += n;
  }
}

template <class T>
void load_row_as(const T* x, int64_t n, float scale, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = scale * widen(x[i]);
}

inline void load_row(const void* x, Storage storage, int64_t n, float scale, float* out) {
  switch (storage) {
    case Storage::kFloat:
      return load_row_as(static_cast<const float*>(x), n, scale, out);
    case Storage::kBFloat16:
      return load_row_as(static_cast<const BFloat16*>(x), n, scale, out);
    case Storage::kHalf:
      return load_row_as(static_cast<const Half*>(x), n, scale, out);
  }
}

template <class V, typename V::F (*act)(typename V::F)>
void activate_with(const float* gate, const float* up, const float* gate_bias, const float* up_bias, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += V::kWidth) {
    auto g = V::load(gate + i);
    if (gate_bias != nullptr) g = V::add(g, V::load(gate_bias + i));
    g = act(g);
    if (up != nullptr) {
      auto u = V::load(up + i);
      if (up_bias != nullptr) u = V::add(u, V::load(up_bias + i));
      g = V::mul(g, u);
    }
    V::store(out + i, g);
  }
}

template <class V>
void activate(Activation kind, const float* gate, const float* up, const float* gate_bias, const float* up_bias,
              int64_t n, float* out) {
  switch (kind) {
    case Activation::kSilu:
      return activate_with<V, silu<V>>(gate, up, gate_bias, up_bias, n, out);
    case Activation::kGelu:
      return activate_with<V, gelu<V>>(gate, up, gate_bias, up_bias, n, out);
    case Activation::kGeluTanh:
      return activate_with<V, gelu_tanh<V>>(gate, up, gate_bias, up_bias, n, out);
    case Activation::kRelu:
      return activate_with<V, relu<V>>(gate, up, gate_bias, up_bias, n, out);
  }
}

template <class V>
void accumulate(const float* row, float scale, int64_t n, float* out) {
  const auto factor = V::set1(scale);
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) V::store(out + i, V::fma(factor, V::load(row + i), V::load(out + i)));
  for (; i < n; ++i) out[i] += scale * row[i];
}

template <class V>
constexpr ExpertMixtureKernels expert_mixture_kernels() {
  return {2 * V::kWidth, kRowTile<V>, &pack<V>, &multiply<V>, &load_row, &activate<V>, &accumulate<V>};
}

}  // namespace
}  // namespace planmill
