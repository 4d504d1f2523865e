// Mutual nearest neighbours: the pairs that may be the best of their row or column, and what is known of either side.
#pragma once

#include <limits>
#include <vector>

#include "neighbors/screening.h"

namespace planmill {

// The nearest and the second nearest of one row so far. Ties go to the lower index; NaN is no neighbour.
struct TwoNearest {
  float distance[2] = {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::infinity()};
  int32_t index = -1;
  void add(float d, int32_t i) {
    if (d < distance[0] || (d == distance[0] && (index < 0 || i < index))) {
      distance[1] = distance[0], distance[0] = d, index = i;
    } else if (d < distance[1]) {
      distance[1] = d;
    }
  }
  void join(const TwoNearest& other) {  // of other rows
    if (other.index < 0) return;
    add(other.distance[0], other.index);
    if (other.distance[1] < distance[1]) distance[1] = other.distance[1];
  }
};

// One map: what its rows found, and lower bounds of the best and the second best v of each (screen.h), one behind the
// other; `looked` are those that looks have given, of pairs that differ.
struct Known {
  std::vector<TwoNearest> nearest;
  std::vector<float> low, looked;

  explicit Known(int64_t rows = 0);
  int64_t count() const { return static_cast<int64_t>(nearest.size()); }
  float* bounds(int rank) { return low.data() + rank * count(); }
  // A lower bound of a pair of row i that no look has given before.
  void look(int64_t i, float bound);
  // The same rows, compared with others.
  void join(const Known& other);
};

// What the rows of a map are put together from: measured matrices, and the lengths that their rows are brought to.
struct Parts {
  const Rows* rows[2];
  double lengths[2];
};

// A pair that is still open, with the upper bound of its inner product.
struct OpenPair {
  int32_t left, right;
  float upper;
};

// Open pairs of some left rows and all right rows. A pair is screened, looked at where that pays
// (its product in float32 with the stored right row), and evaluated (by direct differences), which closes it.
class OpenPairs {
 public:
  // `ranks`: 2 where the second nearest are wanted too.
  OpenPairs(const Block& block, const Parts& right_parts, float scale, int ranks);

  // Lists what a block of products leaves open: left rows [row, row + rows) against right rows [column, column + columns).
  void screen(int64_t row, int64_t rows, int64_t column, int64_t columns, Workspace& w);
  // Drops the pairs that later bounds rule out.
  void prune();
  // Looks at (or evaluates) the pairs that seem best for each row and column: the others then face a bound of float32.
  void sharpen();
  // Closes all pairs.
  void settle();
  // Pairs of other left rows.
  void take(OpenPairs& other);
  int64_t size() const { return static_cast<int64_t>(screened_.size() + looked_.size()); }

  Known left, right;

 private:
  void close(const std::vector<OpenPair>& pairs);
  void look(std::vector<OpenPair>& pairs);
  void products(const std::vector<OpenPair>& pairs, int64_t begin, int64_t end, float* out, Workspace& w) const;
  float look_error() const;
  float bound(float distance, float half, float norm) const;
  void raise(Known& side, const StatsView& stats) const;

  const Block& block_;
  const Parts& parts_;
  float scale_, rounding_;
  int ranks_;
  bool looks_;  // whether a look says more than the screen
  std::vector<OpenPair> screened_, looked_;
};

}  // namespace planmill
