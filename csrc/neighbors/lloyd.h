// Lloyd's iteration over rows that are packed once, with most of the assignment left out.
//
// A row knows an upper bound of its distance to its own centre and a lower bound of that to every other centre. Both go
// along with the centres (triangle inequality), and as long as they stay apart, by more than float32 distances are rounded,
// no other centre can be the nearest (Hamerly, "Making k-means even faster", SDM 2010). Rows whose bounds meet go through
// the screen again, against the centres that moved where the bounds still rule out the others, else against all; what may
// be nearest is evaluated. Labels are those of evaluating every pair, bit for bit.
//
// A cluster whose members changed is summed again from its first row to its last, in double: no sum drifts, and none
// depends on threads.
#pragma once

#include <vector>

#include "neighbors/screening.h"

namespace planmill {

class Lloyd {
 public:
  // Float32 rows; `centers` [clusters, d], contiguous, are moved in place.
  Lloyd(const Rows& rows, at::Tensor& centers);
  // Rounds of assignment and update until nothing changes, or the squared distance that the centres moved is at most
  // `least`; then a last assignment. Returns the number of rounds.
  int64_t run(int64_t iterations, double least, bool relocating);

  const std::vector<int32_t>& labels() const { return labels_; }
  const std::vector<float>& distances() const { return distances_; }

 private:
  // Of a row: its distance is that to its centre where it was, or where it is; then, whether the row is open.
  enum class State : char { kStale, kFresh, kOpenToMoved, kOpen };

  // The 16-bit numbers of each row, not yet in panels; false if a row or a centre does not fit the frame.
  bool pack(const Frame& frame);
  bool assign();
  void pack_moved();
  void find_open(int64_t begin, int64_t end);
  // Rows `open` against all centres, or those that moved.
  void settle_all(const std::vector<int32_t>& open, bool moved);
  void settle(const int32_t* open, int64_t count, bool moved, Workspace& w);
  void choose(int64_t row, float* products, bool moved, Workspace& w);
  double lower_bound(const RowStats& own, float rest) const;
  void sum_members();
  void relocate();
  double move_centers();
  void measure();

  bool apart(double upper, double lower) const { return upper * (1.0 + slack_) + 1.0e-37 < lower * (1.0 - slack_); }
  const float* row(int64_t i) const { return rows_.get(i, nullptr); }
  float distance(int64_t i, int64_t cluster) const;

  const Rows& rows_;
  const at::Tensor centers_tensor_;
  const Rows center_rows_;
  float* centers_;
  const int64_t n_, d_, clusters_;
  const ScreenKernels& kernels_;
  const double slack_;  // a float32 distance is within this share of the true one
  Frame frame_;
  Packed packed_centers_, packed_moved_;
  std::vector<int32_t> moved_;   // the centres that moved last
  at::Tensor words_;             // [n, words of a row]
  std::vector<RowStats> stats_;  // of each row
  std::vector<int32_t> labels_;
  std::vector<float> distances_;
  std::vector<State> states_;
  std::vector<double> upper_, lower_;
  std::vector<double> drifts_;  // how far each centre moved last
  int64_t farthest_ = -1;       // the centre that moved most
  double far_ = 0.0, next_far_ = 0.0;
  std::vector<double> sums_;
  std::vector<int64_t> counts_;
  std::vector<char> dirty_;  // clusters whose sum is not that of their members
};

}  // namespace planmill
