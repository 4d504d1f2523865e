// The best row of each segment of a database for every query: what bank_score, segmented_max,
// segmented_min and token_matching share.
#pragma once

#include <vector>

#include "neighbors/screening.h"

namespace planmill {

// What a query found in a segment so far.
struct Best {
  float value;    // distance (smaller is better), inner product or cosine (larger is better)
  int32_t index;  // row of the database
};

// Queries against segments of a database. `best` [n, S] starts out as "nothing found" and is updated in place.
struct Search {
  const ScreenKernels& kernels;
  Metric metric;
  bool exact;
  const Rows& queries;
  const Rows& database;
  const std::vector<int64_t>& offsets;
  Best* best;
  // kCosine: one over the length of each query and each row of the database, 0 for a zero row. A zero query, which is
  // equally near to everything, finds nothing.
  const double* query_inverse = nullptr;
  const double* database_inverse = nullptr;

  void run();

 private:
  int64_t segments() const { return static_cast<int64_t>(offsets.size()) - 1; }
  bool better(float a, float b) const { return metric == Metric::kL2 ? a < b : a > b; }
  bool attempt(const Frame& frame);
  bool meet(const Packed& right, const std::vector<int64_t>& slots, int64_t first, int64_t last, const Frame& frame) const;
  bool pack_queries(Packed& left, int64_t first, int64_t count, const Frame& frame) const;
  bool pack_segments(Packed& right, int64_t first, int64_t last, const Frame& frame, std::vector<int64_t>& slots) const;
  void task(const Block& block, int64_t left_slot, int64_t query, int64_t count, int64_t segment, int64_t right_slot,
            float scale, Workspace& w) const;
};

}  // namespace planmill
