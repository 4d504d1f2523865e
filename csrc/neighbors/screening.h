// What the neighbour ops share: rows brought near the origin, packed for a ScreenKernels, and screened block by block.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "neighbors/screen.h"

namespace planmill {

// The kernels of the instruction set in use (common/cpu_capability.h).
const ScreenKernels& screen_kernels();

// The same, or those of float32 where either side has so few rows that bringing the other into 16 bits is the work.
const ScreenKernels& screen_kernels(int64_t left_rows, int64_t right_rows);

// The 8-bit kernels of the instruction set in use; the same as screen_kernels() where it has none.
const ScreenKernels& coarse_kernels();

// The rows of a contiguous float32, bfloat16 or float16 matrix; or those of its rows that `chosen` [count] names.
class Rows {
 public:
  explicit Rows(const at::Tensor& contiguous, int64_t d);
  Rows(const at::Tensor& contiguous, int64_t d, const int32_t* chosen, int64_t count);
  // Rows of two measured matrices (the second may have width 0) side by side, each brought to a length; NaN in place of a
  // row without a direction: zero in one of them, or with NaN or infinity.
  Rows(const Rows* first, double first_length, const Rows* second, double second_length);
  int64_t count() const { return count_; }
  int64_t width() const { return d_; }
  // Row i as float32; `scratch` [d] is used where the matrix is not float32.
  const float* get(int64_t i, float* scratch) const;
  // Whether rows are float32 where they are, so that `get` needs no scratch.
  bool stored() const { return type_ == at::kFloat; }
  // Asks the caches for row i.
  void fetch(int64_t i) const;

  // Computes the Euclidean lengths of all rows, in double; `length` then looks them up.
  void measure();
  // The length of row i, which is x.
  double length(int64_t i, const float* x) const;

 private:
  const float* put_together(int64_t i, float* scratch) const;

  std::vector<double> lengths_;
  const void* data_ = nullptr;
  at::ScalarType type_ = at::kDouble;  // of rows put together: none of the three
  int64_t count_, d_;
  const int32_t* chosen_ = nullptr;
  const Rows* parts_[2] = {};
  double part_lengths_[2] = {};
};

enum class Metric { kL2, kDot, kCosine };

// Shift and scale that bring rows near the origin and to lengths near one. Distances do not change under the shift, and
// the order of inner products with one query does not either, so it costs nothing and makes the error bounds tight.
struct Frame {
  std::vector<float> centre;  // scaled
  float scale = 1.0f;         // a power of two, so that scaling is exact
  // Inner products and cosines are evaluated where the rows are, and rounded there: by at most this, for a query of length
  // one, beyond what the screen's coordinates would have them rounded. Their bounds are widened by it, so that of products
  // that float32 rounds alike none is lost, whatever the centre.
  float rounding = 0.0f;
};

// The centre is the mean of up to 256 rows of `rows`. The scale comes from the same sample, or from all rows of `rows` and
// of `others` where the sample turned out not to be typical (`whole`).
Frame frame_of(const Rows& rows, Metric metric, const Rows* others, bool whole);

// The same without a centre: for inner products with an offset per row, whose order a shift would change.
Frame frame_at_origin(const Rows& rows, bool whole);

// The power of two by which `pack` scales a row of queries whose inner products are wanted (kDot, not shifted).
float scale_of_row(const float* x, int64_t d);

constexpr float kLongest = 1.0e16f;  // a longer row, in a frame, would overflow the squares of the bounds

// `rows` rounded up to whole panels.
inline int64_t round_up(int64_t rows, int64_t panel) { return (rows + panel - 1) / panel * panel; }

// Left rows per block: at most `most`, in whole panels, so that the blocks of `rows` are equally long, and as many as a
// multiple of `threads` where one thread alone would have several.
int64_t even_block(int64_t rows, int64_t most, int64_t panel, int64_t threads);

// Rows packed as the left or the right operand of ScreenKernels::multiply.
class Packed {
 public:
  enum class Side { kLeft, kRight };
  Packed(const ScreenKernels& kernels, Side side, int64_t capacity, int64_t d);

  // Packs rows [begin, begin + count) at panel-aligned row `at`, and pads up to the next panel. `rounded`: see RowStats.
  // Returns false if a row is too long for the frame; the frame must then be made from all rows.
  bool pack(const Rows& rows, int64_t begin, int64_t count, const Frame& frame, Metric metric, bool shifted, bool rounded,
            int64_t at);

  // Row `row` as it is before it is rounded, in `out` [d]; false if it holds NaN or infinity.
  bool prepare(const Rows& rows, int64_t row, const Frame& frame, Metric metric, bool shifted, float* out) const;

  int64_t padded(int64_t rows) const { return round_up(rows, panel_); }
  int64_t panels(int64_t rows) const { return padded(rows) / panel_; }
  const uint32_t* at(int64_t row) const { return packed_ != nullptr ? packed_ + row * pairs_ : nullptr; }
  StatsView stats(int64_t row) const {
    float* base = stats_ + row;
    return {base, base + capacity_, base + 2 * capacity_, base + 3 * capacity_};
  }
  bool valid(int64_t row) const;
  int64_t pairs() const { return pairs_; }

 private:
  void pack_row(const Rows& rows, int64_t row, const Frame& frame, Metric metric, bool shifted, bool rounded,
                int64_t slot, float* scratch, uint32_t* packed) const;
  void pad_row(int64_t slot, uint32_t* packed) const;

  const ScreenKernels& kernels_;
  Side side_;
  int64_t panel_, pairs_, capacity_;
  at::Tensor words_, numbers_;
  uint32_t* packed_;  // the data of words_
  float* stats_;      // and of numbers_: [4][capacity_]
};

// Whether no entry is NaN or infinity.
bool finite_row(const float* x, int64_t d);
// Euclidean length, in double.
double length_of_row(const float* x, int64_t d);

// float32 distance from a float32 squared one, computed again in double where the square left float32's range.
float distance_from_square(float square, const float* x, const float* y, int64_t d);

// The same for an inner product; in double, since a quotient of it may be in range again.
double product_in_range(float product, const float* x, const float* y, int64_t d);

// A pair of rows of one block that may be the best of its right row.
struct Pending {
  int32_t left, right;  // rows of the operands
  float bound;          // the most that v can be
};

// Buffers of one thread.
struct Workspace {
  std::vector<float> products, low_left, low_right, values, scratch, scratch_rows, bounds;
  std::vector<int32_t> found, others;
  std::vector<uint32_t> left;
  std::vector<const float*> rows;
  std::vector<Pending> pending;
};

// Left rows against right rows, exactly.
struct Block {
  const ScreenKernels& kernels;
  const Packed& left;
  const Packed& right;
  const Rows& left_rows;
  const Rows& right_rows;
  Metric metric;
  // kCosine: one over the lengths of all rows of the operands, 0 for a zero row.
  const double* left_inverse = nullptr;
  const double* right_inverse = nullptr;

  // float32 distances (kL2), inner products (kDot) or cosines of left row `row` with `count` right rows `first + index[k]`.
  void evaluate(int64_t row, int64_t first, const int32_t* index, int64_t count, Workspace& w, float* values) const;
};

// One block of left rows (panel row `left_slot`, row `left_row` of the matrix) against one block of right rows: multiplies,
// bounds, and calls `visit(left row of the block, right rows of the block, values, count)` with every pair that may be the
// best of its left row. Pairs that may be the best of their right row are left in `w.pending` where `low_right` is given:
// later blocks rule most of them out. Bounds in `low_left` and `low_right` (null to leave out) run on from block to block.
template <class Visit>
void visit_candidates(const Block& b, int64_t left_slot, int64_t left_row, int64_t rows, int64_t right_slot,
                      int64_t right_row, int64_t columns, float* low_left, float* low_right, Workspace& w, Visit visit) {
  const int64_t ld = b.right.padded(columns);
  w.products.resize(static_cast<size_t>(b.left.padded(rows) * ld));
  w.found.resize(static_cast<size_t>(ld));
  w.others.resize(static_cast<size_t>(ld));
  w.bounds.resize(static_cast<size_t>(ld));
  w.values.resize(static_cast<size_t>(ld));
  b.kernels.multiply(b.left.at(left_slot), b.right.at(right_slot), b.left.panels(rows), b.right.panels(columns),
                     b.left.pairs(), w.products.data(), ld);
  const StatsView left = b.left.stats(left_slot), right = b.right.stats(right_slot);
  if (low_right != nullptr) b.kernels.lower_bounds(w.products.data(), rows, ld, ld, left, right, low_left, low_right);
  for (int64_t r = 0; r < rows; ++r) {
    if (!b.left.valid(left_slot + r)) continue;
    const RowStats own{left.inv[r], left.half[r], left.norm[r], left.res[r]};
    float* products = w.products.data() + r * ld;
    Counts counts{0, 0};
    if (low_right == nullptr)
      counts.found = b.kernels.list_nearest(products, ld, own, right, low_left + r, w.found.data(), nullptr);
    else
      counts = b.kernels.candidates(products, ld, own, right, low_left[r], low_right, w.found.data(), w.others.data(),
                                    w.bounds.data());
    for (int64_t k = 0; k < counts.others; ++k)
      w.pending.push_back({static_cast<int32_t>(left_row + r), static_cast<int32_t>(right_row + w.others[k]), w.bounds[k]});
    b.evaluate(left_row + r, right_row, w.found.data(), counts.found, w, w.values.data());
    visit(r, w.found.data(), w.values.data(), counts.found);
  }
}

}  // namespace planmill
