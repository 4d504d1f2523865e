// The kernels behind LookupKernels, written once over a vector type of common/vec.h.
#pragma once

#include "common/products.h"
#include "neighbors/lookup.h"

namespace planmill {
namespace {

typedef double Double2 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));

// Doubles that fill a register of as many floats.
template <int Floats>
struct Doubles;
template <>
struct Doubles<4> {
  using D = Double2;
};
template <>
struct Doubles<8> {
  using D = Double4;
};
template <>
struct Doubles<16> {
  using D = Double8;
};

template <class V>
struct Wide {
  using D = typename Doubles<V::kWidth>::D;
  static constexpr int kLanes = V::kWidth / 2;

  static D load(const float* p) {
    D wide;
    for (int i = 0; i < kLanes; ++i) wide[i] = p[i];  // one instruction: vcvtps2pd
    return wide;
  }
  static D load(const double* p) {
    D wide;
    __builtin_memcpy(&wide, p, sizeof(wide));
    return wide;
  }
  static D load_some(const float* p, int64_t count) {
    D wide{};
    for (int64_t i = 0; i < count; ++i) wide[i] = p[i];
    return wide;
  }
  static double sum(D x) {
    double total = x[0];
    for (int i = 1; i < kLanes; ++i) total += x[i];
    return total;
  }
};

// A product of two floats is exact in double: it does not matter whether the compiler fuses it with the addition.
template <class V, int Rows>
inline void dots_of(const float* x, const float* const* y, int64_t d, double* out) {
  using W = Wide<V>;
  typename W::D sums[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) sums[r] = typename W::D{};
  int64_t i = 0;
  for (; i + W::kLanes <= d; i += W::kLanes) {
    const auto u = W::load(x + i);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) sums[r] += u * W::load(y[r] + i);
  }
  if (i < d) {
    const auto u = W::load_some(x + i, d - i);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) sums[r] += u * W::load_some(y[r] + i, d - i);
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) out[r] = W::sum(sums[r]);
}

template <class V>
void dots(const float* x, const float* const* rows, int64_t count, int64_t d, double* out) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) dots_of<V, 4>(x, rows + r, d, out + r);
  for (; r < count; ++r) dots_of<V, 1>(x, rows + r, d, out + r);
}

// Two queries at a time: eight sums hide the latency of the multiply-adds. The rows are widened here: the conversions run
// beside the multiply-adds, and rows of doubles would not stay in the first-level cache.
template <class V, int Queries>
inline void four_rows_of(const double* x, int64_t ldx, const float* const* rows, int64_t d, double* out) {
  using W = Wide<V>;
  typename W::D sums[Queries][4];
#pragma GCC unroll 2
  for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) sums[q][r] = typename W::D{};
  const auto add = [&](int64_t i, bool whole) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const typename W::D row = whole ? W::load(rows[r] + i) : W::load_some(rows[r] + i, d - i);
#pragma GCC unroll 2
      for (int q = 0; q < Queries; ++q) sums[q][r] += W::load(x + q * ldx + i) * row;
    }
  };
  int64_t i = 0;
  for (; i + W::kLanes <= d; i += W::kLanes) add(i, true);
  if (i < d) add(i, false);
#pragma GCC unroll 2
  for (int q = 0; q < Queries; ++q)
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) out[4 * q + r] = W::sum(sums[q][r]);
}

template <class V>
void four_rows(const double* x, int64_t ldx, int64_t queries, const float* const* rows, int64_t d, double* out) {
  int64_t q = 0;
  for (; q + 2 <= queries; q += 2) four_rows_of<V, 2>(x + q * ldx, ldx, rows, d, out + 4 * q);
  if (q < queries) four_rows_of<V, 1>(x + q * ldx, ldx, rows, d, out + 4 * q);
}

template <class V>
Above above(const double* y, int64_t n, double tau) {
  using W = Wide<V>;
  using D = typename W::D;
  D sum{}, squares{}, count{};
  const D level = D{} + tau;
  int64_t j = 0;
  for (; j + W::kLanes <= n; j += W::kLanes) {
    const D over = W::load(y + j) - level, kept = over > 0.0 ? over : D{};
    sum += kept;
    squares += kept * kept;
    count += over > 0.0 ? D{} + 1.0 : D{};
  }
  Above found{W::sum(sum), W::sum(squares), W::sum(count)};
  for (; j < n; ++j)
    if (const double over = y[j] - tau; over > 0.0) found.sum += over, found.squares += over * over, found.count += 1.0;
  return found;
}

template <class V, int Rows>
inline void add_some(float* out, const float* const* rows, const float* weights, int64_t n) {
  typename V::F w[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) w[r] = V::set1(weights[r]);
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) {
    auto sum = V::load(out + i);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) sum = V::fma(w[r], V::load(rows[r] + i), sum);
    V::store(out + i, sum);
  }
  for (; i < n; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) out[i] += weights[r] * rows[r][i];
}

template <class V>
void add_rows(float* out, const float* const* rows, const float* weights, int64_t count, int64_t n) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) add_some<V, 4>(out, rows + r, weights + r, n);
  for (; r < count; ++r) add_some<V, 1>(out, rows + r, weights + r, n);
}

template <class V>
void add_products(float* out, int64_t ldo, const float* rows, int64_t ldr, const float* weights, int64_t ldw, int64_t queries,
                  int64_t count, int64_t n) {
  const int64_t whole = n / V::kWidth * V::kWidth;
  multiply<V>({weights, ldw, 1}, rows, ldr, out, ldo, queries, count, whole, true);
  for (int64_t q = 0; q < queries; ++q)
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = whole; i < n; ++i) out[q * ldo + i] += weights[q * ldw + r] * rows[r * ldr + i];
}

template <class V>
constexpr LookupKernels lookup_kernels() {
  return {&dots<V>, &four_rows<V>, &above<V>, &add_rows<V>, &add_products<V>};
}

}  // namespace
}  // namespace planmill
