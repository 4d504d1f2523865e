// Products of small float32 matrices that lie in cache, written once over a vector type of common/vec.h: tiles of
// attention, chunks of a recurrence, blocks of a factorisation. Callers hold the blocks and pad the rows of b and c to
// whole vectors; there is no packing inside.
#pragma once

#include "common/vec.h"

namespace planmill {
namespace {

// A register tile of sums, Rows x Vectors: 6 x 2 and its operands fill the 16 registers of SSE2 and AVX2, 12 x 2 those
// of AVX-512.
template <class V>
constexpr int kProductRows = V::kWidth >= 16 ? 12 : 6;

// An operand that is read one number at a time: element (i, j) is data[i * row + j * column], so a transposed operand
// has row and column exchanged.
struct Strided {
  const float* data;
  int64_t row, column;
};

template <class V, int Rows, int Vectors>
inline void multiply_tile(Strided a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t k, bool add) {
  typename V::F sums[Rows][Vectors];
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) sums[i][j] = add ? V::load(c + i * ldc + j * V::kWidth) : V::zero();
  const float* left = a.data;
  for (int64_t p = 0; p < k; ++p, left += a.column, b += ldb) {
    typename V::F right[Vectors];
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) right[j] = V::load(b + j * V::kWidth);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      const auto x = V::set1(left[i * a.row]);
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) sums[i][j] = V::fma(x, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) V::store(c + i * ldc + j * V::kWidth, sums[i][j]);
}

template <class V, int Rows>
inline void multiply_rows(Strided a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t k, int64_t n, bool add) {
  int64_t j = 0;
  for (; j + 2 * V::kWidth <= n; j += 2 * V::kWidth) multiply_tile<V, Rows, 2>(a, b + j, ldb, c + j, ldc, k, add);
  if (j < n) multiply_tile<V, Rows, 1>(a, b + j, ldb, c + j, ldc, k, add);
}

// c [m, n] = a [m, k] b [k, n], or c += a b where `add`. n is a multiple of V::kWidth; rows of b and c lie ldb and ldc
// apart. Every element is summed in the order of k, whatever m and n are.
template <class V>
void multiply(Strided a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m, int64_t k, int64_t n, bool add) {
  constexpr int kRows = kProductRows<V>;
  int64_t i = 0;
  const auto next = [&](int64_t rows) {
    i += rows;
    a.data += rows * a.row;
    c += rows * ldc;
  };
  for (; i + kRows <= m; next(kRows)) multiply_rows<V, kRows>(a, b, ldb, c, ldc, k, n, add);
  if constexpr (kRows > 6)
    if (i + 6 <= m) multiply_rows<V, 6>(a, b, ldb, c, ldc, k, n, add), next(6);
  if (i + 3 <= m) multiply_rows<V, 3>(a, b, ldb, c, ldc, k, n, add), next(3);
  for (; i < m; next(1)) multiply_rows<V, 1>(a, b, ldb, c, ldc, k, n, add);
}

// y [columns, rows] = the transpose of x [rows, columns]; the rest of each row of y up to `padded` is zero.
inline void transpose(const float* x, int64_t ldx, int64_t rows, int64_t columns, float* y, int64_t ldy, int64_t padded) {
  constexpr int64_t kBlock = 16;
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t last = first + kBlock < columns ? first + kBlock : columns;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = first; c < last; ++c) y[c * ldy + r] = x[r * ldx + c];
    for (int64_t c = first; c < last; ++c)
      for (int64_t r = rows; r < padded; ++r) y[c * ldy + r] = 0.0f;
  }
}

}  // namespace
}  // namespace planmill
