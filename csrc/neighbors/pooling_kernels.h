// The kernels behind PoolingKernels, written once over a vector type of common/vec.h.
#pragma once

#include "common/vec.h"
#include "neighbors/pooling.h"

namespace planmill {
namespace {

constexpr int64_t kSumBlock = 4096;  // numbers summed in float32 before the sum goes on in double

template <class V>
double shifted_sum(const float* x, int64_t n, float shift) {
  double total = 0.0;
  const auto vshift = V::set1(shift);
  for (int64_t first = 0; first < n; first += kSumBlock) {
    const int64_t last = first + kSumBlock < n ? first + kSumBlock : n;
    auto a = V::zero(), b = V::zero();
    int64_t i = first;
    for (; i + 2 * V::kWidth <= last; i += 2 * V::kWidth) {
      a = V::add(a, V::sub(V::load(x + i), vshift));
      b = V::add(b, V::sub(V::load(x + i + V::kWidth), vshift));
    }
    total += V::sum(V::add(a, b));
    for (; i < last; ++i) total += x[i] - shift;
  }
  return total;
}

template <class V>
void sum_shifted(float* out, const float* const* rows, int64_t count, int64_t n, float high, float low) {
  const auto vhigh = V::set1(high), vlow = V::set1(low);
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) {
    auto sum = V::zero();
    for (int64_t r = 0; r < count; ++r) sum = V::add(sum, V::sub(V::sub(V::load(rows[r] + i), vhigh), vlow));
    V::store(out + i, sum);
  }
  for (; i < n; ++i) {
    float sum = 0.0f;
    for (int64_t r = 0; r < count; ++r) sum += rows[r][i] - high - low;
    out[i] = sum;
  }
}

template <class V>
float sum_rows(float* out, const float* const* rows, int64_t count, int64_t n) {
  auto squares = V::zero();
  float tail = 0.0f;
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) {
    auto sum = V::load(rows[0] + i);
    for (int64_t r = 1; r < count; ++r) sum = V::add(sum, V::load(rows[r] + i));
    V::store(out + i, sum);
    squares = V::fma(sum, sum, squares);
  }
  for (; i < n; ++i) {
    float sum = rows[0][i];
    for (int64_t r = 1; r < count; ++r) sum += rows[r][i];
    out[i] = sum;
    tail += sum * sum;
  }
  return V::sum(squares) + tail;
}

template <class V>
void scale_row(float* x, int64_t n, float factor) {
  const auto vfactor = V::set1(factor);
  int64_t i = 0;
  for (; i + V::kWidth <= n; i += V::kWidth) V::store(x + i, V::mul(V::load(x + i), vfactor));
  for (; i < n; ++i) x[i] *= factor;
}

template <class V>
constexpr PoolingKernels pooling_kernels() {
  return {&shifted_sum<V>, &sum_shifted<V>, &sum_rows<V>, &scale_row<V>};
}

}  // namespace
}  // namespace planmill
