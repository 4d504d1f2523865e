// The kernels behind LoraMixtureKernels, written once over a vector type of common/vec.h.
#pragma once

#include "common/vec.h"
#include "routing/lora_mixture.h"

namespace planmill {
namespace {

constexpr int64_t kExpandColumns = 256;  // columns of `up` that stay in the first-level cache while all rows pass

// R rows, two vectors of columns: 2 R sums in registers.
template <class V, int R>
void expand_tile(float* y, int64_t ld, const float* bias, bool add, const float* p, const float* up, int64_t ranks) {
  typename V::F sum[R][2];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) {
      const float* from = add ? y + r * ld : bias;
      sum[r][v] = from == nullptr ? V::zero() : V::load(from + v * V::kWidth);
    }
  for (int64_t j = 0; j < ranks; ++j) {
    const auto u0 = V::load(up + j * ld), u1 = V::load(up + j * ld + V::kWidth);
    for (int r = 0; r < R; ++r) {
      const auto factor = V::set1(p[r * ranks + j]);
      sum[r][0] = V::fma(factor, u0, sum[r][0]);
      sum[r][1] = V::fma(factor, u1, sum[r][1]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) V::store(y + r * ld + v * V::kWidth, sum[r][v]);
}

inline void expand_number(float* y, int64_t ld, const float* bias, bool add, const float* p, const float* up, int64_t ranks) {
  float sum = add ? *y : bias == nullptr ? 0.0f : *bias;
  for (int64_t j = 0; j < ranks; ++j) sum += p[j] * up[j * ld];
  *y = sum;
}

template <class V>
void expand(float* y, int64_t rows, int64_t width, const float* bias, bool add, const float* p, const float* up,
            int64_t ranks) {
  constexpr int64_t kStep = 2 * V::kWidth;
  const int64_t even = width / kStep * kStep;
  const auto at = [&](int64_t c) { return bias == nullptr ? nullptr : bias + c; };
  for (int64_t begin = 0; begin < width; begin += kExpandColumns) {
    const int64_t end = begin + kExpandColumns < width ? begin + kExpandColumns : width;
    int64_t t = 0;
    for (; t + 4 <= rows; t += 4)
      for (int64_t c = begin; c < end && c < even; c += kStep)
        expand_tile<V, 4>(y + t * width + c, width, at(c), add, p + t * ranks, up + c, ranks);
    for (; t < rows; ++t)
      for (int64_t c = begin; c < end && c < even; c += kStep)
        expand_tile<V, 1>(y + t * width + c, width, at(c), add, p + t * ranks, up + c, ranks);
  }
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t c = even; c < width; ++c)
      expand_number(y + t * width + c, width, at(c), add, p + t * ranks, up + c, ranks);
}

template <class V>
constexpr LoraMixtureKernels lora_mixture_kernels() {
  return {&expand<V>};
}

}  // namespace
}  // namespace planmill
