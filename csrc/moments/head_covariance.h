// What head_covariance does to the tokens of one head and to the product of two: torch-free, one variant per instruction set.
#pragma once

#include <cstdint>

namespace planmill {

// Rows of a head lie `stride` numbers apart, those of a product of two heads `padded`, d in whole vectors; padding is zero.
struct HeadCovarianceKernels {
  int64_t vector;

  // out[n] = x[n * step], [count, d], each row with its mean and deviation taken out, times weight, plus bias; as it is
  // where weight is null.
  void (*normalise)(const float* x, int64_t step, int64_t count, int64_t d, const float* weight, const float* bias,
                    float eps, float* out, int64_t stride);

  // sums[c] = the sum over rows of row[c] - origin[c]; `subtract` leaves the differences in the rows.
  void (*sum)(float* rows, int64_t count, int64_t stride, int64_t padded, const float* origin, bool subtract, float* sums);

  // c [rows, padded] = or += a^T b, the columns of a from `first` to `first + rows`; rows is at most kProductChunk.
  void (*multiply)(const float* a, const float* b, int64_t count, int64_t stride, int64_t first, int64_t rows,
                   int64_t padded, float* c, bool add);

  // c = factor * c + left_mean right_offset^T + left_offset right_rest^T, and the squares of its columns' lengths.
  void (*finish)(float* c, int64_t d, int64_t padded, float factor, const float* left_mean, const float* left_offset,
                 const float* right_offset, const float* right_rest, float* squares);

  // out [d, d] = c, column by column times scale.
  void (*store)(const float* c, int64_t d, int64_t padded, const float* scale, float* out);
};

constexpr int64_t kProductChunk = 48;

const HeadCovarianceKernels* head_covariance_baseline();
const HeadCovarianceKernels* head_covariance_avx2();
const HeadCovarianceKernels* head_covariance_avx512();

}  // namespace planmill
