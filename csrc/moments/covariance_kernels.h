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

// Columns [0, whole) of `Rows` rows, whole a multiple of the vectors' width, into their panels, while the next rows are
// fetched. square[r] = |z|^2 of row r.
template <class V, int Rows>
void centre_rows(const float* x, const float* const* pivots, int64_t d, int64_t whole, float* packed, float* square) {
  constexpr int64_t kPanel = Tile<V>::kPanel, kStride = kCovarianceRows * kPanel + kPanelPad;
  typename V::F squares[Rows];
  for (int r = 0; r < Rows; ++r) squares[r] = V::zero();
  for (int64_t first = 0; first < whole; first += kPanel, packed += kStride) {
    const int64_t last = first + kPanel < whole ? first + kPanel : whole;
    for (int64_t c = first; c < last; c += V::kWidth) {
      for (int q = 0; q < Rows * V::kWidth; q += 16) __builtin_prefetch(x + Rows * (d + c) + q);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const auto z = V::sub(V::load(x + r * d + c), V::load(pivots[r] + c));
        V::store(packed + r * kPanel + c - first, z);
        squares[r] = V::fma(z, z, squares[r]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) square[r] = V::sum(squares[r]);
}

// Four rows at a time, so that the sums are read and written once for four of them; `Rows` is 4, or 1 for the rest.
template <class V, int Rows>
void pack_rows(const float* x, const float* const* pivots, int64_t d, float* packed, float* sums) {
  constexpr int64_t kPanel = Tile<V>::kPanel, kStride = kCovarianceRows * kPanel + kPanelPad;
  const int64_t padded = (d + kPanel - 1) / kPanel * kPanel, whole = d / V::kWidth * V::kWidth;
  float square[Rows];
  centre_rows<V, Rows>(x, pivots, d, whole, packed, square);
  for (int64_t c = whole; c < padded; ++c)
    for (int r = 0; r < Rows; ++r) {
      const float z = c < d ? x[r * d + c] - pivots[r][c] : 0.0f;
      packed[c / kPanel * kStride + r * kPanel + c % kPanel] = z;
      square[r] += z * z;
    }
  if (sums == nullptr) return;
  for (int r = 0; r < Rows; ++r) sums[2 * padded] += square[r] * square[r];
  for (int64_t first = 0; first < padded; first += kPanel, packed += kStride)
    for (int64_t c = 0; c < kPanel; c += V::kWidth) {
      float* linear = sums + first + c;
      auto sum = V::load(linear), third = V::load(linear + padded);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const auto z = V::load(packed + r * kPanel + c);
        sum = V::add(sum, z);
        third = V::fma(V::set1(square[r]), z, third);
      }
      V::store(linear, sum);
      V::store(linear + padded, third);
    }
}

template <class V>
void pack_centred(const float* x, const float* const* pivots, int64_t rows, int64_t d, float* packed, float* sums) {
  constexpr int64_t kPanel = Tile<V>::kPanel;
  const int64_t padded = (d + kPanel - 1) / kPanel * kPanel;
  for (int64_t i = 0; sums != nullptr && i <= 2 * padded; ++i) sums[i] = 0.0f;
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) pack_rows<V, 4>(x + r * d, pivots + r, d, packed + r * kPanel, sums);
  for (; r < rows; ++r) pack_rows<V, 1>(x + r * d, pivots + r, d, packed + r * kPanel, sums);
}

// Rows x Vectors sums: c += sum over rows of a[row, 0 .. Rows) * b[row, 0 .. Vectors * width).
template <class V, int Rows, int Vectors>
void multiply_tile(const float* a, const float* b, int64_t rows, float* c) {
  constexpr int64_t kPanel = Tile<V>::kPanel;
  typename V::F sums[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < Vectors; ++j) sums[i][j] = V::zero();
  for (int64_t r = 0; r < rows; ++r, a += kPanel, b += kPanel) {
    typename V::F columns[Vectors];
#pragma GCC unroll 3
    for (int j = 0; j < Vectors; ++j) columns[j] = V::load(b + j * V::kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const auto value = V::set1(a[i]);
#pragma GCC unroll 3
      for (int j = 0; j < Vectors; ++j) sums[i][j] = V::fma(value, columns[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < Vectors; ++j) {
      float* target = c + i * kPanel + j * V::kWidth;
      V::store(target, V::add(V::load(target), sums[i][j]));
    }
}

// Vectors of columns that hold nothing but padding are left out, and of a panel with itself those below the diagonal.
template <class V>
void multiply_panels(const float* a, const float* b, int64_t rows, int64_t columns, float* c) {
  using T = Tile<V>;
  const int64_t vectors = (columns + V::kWidth - 1) / V::kWidth;
  for (int64_t first = 0; first < T::kPanel; first += T::kRows) {
    const int64_t begin = a == b ? first / V::kWidth : 0;
    const float *left = a + first, *right = b + begin * V::kWidth;
    float* out = c + first * T::kPanel + begin * V::kWidth;
    if (vectors - begin == 3) {
      multiply_tile<V, T::kRows, 3>(left, right, rows, out);
    } else if (vectors - begin == 2) {
      multiply_tile<V, T::kRows, 2>(left, right, rows, out);
    } else if (vectors - begin == 1 && T::kPanel % (2 * T::kRows) == 0) {
      multiply_tile<V, 2 * T::kRows, 1>(left, right, rows, out);  // fewer sums would wait for themselves
      first += T::kRows;
    } else if (vectors - begin == 1) {
      multiply_tile<V, T::kRows, 1>(left, right, rows, out);
    }
  }
}

template <class V>
void accumulate_row(const float* row, const float* pivot, const float* next, int64_t d, float* sums) {
  int64_t c = 0;
  for (; c + V::kWidth <= d; c += V::kWidth) {
    __builtin_prefetch(next + c);
    V::store(sums + c, V::add(V::load(sums + c), V::sub(V::load(row + c), V::load(pivot + c))));
  }
  for (; c < d; ++c) sums[c] += row[c] - pivot[c];
}

template <class V>
constexpr CovarianceKernels covariance_kernels() {
  return {Tile<V>::kPanel, &pack_centred<V>, &multiply_panels<V>, &accumulate_row<V>};
}

}  // namespace
}  // namespace planmill
