// A neighbour and its distance as the caller wants it: what knn and constrained_search share.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "neighbors/screening.h"
#include "neighbors/shortlist.h"

namespace planmill {

struct Neighbor {
  float distance;  // smaller is nearer: minus the inner product for kDot
  int32_t index;
  bool operator<(const Neighbor& other) const {
    return distance < other.distance || (distance == other.distance && index < other.index);
  }
};

using Nearest = Best<Neighbor>;

// From what ScreenKernels::squared_distances or ::dots gave for rows x and y [d] to the distance; `lengths`: the product of
// the rows' Euclidean lengths, for kCosine. What left float32's range is computed again in double.
inline float distance_of(Metric metric, bool squared, float value, const float* x, const float* y, int64_t d, double lengths) {
  if (metric == Metric::kL2) {
    if (!squared) return distance_from_square(value, x, y, d);
    if (value > 1.0e-30f && value < 1.0e37f) return value;
    const double distance = distance_from_square(value, x, y, d);
    return static_cast<float>(distance * distance);
  }
  const double product = product_in_range(value, x, y, d);
  if (metric == Metric::kDot) return -static_cast<float>(product);
  return static_cast<float>(1.0 - (lengths == 0.0 ? 0.0 : product / lengths));
}

inline void write_row(const std::vector<Neighbor>& sorted, int64_t k, Metric metric, float* values, int32_t* indices) {
  for (int64_t j = 0; j < k; ++j) {
    const bool found = j < static_cast<int64_t>(sorted.size());
    const float distance = found ? sorted[j].distance : std::numeric_limits<float>::infinity();
    values[j] = metric == Metric::kDot ? -distance : distance;
    indices[j] = found ? sorted[j].index : -1;
  }
}

}  // namespace planmill
