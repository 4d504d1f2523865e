// Sums of rows of a matrix: token_merging, token_unmerging and hash_embedding.
#pragma once

#include <cstdint>

#include "common/element.h"

namespace planmill {

struct RowKernels {
  // out [n] = factor * (sum over k < count of weights[k] * rows[k]), rows and out of `type`; sums in float32, in the order
  // of the rows. `weights` null: all one.
  void (*sum)(Element type, const void* const* rows, const float* weights, int64_t count, int64_t n, float factor,
              void* out);
  // out [n] = residual + scale * row, float32 arithmetic, rounded once; `residual` null: zero, `scale` null: one.
  void (*add)(Element type, const void* residual, const float* scale, const void* row, int64_t n, void* out);
};

const RowKernels* rows_baseline();
const RowKernels* rows_avx2();
const RowKernels* rows_avx512();

}  // namespace planmill
