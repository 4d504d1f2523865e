// Row arithmetic of neighborhood_pooling.
#pragma once

#include <cstdint>

namespace planmill {

struct PoolingKernels {
  // Sum of x - shift over n numbers, and of nothing else: the mean of an image is found in two such passes.
  double (*shifted_sum)(const float* x, int64_t n, float shift);
  // out = sum over `count` rows of (row - high - low)
  void (*sum_shifted)(float* out, const float* const* rows, int64_t count, int64_t n, float high, float low);
  // out = sum over `count` rows; returns the squared length of out
  float (*sum_rows)(float* out, const float* const* rows, int64_t count, int64_t n);
  void (*scale)(float* x, int64_t n, float factor);
};

const PoolingKernels* pooling_baseline();
const PoolingKernels* pooling_avx2();
const PoolingKernels* pooling_avx512();

}  // namespace planmill
