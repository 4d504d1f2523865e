// Screening into shortlists: what knn, matching_pursuit, dictionary_lookup and constrained_search share.
#pragma once

#include "neighbors/screening.h"
#include "neighbors/candidates.h"

namespace planmill {

constexpr int64_t kListedColumns = 1024;  // right rows of a block of products

// Left and right rows, packed by `kernels` within `frame`.
struct Screening {
  const ScreenKernels& kernels;
  const Frame& frame;
  Metric metric;
  const Packed& left;
  const Packed& right;
  const Rows& left_rows;
  const Rows& right_rows;

  // Looks at the best rows of the list of left row `row` in float32, in the coordinates of the screen.
  void sharpen(int64_t row, Candidates& list, Workspace& w) const;
  // A lower bound, good to float32, of what the screen bounds for left row `row` and the best of some right rows.
  float lower_bound(int64_t row, const int32_t* right, int64_t count, Workspace& w) const;
};

// Left rows [slot, slot + count) against at most kListedColumns right rows from `right_slot` on, into `lists`, as rows
// `first_row` + slot. `keep(r, row)` says whether a pair counts at all; of a left row, at most `strangers` do not. A list is
// a Candidates or has its interface.
template <class List, class Keep>
void list_candidates(const Screening& s, int64_t slot, int64_t count, int64_t right_slot, int64_t columns,
                     int64_t first_row, bool bounded, int64_t strangers, List* lists, Workspace& w, Keep keep) {
  const StatsView own = s.left.stats(slot), others = s.right.stats(right_slot);
  const int64_t ld = s.right.padded(columns);
  w.products.resize(static_cast<size_t>(s.left.padded(count) * ld));
  w.found.resize(static_cast<size_t>(ld));
  w.low_left.resize(static_cast<size_t>(ld));
  w.low_right.resize(static_cast<size_t>(ld));
  s.kernels.multiply(s.left.at(slot), s.right.at(right_slot), s.left.panels(count), s.right.panels(ld), s.left.pairs(),
                     w.products.data(), ld);
  for (int64_t r = 0; r < count; ++r) {
    if (!s.left.valid(slot + r) || lists[r].abandoned()) continue;
    const RowStats stats{own.inv[r], own.half[r], own.norm[r], own.res[r]};
    float* products = w.products.data() + r * ld;
    if (!lists[r].started() && strangers < columns)
      lists[r].start(w.low_left.data(), s.kernels.group_bounds(products, ld, stats, others, bounded, w.low_left.data()),
                     strangers);
    const int64_t listed = s.kernels.list_above(products, ld, stats, others, bounded, lists[r].threshold(), w.found.data(),
                                                w.low_left.data(), w.low_right.data());
    for (int64_t j = 0; j < listed; ++j) {
      const int64_t row = first_row + right_slot + w.found[j];
      if (keep(r, row)) lists[r].add(w.low_left[j], w.low_right[j], static_cast<int32_t>(row));
    }
  }
}

}  // namespace planmill
