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

// Columns are vectors over V::kWidth rows of w; one step of `load_columns` makes those of kStep<T> channels.
template <class T>
constexpr int kStep = sizeof(T) == 2 && !__is_same(T, Half) ? 8 : 4;

template <class V, class T>
typename V::F load_column(const T* w, int64_t ld) {
  float column[V::kWidth];
  for (int r = 0; r < V::kWidth; ++r) column[r] = widen(w[r * ld]);
  return V::load(column);
}

// PLANMILL_TURN: only the transposition, for AMX emulated.
#if defined(PLANMILL_AVX2) || defined(PLANMILL_AVX512) || defined(PLANMILL_TURN)
inline __m128 load4(const float* x) { return _mm_loadu_ps(x); }
inline __m128 load4(const Half* x) { return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))); }
inline __m128 load4(const BFloat16* x) { return _mm_loadu_ps(reinterpret_cast<const float*>(x)); }  // pairs of channels

// Four columns of eight rows, of numbers of 32 bits.
template <class T>
inline void transpose_rows(const T* w, int64_t ld, __m256* out) {
  const auto rows = [&](int64_t r) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(load4(w + r * ld)), load4(w + (r + 4) * ld), 1);
  };
  const __m256 a = rows(0), b = rows(1), c = rows(2), d = rows(3);
  const __m256 ab0 = _mm256_unpacklo_ps(a, b), ab1 = _mm256_unpackhi_ps(a, b);
  const __m256 cd0 = _mm256_unpacklo_ps(c, d), cd1 = _mm256_unpackhi_ps(c, d);
  out[0] = _mm256_shuffle_ps(ab0, cd0, 0x44);
  out[1] = _mm256_shuffle_ps(ab0, cd0, 0xee);
  out[2] = _mm256_shuffle_ps(ab1, cd1, 0x44);
  out[3] = _mm256_shuffle_ps(ab1, cd1, 0xee);
}
#endif

#if defined(PLANMILL_AVX2)
inline __m256 even_channels(__m256 pairs) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16));
}
inline __m256 odd_channels(__m256 pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(pairs), _mm256_set1_epi32(-65536)));
}
template <class T>
inline void transpose_all(const T* w, int64_t ld, __m256* out) {
  transpose_rows(w, ld, out);
}
#elif defined(PLANMILL_AVX512)
inline __m512 even_channels(__m512 pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16));
}
inline __m512 odd_channels(__m512 pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32(-65536)));
}
template <class T>
inline void transpose_all(const T* w, int64_t ld, __m512* out) {
  __m256 low[4], high[4];
  transpose_rows(w, ld, low);
  transpose_rows(w + 8 * ld, ld, high);
  for (int i = 0; i < 4; ++i) out[i] = _mm512_insertf32x8(_mm512_castps256_ps512(low[i]), high[i], 1);
}
#endif

template <class V, class T>
inline void load_columns(const T* w, int64_t ld, typename V::F* columns) {
#if defined(PLANMILL_AVX2) || defined(PLANMILL_AVX512)
  if constexpr (kStep<T> == 8) {
    typename V::F pairs[4];
    transpose_all(w, ld, pairs);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) columns[2 * i] = even_channels(pairs[i]), columns[2 * i + 1] = odd_channels(pairs[i]);
  } else {
    transpose_all(w, ld, columns);
  }
#else
  for (int i = 0; i < kStep<T>; ++i) columns[i] = load_column<V>(w + i, ld);
#endif
}

template <class V, class T>
void pack_as(const T* w, int64_t ld, int64_t rows, int64_t k, float* panel) {
  constexpr int64_t width = 2 * V::kWidth, step = kStep<T>;
  if (rows < width) {
    for (int64_t c = 0; c < k; ++c)
      for (int64_t r = 0; r < width; ++r) panel[c * width + r] = r < rows ? widen(w[r * ld + c]) : 0.0f;
    return;
  }
  for (int half = 0; half < 2; ++half, w += V::kWidth * ld, panel += V::kWidth) {
    int64_t c = 0;
    for (; c + step <= k; c += step) {
      typename V::F columns[step];
      load_columns<V>(w + c, ld, columns);
#pragma GCC unroll 8
      for (int64_t i = 0; i < step; ++i) V::store(panel + (c + i) * width, columns[i]);
    }
    for (; c < k; ++c) V::store(panel + c * width, load_column<V>(w + c, ld));
  }
}

// Few rows of x: the panel is used where it is made, in registers. The sums are those of multiply_tile, bit for bit.
template <class V, class T, int N>
void stream_tile(const T* w, int64_t ld, int64_t k, const float* x, float* z, int64_t ldz, bool first, const T* next) {
  using F = typename V::F;
  constexpr int W = V::kWidth;
  constexpr int64_t step = kStep<T>, line = 64 / static_cast<int64_t>(sizeof(T)), share = 2 * W * step / line;
  F sum[N][2];
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r) sum[r][0] = sum[r][1] = V::zero();
  int64_t c = 0;
  for (; c + step <= k; c += step) {
    if (next != nullptr)  // a line of every row of the next panel, spread over the steps that use a line of this one
      for (int64_t r = c % line / step * share; r < (c % line / step + 1) * share; ++r)
        __builtin_prefetch(next + r * ld + c / line * line, 0, 3);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      F columns[step];
      load_columns<V>(w + half * W * ld + c, ld, columns);
#pragma GCC unroll 8
      for (int64_t i = 0; i < step; ++i)
#pragma GCC unroll 8
        for (int r = 0; r < N; ++r) sum[r][half] = V::fma(V::set1(x[r * kChannelBlock + c + i]), columns[i], sum[r][half]);
    }
  }
  for (; c < k; ++c)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const F column = load_column<V>(w + half * W * ld + c, ld);
#pragma GCC unroll 8
      for (int r = 0; r < N; ++r) sum[r][half] = V::fma(V::set1(x[r * kChannelBlock + c]), column, sum[r][half]);
    }
#pragma GCC unroll 8
  for (int r = 0; r < N; ++r)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* out = z + r * ldz + half * W;
      V::store(out, first ? sum[r][half] : V::add(V::load(out), sum[r][half]));
    }
}

constexpr int kStreamTile = 4;   // rows of x whose sums fit in registers beside the columns
constexpr int kStreamRows = 8;   // from here on it pays to pack

template <class V, class T, int N>
void stream_rows(int64_t n, const T* w, int64_t ld, int64_t k, const float* x, float* z, int64_t ldz, bool first,
                 const T* next) {
  if (n == N) return stream_tile<V, T, N>(w, ld, k, x, z, ldz, first, next);
  if constexpr (N > 1) stream_rows<V, T, N - 1>(n, w, ld, k, x, z, ldz, first, next);
}

template <class V, class T>
void stream_as(const T* w, int64_t ld, int64_t k, const float* x, int64_t rows, float* z, int64_t ldz, bool first,
               const T* next) {
  const int64_t tiles = (rows + kStreamTile - 1) / kStreamTile;
  for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
    const int64_t n = (rows - row) / (tiles - tile);
    stream_rows<V, T, kStreamTile>(n, w, ld, k, x + row * kChannelBlock, z + row * ldz, ldz, first, tile == 0 ? next : nullptr);
    row += n;
  }
}

template <class V>
void stream(const void* w, Storage storage, int64_t ld, int64_t k, const float* x, int64_t rows, float* z, int64_t ldz,
            bool first, const void* next) {
  switch (storage) {
    case Storage::kFloat:
      return stream_as<V>(static_cast<const float*>(w), ld, k, x, rows, z, ldz, first, static_cast<const float*>(next));
    case Storage::kBFloat16:
      return stream_as<V>(static_cast<const BFloat16*>(w), ld, k, x, rows, z, ldz, first, static_cast<const BFloat16*>(next));
    case Storage::kHalf:
      return stream_as<V>(static_cast<const Half*>(w), ld, k, x, rows, z, ldz, first, static_cast<const Half*>(next));
  }
}

template <class V>
void pack(const void* w, Storage storage, int64_t ld, int64_t rows, int64_t k, float* panel) {
  switch (storage) {
    case Storage::kFloat:
      return pack_as<V>(static_cast<const float*>(w), ld, rows, k, panel);
    case Storage::kBFloat16:
      return pack_as<V>(static_cast<const BFloat16*>(w), ld, rows, k, panel);
    case Storage::kHalf:
      return pack_as<V>(static_cast<const Half*>(w), ld, rows, k, panel);
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
void multiply(const float* x, int64_t rows, const float* panel, int64_t k, float* z, int64_t ldz, bool first,
              const char* next, int64_t next_stride, int64_t next_bytes) {
  const int64_t tiles = (rows + kRowTile<V> - 1) / kRowTile<V>;
  for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
    const int64_t n = (rows - row) / (tiles - tile);
    if (next != nullptr)
      for (int64_t r = tile * 2 * V::kWidth / tiles; r < (tile + 1) * 2 * V::kWidth / tiles; ++r)
        for (int64_t b = 0; b < next_bytes; b += 64) __builtin_prefetch(next + r * next_stride + b, 0, 2);
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
  return {2 * V::kWidth, kStreamRows, &pack<V>, &multiply<V>, &stream<V>, &load_row, &activate<V>, &accumulate<V>};
}

}  // namespace
}  // namespace planmill
