// The kernels behind MahalanobisKernels, written once over a vector type of common/vec.h.
#pragma once

#include "common/vec.h"
#include "moments/mahalanobis.h"

namespace planmill {
namespace {

inline float widen(float x) { return x; }
inline float widen(uint16_t x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }

constexpr int kTileRows = 3;  // x 4 vectors: twelve sums, and seven loads for twelve multiply-adds

template <class V, int Count>
void multiply_tile(const float* rows, int64_t row_stride, int64_t length, const float* r, int64_t stride, double* squares) {
  typename V::F sums[kTileRows][Count];
#pragma GCC unroll 3
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Count; ++v) sums[i][v] = V::zero();
  for (int64_t j = 0; j < length; j += V::kWidth) {
    typename V::F g[kTileRows];
#pragma GCC unroll 3
    for (int i = 0; i < kTileRows; ++i) g[i] = V::load(rows + i * row_stride + j);
#pragma GCC unroll 4
    for (int v = 0; v < Count; ++v) {
      const auto x = V::load(r + v * stride + j);
#pragma GCC unroll 3
      for (int i = 0; i < kTileRows; ++i) sums[i][v] = V::fma(g[i], x, sums[i][v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < Count; ++v)
#pragma GCC unroll 3
    for (int i = 0; i < kTileRows; ++i) {
      const double w = V::sum(sums[i][v]);
      squares[v] += w * w;
    }
}

template <class V>
int64_t padded(int64_t n) {
  return (n + V::kWidth - 1) / V::kWidth * V::kWidth;
}

// `Count` vectors times the rows [first, first + kTriangleRows) that stand in `rows`.
template <class V, int Count>
void multiply_rows(const float* rows, int64_t first, int64_t d, const float* r, int64_t stride, double* squares) {
  for (int64_t i = 0; i < kTriangleRows && first + i < d; i += kTileRows) {
    const int64_t last = first + i + kTileRows < d ? first + i + kTileRows : d;
    multiply_tile<V, Count>(rows + i * padded<V>(d), padded<V>(d), padded<V>(last), r, stride, squares);
  }
}

template <class V, class T>
void square_products(const T* triangle, int64_t d, const float* r, int64_t stride, int64_t count, float* rows,
                     double* squares) {
  for (int64_t v = 0; v < count; ++v) squares[v] = 0.0;
  for (int64_t first = 0; first < d; first += kTriangleRows) {
    const int64_t last = first + kTriangleRows < d ? first + kTriangleRows : d;
    for (int64_t i = first; i < first + kTriangleRows; ++i) {
      float* out = rows + (i - first) * padded<V>(d);
      const int64_t filled = i < d ? i + 1 : 0;
      for (int64_t j = 0; j < filled; ++j) out[j] = widen(triangle[j]);
      for (int64_t j = filled; j < padded<V>(last); ++j) out[j] = 0.0f;
      triangle += filled;
    }
    int64_t v = 0;
    for (; v + 4 <= count; v += 4) multiply_rows<V, 4>(rows, first, d, r + v * stride, stride, squares + v);
    for (; v < count; ++v) multiply_rows<V, 1>(rows, first, d, r + v * stride, stride, squares + v);
  }
}

template <class V>
constexpr MahalanobisKernels mahalanobis_kernels() {
  return {V::kWidth, &square_products<V, float>, &square_products<V, uint16_t>};
}

}  // namespace
}  // namespace planmill
