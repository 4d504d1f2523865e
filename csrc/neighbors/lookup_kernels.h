// The kernels behind LookupKernels, written once over a vector type of common/vec.h.
#pragma once

#include "common/vec.h"
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
};

// Two sums a row, each as wide as a register: eight chains hide the latency of the additions. A product of two floats is
// exact in double, so that it does not matter whether the compiler fuses it with the addition.
template <class V, int Rows>
inline void dots_of(const float* x, const float* const* y, int64_t d, double* out) {
  using W = Wide<V>;
  typename W::D even[Rows], odd[Rows];
  double tail[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) even[r] = odd[r] = typename W::D{}, tail[r] = 0.0;
  int64_t i = 0;
  for (; i + V::kWidth <= d; i += V::kWidth) {
    const auto first = W::load(x + i), second = W::load(x + i + W::kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      even[r] += first * W::load(y[r] + i);
      odd[r] += second * W::load(y[r] + i + W::kLanes);
    }
  }
  for (; i < d; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) tail[r] += static_cast<double>(x[i]) * y[r][i];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    const typename W::D sum = even[r] + odd[r];
    for (int lane = 0; lane < W::kLanes; ++lane) tail[r] += sum[lane];
    out[r] = tail[r];
  }
}

template <class V>
void dots(const float* x, const float* const* rows, int64_t count, int64_t d, double* out) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) dots_of<V, 4>(x, rows + r, d, out + r);
  for (; r < count; ++r) dots_of<V, 1>(x, rows + r, d, out + r);
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
constexpr LookupKernels lookup_kernels() {
  return {&dots<V>, &add_rows<V>};
}

}  // namespace
}  // namespace planmill
