// The kernels behind RowKernels, written once over a vector type of common/vec.h.
#pragma once

#include "common/element_rows.h"
#include "common/vec.h"
#include "routing/rows.h"

namespace planmill {
namespace {

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
