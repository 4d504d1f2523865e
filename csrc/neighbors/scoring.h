// From tables of patch-to-image distances to scores, and the plain path for small or local problems.
#pragma once

#include <ATen/core/Tensor.h>

#include "neighbors/screening.h"

namespace planmill {

// Entries [begin, end) of `count` sorted distances that are averaged: see `interval` in mutual_score/reference.py.
struct Interval {
  int64_t begin, end;
};
Interval interval_of(double low, double high, int64_t count);

// table [N, P, M] of distances -> scores [N, P]: the mean of the interval of each sorted row. Of `skip_self` tables, column
// i of image i is left out.
at::Tensor interval_means(const at::Tensor& table, double low, double high, bool skip_self);

// Distances of every patch of image `i` of `images` to its nearest patch in image `j` of `others`, by plain float32 work on
// the patches within `radius` (all if negative): out[p * stride], for p in [0, P).
void plain_distances(const ScreenKernels& kernels, const Rows& images, int64_t i, int64_t patches, const Rows& others,
                     int64_t j, int64_t other_patches, double radius, int64_t width, float* out, int64_t stride,
                     Workspace& w);

// Below this many multiply-adds packing costs more than it saves.
constexpr double kPlainWork = 1 << 18;

}  // namespace planmill
