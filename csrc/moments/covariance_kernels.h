// The kernels behind CovarianceKernels, written once over a vector type of common/vec.h.
#pragma once

#include "common/vec.h"
#include "moments/covariance.h"

namespace planmill {
namespace {

// Register tile: kRows x 3 vectors of sums. 4 x 3 and the operands fill the 16 registers of SSE2 and AVX2, 8 x 3 the 32
// of AVX-512; both operands come from one packed copy, since 3 vectors are a multiple of kRows columns.
template <class V>
struct Tile {
  static constexpr int kVectors = 3;
  static constexpr int kRows = V::kWidth >= 16 ? 8 : 4;
  static constexpr int64_t kPanel = kVectors * V::kWidth;
};

// row = x - pivot, zeros beyond d; returns its squared length.
template <class V>
float centre_row(const float* x, int64_t d, int64_t padded, const float* pivot, float* row) {
  auto squares = V::zero();
  int64_t c = 0;
  for (; c + V::kWidth <= d; c += V::kWidth) {
    const auto z = V::sub(V::load(x + c), V::load(pivot + c));
    V::store(row + c, z);
    squares = V::fma(z, z, squares);
  }
  float tail = 0.0f;
  for (; c < d; ++c) {
    row[c] = x[c] - pivot[c];
    tail += row[c] * row[c];
  }
  for (; c < padded; ++c) row[c] = 0.0f;
  return V::sum(squares) + tail;
}

// Four rows at a time, so that the sums are read and written once for four of them; `Rows` is 4, or 1 for the rest.
template <class V, int Rows>
void pack_rows(const float* x, const float* const* pivots, int64_t d, float* packed, float* sums) {
  constexpr int64_t kPanel = Tile<V>::kPanel, kStride = kCovarianceRows * kPanel + kPanelPad;
  const int64_t padded = (d + kPanel - 1) / kPanel * kPanel;
  float* rows = sums + 2 * padded + 1;
  typename V::F square[Rows];
  for (int r = 0; r < Rows; ++r) {
    const float a = centre_row<V>(x + r * d, d, padded, pivots[r], rows + r * padded);
    square[r] = V::set1(a);
    sums[2 * padded] += a * a;
  }
  for (int64_t first = 0; first < padded; first += kPanel, packed += kStride)
    for (int64_t c = 0; c < kPanel; c += V::kWidth) {
      float* linear = sums + first + c;
      auto sum = V::load(linear), third = V::load(linear + padded);
      for (int r = 0; r < Rows; ++r) {
        const auto z = V::load(rows + r * padded + first + c);
        V::store(packed + r * kPanel + c, z);
        sum = V::add(sum, z);
        third = V::fma(square[r], z, third);
      }
      V::store(linear, sum);
      V::store(linear + padded, third);
    }
}

template <class V>
void pack_centred(const float* x, const float* const* pivots, int64_t rows, int64_t d, float* packed, float* sums) {
  constexpr int64_t kPanel = Tile<V>::kPanel;
  const int64_t padded = (d + kPanel - 1) / kPanel * kPanel;
  for (int64_t i = 0; i <= 2 * padded; ++i) sums[i] = 0.0f;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) pack_rows<V, 4>(x + r * d, pivots + r, d, packed + r * kPanel, sums);
  for (; r < rows; ++r) pack_rows<V, 1>(x + r * d, pivots + r, d, packed + r * kPanel, sums);
}

template <class V>
void multiply_panels(const float* a, const float* b, int64_t rows, float* c) {
  using T = Tile<V>;
  for (int64_t first = 0; first < T::kPanel; first += T::kRows) {
    typename V::F sums[T::kRows][T::kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < T::kRows; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < T::kVectors; ++j) sums[i][j] = V::zero();
    const float* left = a + first;
    const float* right = b;
    for (int64_t r = 0; r < rows; ++r, left += T::kPanel, right += T::kPanel) {
      typename V::F columns[T::kVectors];
#pragma GCC unroll 3
      for (int j = 0; j < T::kVectors; ++j) columns[j] = V::load(right + j * V::kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < T::kRows; ++i) {
        const auto value = V::set1(left[i]);
#pragma GCC unroll 3
        for (int j = 0; j < T::kVectors; ++j) sums[i][j] = V::fma(value, columns[j], sums[i][j]);
      }
    }
    float* out = c + first * T::kPanel;
#pragma GCC unroll 8
    for (int i = 0; i < T::kRows; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < T::kVectors; ++j) {
        float* target = out + i * T::kPanel + j * V::kWidth;
        V::store(target, V::add(V::load(target), sums[i][j]));
      }
  }
}

template <class V>
constexpr CovarianceKernels covariance_kernels() {
  return {Tile<V>::kPanel, &pack_centred<V>, &multiply_panels<V>};
}

}  // namespace
}  // namespace planmill
