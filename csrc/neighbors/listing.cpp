#include "neighbors/listing.h"

#include <algorithm>
#include <cmath>

namespace planmill {
namespace {

// Of one left row against right rows, in float32: lower bounds of what the screen bounds.
class Look {
 public:
  Look(const Screening& s, int64_t row, Workspace& w)
      : s_(s), w_(w), d_(s.left_rows.width()), distance_(s.metric == Metric::kL2),
        rounding_((0.25f * static_cast<float>(d_) + 16.0f) * 6.0e-8f) {  // of a sum in four parts or more
    w.scratch.resize(static_cast<size_t>(d_));
    w.scratch_rows.resize(static_cast<size_t>(d_));
    s.left.prepare(s.left_rows, row, s.frame, s.metric, distance_, w.scratch.data());
    const float* x = w.scratch.data();
    s.kernels.dots(x, &x, 1, d_, &own_);
  }
  float operator()(int32_t right) {
    s_.right.prepare(s_.right_rows, right, s_.frame, s_.metric, true, w_.scratch_rows.data());
    const float *x = w_.scratch.data(), *y = w_.scratch_rows.data();
    float product, other;
    s_.kernels.dots(x, &y, 1, d_, &product);
    s_.kernels.dots(y, &y, 1, d_, &other);
    const float elsewhere = distance_ ? 0.5f * other : s_.frame.rounding * std::sqrt(own_) * (1.0f + 1.0e-6f);
    return product - elsewhere - rounding_ * (own_ + other) - 1.0e-30f;
  }

 private:
  const Screening& s_;
  Workspace& w_;
  int64_t d_;
  bool distance_;
  float rounding_, own_ = 0.0f;
};

}  // namespace

void Screening::sharpen(int64_t row, Candidates& list, Workspace& w) const {
  if (list.settled()) return list.cut();
  list.sharpen(Look(*this, row, w));
}

float Screening::lower_bound(int64_t row, const int32_t* right, int64_t count, Workspace& w) const {
  Look look(*this, row, w);
  float best = -3.0e38f;
  for (int64_t j = 0; j < count; ++j) best = std::max(best, look(right[j]));
  return best;
}

}  // namespace planmill
