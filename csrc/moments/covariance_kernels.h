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

template <class V>
void pack_row(const float* x, int64_t d, const float* pivot, float* packed, float* sums, float* row) {
  constexpr int64_t kPanel = Tile<V>::kPanel;
  const int64_t padded = (d + kPanel - 1) / kPanel * kPanel;
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
  const float square = V::sum(squares) + tail;
  const auto vsquare = V::set1(square);
  for (int64_t p = 0; p < padded; p += V::kWidth) {
    const auto z = V::load(row + p);
    V::store(packed + p / kPanel * (kCovarianceRows * kPanel) + p % kPanel, z);
    V::store(sums + p, V::add(V::load(sums + p), z));
    V::store(sums + padded + p, V::fma(vsquare, z, V::load(sums + padded + p)));
  }
  sums[2 * padded] += square * square;
}

template <class V>
void pack_centred(const float* x, int64_t rows, int64_t d, const float* pivot, float* packed, float* sums) {
  constexpr int64_t kPanel = Tile<V>::kPanel;
  const int64_t padded = (d + kPanel - 1) / kPanel * kPanel;
  for (int64_t i = 0; i <= 2 * padded; ++i) sums[i] = 0.0f;
  float* row = sums + 2 * padded + 1;  // the caller leaves room for one padded row
  for (int64_t r = 0; r < rows; ++r) pack_row<V>(x + r * d, d, pivot, packed + r * kPanel, sums, row);
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
