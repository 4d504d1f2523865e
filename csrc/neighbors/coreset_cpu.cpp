// coreset on the CPU: the greedy k-centre choice of float64, with most of its distances left out.
//
// What a row knows is an upper bound of its distance to the chosen rows: the smallest to those that it has met. The bound
// only falls, so a row whose bound is below the largest up-to-date one cannot be chosen next, whatever it has not met. The
// choice therefore goes on among the rows with the largest bounds (`active_`), which stay in cache and meet every new
// centre, until a row outside has a larger bound than any of them; then the rows with the largest bounds are picked anew
// and meet the centres that they have missed, all at once.
//
// A distance is added up in float32, in slices, and given up where it exceeds what the row has. Only where it may be
// smaller, by the bound of its rounding, it is computed again in double: the choice is that of double precision, and does
// not depend on threads or instruction sets.
#include "common/torch_headers.h"

#include <limits>
#include <numeric>

#include "neighbors/screening.h"

namespace planmill {
namespace {

constexpr double kNowhere = std::numeric_limits<double>::infinity();
constexpr double kUnusable = -1.0;                  // of a row that holds NaN or infinity
constexpr int64_t kSlice = 64;                      // numbers of the first slice of a distance; each next one is twice as wide
constexpr int64_t kTile = 64, kChunk = 16;          // centres and rows that meet in cache
constexpr int64_t kActiveBytes = int64_t{2} << 20;  // of active rows, about
constexpr int64_t kTogether = 4;                    // distances from one row at a time
constexpr int64_t kTask = 1 << 17;                  // multiply-adds that are worth a thread

double exact_square(const float* x, const float* y, int64_t d) {
  double sum[4] = {0.0, 0.0, 0.0, 0.0};
  int64_t c = 0;
  for (; c + 4 <= d; c += 4)
    for (int64_t j = 0; j < 4; ++j) {
      const double gap = static_cast<double>(x[c + j]) - static_cast<double>(y[c + j]);
      sum[j] += gap * gap;
    }
  for (; c < d; ++c) {
    const double gap = static_cast<double>(x[c]) - static_cast<double>(y[c]);
    sum[0] += gap * gap;
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

class Greedy {
 public:
  Greedy(const Rows& rows, const float* distances, int64_t count, int32_t* chosen);
  void run(int64_t start);

 private:
  bool before(int64_t i, int64_t j) const { return nearest_[i] > nearest_[j] || (nearest_[i] == nearest_[j] && i < j); }
  float limit(double nearest) const;
  bool meet(const float* x, const float* const* y, const double* nearest, int64_t some, double* squares) const;
  void choose(int64_t row);
  void activate(int64_t size);
  void catch_up();
  void meet_latest();
  int64_t best_active() const;
  const float* active_row(int64_t slot, float* scratch) const {
    return wide_.empty() ? rows_.get(active_[slot], scratch) : wide_.data() + slot * d_;
  }

  const Rows& rows_;
  const ScreenKernels& kernels_ = screen_kernels();
  const int64_t n_, d_, count_, batch_;
  const bool stored_;               // rows are float32 in memory
  const double slack_;              // a float32 square is at most this factor away from the true one
  std::vector<double> nearest_;     // squared distance to the nearest centre met; -infinity for a centre
  std::vector<int32_t> met_;        // centres that a row has met
  std::vector<int32_t> order_;      // all rows, the active ones first
  int32_t* active_;                 // the active rows
  int64_t actives_ = 0;
  int64_t outside_ = -1;            // the row with the largest bound that is not active, or -1
  std::vector<float> wide_;         // the active rows as float32, where they are stored in half
  std::vector<float> wide_centres_;
  std::vector<const float*> centres_;
  int32_t* chosen_;
};

Greedy::Greedy(const Rows& rows, const float* distances, int64_t count, int32_t* chosen)
    : rows_(rows), n_(rows.count()), d_(rows.width()), count_(count),
      batch_(std::clamp<int64_t>(kActiveBytes / (4 * d_), 256, 4096)), stored_(rows.stored()),
      slack_(1.0 + static_cast<double>(d_ + 32) * 0x1p-23), nearest_(static_cast<size_t>(n_), kNowhere),
      met_(static_cast<size_t>(n_), 0), order_(static_cast<size_t>(n_)), active_(order_.data()), chosen_(chosen) {
  std::iota(order_.begin(), order_.end(), 0);
  centres_.reserve(static_cast<size_t>(count));
  if (!stored_) wide_centres_.resize(static_cast<size_t>(count * d_)), wide_.resize(static_cast<size_t>(batch_ * d_));
  at::parallel_for(0, n_, std::max<int64_t>(1, kTask / d_), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(d_));
    for (int64_t i = begin; i < end; ++i) {
      const double given = distances == nullptr ? kNowhere : static_cast<double>(distances[i]);
      nearest_[i] = std::isnan(given) || !finite_row(rows_.get(i, scratch.data()), d_) ? kUnusable : given * given;
    }
  });
}

// The largest float32 square that a smaller distance than `nearest` can have.
float Greedy::limit(double nearest) const {
  const double most = nearest * slack_ + static_cast<double>(d_) * 0x1p-148;  // squares below float32's range round to its steps
  return most < 3.0e38 ? static_cast<float>(most * (1.0 + 0x1p-20)) : std::numeric_limits<float>::infinity();
}

// Squared distances of x from `some` rows y (at most kTogether), where they are below `nearest`. False if none is.
bool Greedy::meet(const float* x, const float* const* y, const double* nearest, int64_t some, double* squares) const {
  float limits[kTogether], sums[kTogether] = {}, slice[kTogether];
  const float* rest[kTogether];
  for (int64_t j = 0; j < some; ++j) limits[j] = limit(nearest[j]), rest[j] = y[j];
  for (int64_t c = 0, width = kSlice; c < d_; c += width, width *= 2) {
    if (c + width + kSlice > d_) width = d_ - c;
    for (int64_t j = 0; j < some; ++j) rest[j] = y[j] + c;
    kernels_.squared_distances(x + c, rest, some, width, slice);
    bool below = false;
    for (int64_t j = 0; j < some; ++j) sums[j] += slice[j], below |= !(sums[j] > limits[j]);
    if (!below) return false;
  }
  bool any = false;
  for (int64_t j = 0; j < some; ++j) {
    squares[j] = sums[j] > limits[j] ? kNowhere : exact_square(x, y[j], d_);
    any |= squares[j] < nearest[j];
  }
  return any;
}

void Greedy::choose(int64_t row) {
  float* wide = stored_ ? nullptr : wide_centres_.data() + static_cast<int64_t>(centres_.size()) * d_;
  const float* x = rows_.get(row, wide);
  chosen_[centres_.size()] = static_cast<int32_t>(row);
  centres_.push_back(x);
  nearest_[row] = -kNowhere;
}

// The `size` rows with the largest bounds become the active ones.
void Greedy::activate(int64_t size) {
  actives_ = std::min(size, n_);
  const auto less = [this](int32_t i, int32_t j) { return before(i, j); };
  if (actives_ < n_) std::nth_element(order_.begin(), order_.begin() + actives_, order_.end(), less);
  outside_ = actives_ < n_ ? order_[actives_] : -1;  // nth_element puts it there
}

// Active rows meet the centres that they have missed: a chunk of rows and a tile of centres at a time.
void Greedy::catch_up() {
  const auto all = static_cast<int32_t>(centres_.size());
  at::parallel_for(0, (actives_ + kChunk - 1) / kChunk, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(stored_ ? 0 : kChunk * d_));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk, last = std::min(first + kChunk, actives_);
      const float* x[kChunk];
      int32_t oldest = all;
      for (int64_t slot = first; slot < last; ++slot) {
        const int32_t row = active_[slot];
        float* wide = stored_ ? nullptr : actives_ <= batch_ ? wide_.data() + slot * d_ : scratch.data() + (slot - first) * d_;
        x[slot - first] = rows_.get(row, wide);
        if (nearest_[row] > 0.0) oldest = std::min(oldest, met_[row]);
      }
      for (int32_t tile = oldest / kTile * kTile; tile < all; tile += kTile) {
        const auto stop = static_cast<int32_t>(std::min<int64_t>(tile + kTile, all));
        for (int64_t slot = first; slot < last; ++slot) {
          double& nearest = nearest_[active_[slot]];
          for (int32_t c = std::max(tile, met_[active_[slot]]); c < stop && nearest > 0.0; c += kTogether) {
            const double own[kTogether] = {nearest, nearest, nearest, nearest};
            double squares[kTogether];
            const auto some = std::min<int64_t>(kTogether, stop - c);
            if (!meet(x[slot - first], centres_.data() + c, own, some, squares)) continue;
            for (int64_t j = 0; j < some; ++j)
              if (squares[j] < nearest) nearest = squares[j];
          }
        }
      }
      for (int64_t slot = first; slot < last; ++slot) met_[active_[slot]] = all;
    }
  });
}

// Active rows meet the latest centre.
void Greedy::meet_latest() {
  const float* centre = centres_.back();
  const auto all = static_cast<int32_t>(centres_.size());
  const int64_t groups = (actives_ + kTogether - 1) / kTogether;
  at::parallel_for(0, groups, std::max<int64_t>(1, kTask / (kTogether * d_)), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const float* y[kTogether];
      double nearest[kTogether], squares[kTogether];
      int64_t slots[kTogether], some = 0;
      for (int64_t slot = group * kTogether; slot < std::min((group + 1) * kTogether, actives_); ++slot) {
        met_[active_[slot]] = all;
        if (nearest_[active_[slot]] <= 0.0) continue;
        slots[some] = slot, nearest[some] = nearest_[active_[slot]], y[some++] = active_row(slot, nullptr);
      }
      if (some == 0 || !meet(centre, y, nearest, some, squares)) continue;
      for (int64_t j = 0; j < some; ++j)
        if (squares[j] < nearest[j]) nearest_[active_[slots[j]]] = squares[j];
    }
  });
}

// The slot of the row to choose next, or -1 where it may not be an active one.
int64_t Greedy::best_active() const {
  int64_t best = -1;
  for (int64_t slot = 0; slot < actives_; ++slot)
    if (best < 0 || before(active_[slot], active_[best])) best = slot;
  return outside_ >= 0 && before(outside_, active_[best]) ? -1 : best;
}

void Greedy::run(int64_t start) {
  activate(n_);
  choose(start >= 0 ? start : active_[best_active()]);
  catch_up();
  while (static_cast<int64_t>(centres_.size()) < count_) {
    activate(batch_);
    catch_up();
    for (int64_t slot; static_cast<int64_t>(centres_.size()) < count_ && (slot = best_active()) >= 0;) {
      choose(active_[slot]);
      meet_latest();
    }
  }
}

at::Tensor coreset(const at::Tensor& features, const at::Tensor& distances, int64_t count, int64_t start) {
  const at::Tensor x = features.contiguous(), given = distances.contiguous();
  at::Tensor chosen = at::empty({count}, at::kInt);
  const Rows rows(x, x.size(1));
  Greedy(rows, given.numel() == 0 ? nullptr : given.const_data_ptr<float>(), count, chosen.data_ptr<int32_t>()).run(start);
  return chosen;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("coreset", &coreset); }

}  // namespace
}  // namespace planmill
