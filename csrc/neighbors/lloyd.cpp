// Lloyd's iteration over rows that are packed once; bounds leave out the rows whose label cannot change.
#include "common/torch_headers.h"

#include <cstring>
#include <limits>
#include <numeric>

#include "neighbors/lloyd.h"

namespace planmill {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = -3.0e38f;
constexpr int64_t kProducts = int64_t{1} << 20;  // of a block, at most
constexpr int64_t kTask = 1 << 16;               // numbers that are worth a thread
constexpr double kMovedShare = 0.75;             // of the centres; where more moved, rows meet all

// The nearest centre, and how far the next one is. Ties go to the lower index.
struct Choice {
  float best = kInfinity, second = kInfinity;
  int32_t index = -1;
  void add(float value, int32_t i) {
    if (index < 0 || value < best || (value == best && i < index)) second = best, best = value, index = i;
    else second = std::min(second, value);
  }
};

int64_t grain(int64_t width) { return std::max<int64_t>(1, kTask / std::max<int64_t>(width, 1)); }

}  // namespace

Lloyd::Lloyd(const Rows& rows, at::Tensor& centers)
    : rows_(rows), centers_tensor_(centers), center_rows_(centers, rows.width()), centers_(centers.data_ptr<float>()), n_(rows.count()),
      d_(rows.width()), clusters_(centers.size(0)), kernels_(screen_kernels(n_, clusters_)),
      slack_((0.25 * static_cast<double>(d_) + 16.0) * 6.0e-8),
      packed_centers_(kernels_, Packed::Side::kRight, clusters_, d_),
      packed_moved_(kernels_, Packed::Side::kRight, clusters_, d_), labels_(static_cast<size_t>(n_), -1),
      distances_(static_cast<size_t>(n_), kInfinity), states_(static_cast<size_t>(n_)), upper_(static_cast<size_t>(n_)),
      lower_(static_cast<size_t>(n_)), drifts_(static_cast<size_t>(clusters_)), sums_(static_cast<size_t>(clusters_ * d_)),
      counts_(static_cast<size_t>(clusters_)), dirty_(static_cast<size_t>(clusters_), 1) {}

int64_t Lloyd::run(int64_t iterations, double least, bool relocating) {
  if (!pack(frame_of(rows_, Metric::kL2, &center_rows_, false))) pack(frame_of(rows_, Metric::kL2, &center_rows_, true));
  int64_t done = 0;
  for (bool settled = false; done < iterations && !settled; ++done) {
    const bool changed = assign();
    sum_members();
    if (relocating) relocate();
    settled = move_centers() <= least || !changed;
  }
  assign();
  measure();
  return done;
}

bool Lloyd::pack(const Frame& frame) {
  frame_ = frame;
  const int64_t words = packed_centers_.pairs();
  words_ = at::empty({n_, words}, at::kInt);
  stats_.resize(static_cast<size_t>(n_));
  auto* out = reinterpret_cast<uint32_t*>(words_.data_ptr<int32_t>());
  std::vector<char> fits(static_cast<size_t>(n_), 1);
  at::parallel_for(0, n_, grain(d_), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(d_));
    for (int64_t i = begin; i < end; ++i) {
      if (packed_centers_.prepare(rows_, i, frame_, Metric::kL2, true, scratch.data())) {
        kernels_.quantize_left(scratch.data(), d_, words, false, out + i * words, &stats_[i]);
        fits[i] = stats_[i].norm < kLongest;
      } else {
        std::fill_n(out + i * words, words, 0u);
        stats_[i] = {0.0f, kInfinity, 0.0f, 0.0f};
      }
    }
  });
  return packed_centers_.pack(center_rows_, 0, clusters_, frame_, Metric::kL2, true, false, 0) &&
         std::find(fits.begin(), fits.end(), 0) == fits.end();
}

float Lloyd::distance(int64_t i, int64_t cluster) const {
  const float *x = row(i), *y = centers_ + cluster * d_;
  float square;
  kernels_.squared_distances(x, &y, 1, d_, &square);
  return distance_from_square(square, x, y, d_);
}

// Whether a label changed.
bool Lloyd::assign() {
  packed_centers_.pack(center_rows_, 0, clusters_, frame_, Metric::kL2, true, false, 0);
  pack_moved();
  at::parallel_for(0, n_, grain(d_), [&](int64_t begin, int64_t end) { find_open(begin, end); });
  std::vector<int32_t> open, before;
  bool changed = false;
  for (const bool moved : {false, true}) {
    open.clear(), before.clear();
    for (int64_t i = 0; i < n_; ++i)
      if (states_[i] == (moved ? State::kOpenToMoved : State::kOpen))
        open.push_back(static_cast<int32_t>(i)), before.push_back(labels_[i]);
    settle_all(open, moved);
    for (size_t j = 0; j < open.size(); ++j) {
      const int32_t was = before[j], is = labels_[open[j]];
      if (was == is) continue;
      changed = true;
      dirty_[is] = 1;
      if (was >= 0) dirty_[was] = 1;
    }
  }
  return changed;
}

void Lloyd::pack_moved() {
  moved_.clear();
  for (int64_t j = 0; j < clusters_; ++j)
    if (drifts_[j] > 0.0) moved_.push_back(static_cast<int32_t>(j));
  if (static_cast<double>(moved_.size()) > kMovedShare * static_cast<double>(clusters_)) moved_.clear();
  const Rows rows(centers_tensor_, d_, moved_.data(), static_cast<int64_t>(moved_.size()));
  packed_moved_.pack(rows, 0, rows.count(), frame_, Metric::kL2, true, false, 0);
}

// Takes the bounds of rows along with the centres, and opens the rows whose bounds meet.
void Lloyd::find_open(int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (!(stats_[i].half < kInfinity)) continue;  // a row that holds NaN or infinity belongs nowhere
    const int32_t own = labels_[i];
    State& state = states_[i];
    if (own < 0) {
      state = State::kOpen;
      continue;
    }
    const double of_unmoved = lower_[i];
    upper_[i] += drifts_[own];
    lower_[i] -= own == farthest_ ? next_far_ : far_;
    if (drifts_[own] > 0.0) state = State::kStale;
    if (apart(upper_[i], lower_[i])) continue;
    if (state == State::kStale) {
      distances_[i] = distance(i, own);
      upper_[i] = distances_[i] * (1.0 + 2.0 * slack_);
      state = State::kFresh;
    }
    if (apart(upper_[i], lower_[i])) continue;
    const bool against_moved = !moved_.empty() && apart(upper_[i], of_unmoved);
    state = against_moved ? State::kOpenToMoved : State::kOpen;
    if (against_moved) lower_[i] = of_unmoved;
  }
}

void Lloyd::settle_all(const std::vector<int32_t>& open, bool moved) {
  const auto count = static_cast<int64_t>(open.size());
  const int64_t columns = packed_centers_.padded(moved ? static_cast<int64_t>(moved_.size()) : clusters_);
  const int64_t most = std::clamp(kProducts / std::max<int64_t>(columns, 1), static_cast<int64_t>(kernels_.left_panel), kernels_.left_rows);
  const int64_t step = even_block(count, most, kernels_.left_panel, at::get_num_threads());
  at::parallel_for(0, count == 0 ? 0 : (count + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
    Workspace w;
    for (int64_t tile = begin; tile < end; ++tile)
      settle(open.data() + tile * step, std::min(step, count - tile * step), moved, w);
  });
}

void Lloyd::settle(const int32_t* open, int64_t count, bool moved, Workspace& w) {
  const Packed& right = moved ? packed_moved_ : packed_centers_;
  const int64_t columns = right.padded(moved ? static_cast<int64_t>(moved_.size()) : clusters_);
  const int64_t words = right.pairs(), panel = kernels_.left_panel, padded = round_up(count, panel);
  const auto* from = reinterpret_cast<const uint32_t*>(words_.const_data_ptr<int32_t>());
  w.left.resize(static_cast<size_t>((padded + panel) * words));
  w.products.resize(static_cast<size_t>(padded * columns));
  w.found.resize(static_cast<size_t>(columns));
  w.rows.resize(static_cast<size_t>(columns));
  w.values.resize(static_cast<size_t>(columns));
  uint32_t* buffer = w.left.data() + padded * words;
  for (int64_t first = 0; first < count; first += panel) {
    for (int64_t lane = 0; lane < panel; ++lane) {
      uint32_t* to = buffer + lane * words;
      if (first + lane < count) std::memcpy(to, from + open[first + lane] * words, static_cast<size_t>(words) * sizeof(uint32_t));
      else std::fill_n(to, words, 0u);
    }
    kernels_.put_left(buffer, words, w.left.data() + first * words);
  }
  kernels_.multiply(w.left.data(), right.at(0), padded / panel, right.panels(columns), words, w.products.data(), columns);
  for (int64_t r = 0; r < count; ++r) choose(open[r], w.products.data() + r * columns, moved, w);
}

void Lloyd::choose(int64_t i, float* products, bool moved, Workspace& w) {
  const Packed& right = moved ? packed_moved_ : packed_centers_;
  const int64_t columns = right.padded(moved ? static_cast<int64_t>(moved_.size()) : clusters_);
  const RowStats& own = stats_[i];
  float low = kLowest, rest;
  const int64_t found = kernels_.list_nearest(products, columns, own, right.stats(0), &low, w.found.data(), &rest);
  const float* x = row(i);
  for (int64_t k = 0; k < found; ++k) {
    if (moved) w.found[k] = moved_[w.found[k]];
    w.rows[k] = centers_ + w.found[k] * d_;
  }
  kernels_.squared_distances(x, w.rows.data(), found, d_, w.values.data());
  // Where only centres that moved are screened, the row's own is known, and bounds rule out the others.
  Choice choice;
  double others = lower_bound(own, rest);
  if (moved) choice.add(distances_[i], labels_[i]), others = std::min(others, lower_[i]);
  for (int64_t k = 0; k < found; ++k)
    if (!moved || w.found[k] != labels_[i]) choice.add(distance_from_square(w.values[k], x, w.rows[k], d_), w.found[k]);
  labels_[i] = choice.index;
  distances_[i] = choice.best;
  states_[i] = State::kFresh;
  upper_[i] = choice.best * (1.0 + 2.0 * slack_);
  lower_[i] = std::min(choice.second * (1.0 - 2.0 * slack_), others);
}

// Of the distance to a centre with v of at most `rest`: v = |x|^2 / 2 - distance^2 / 2, less the rounding of both.
double Lloyd::lower_bound(const RowStats& own, float rest) const {
  if (!(rest > kLowest)) return kInfinity;
  const double square = 2.0 * (static_cast<double>(own.half) - rest), reach = own.norm + std::sqrt(std::max(square, 0.0));
  return std::sqrt(std::max(0.0, square - 2.0 * slack_ * (own.norm * own.norm + reach * reach))) / frame_.scale;
}

// Members are listed by cluster, in the order of the rows.
void Lloyd::sum_members() {
  std::fill(counts_.begin(), counts_.end(), 0);
  for (const int32_t label : labels_)
    if (label >= 0) ++counts_[label];
  std::vector<int64_t> ends(counts_);
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  std::vector<int32_t> members(static_cast<size_t>(n_));
  for (int64_t i = n_ - 1; i >= 0; --i)
    if (labels_[i] >= 0) members[--ends[labels_[i]]] = static_cast<int32_t>(i);
  at::parallel_for(0, clusters_, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      if (dirty_[j] == 0) continue;
      double* sum = sums_.data() + j * d_;
      std::fill_n(sum, d_, 0.0);
      for (int64_t m = ends[j]; m < ends[j] + counts_[j]; ++m) {
        const float* x = row(members[m]);
        for (int64_t c = 0; c < d_; ++c) sum[c] += x[c];
      }
      dirty_[j] = 0;
    }
  });
}

// Each empty cluster gets one row, those farthest from their centres first; the rows leave their clusters.
void Lloyd::relocate() {
  std::vector<int32_t> empty, far;
  for (int64_t j = 0; j < clusters_; ++j)
    if (counts_[j] == 0) empty.push_back(static_cast<int32_t>(j));
  if (empty.empty()) return;
  measure();
  for (int64_t i = 0; i < n_; ++i)
    if (labels_[i] >= 0) far.push_back(static_cast<int32_t>(i));
  const auto count = static_cast<int64_t>(std::min(empty.size(), far.size()));
  std::partial_sort(far.begin(), far.begin() + count, far.end(), [this](int32_t i, int32_t j) {
    return distances_[i] > distances_[j] || (distances_[i] == distances_[j] && i < j);
  });
  if (count == 0 || !(distances_[far[0]] > 0.0f)) return;  // every row is a centre: nothing to gain
  const auto take = [this](int64_t cluster, int64_t i, double sign) {
    const float* x = row(i);
    for (int64_t c = 0; c < d_; ++c) sums_[cluster * d_ + c] += sign * x[c];
    dirty_[cluster] = 1;
  };
  for (int64_t k = 0; k < count; ++k) take(labels_[far[k]], far[k], -1.0), --counts_[labels_[far[k]]];
  for (int64_t k = 0; k < count; ++k) take(empty[k], far[k], 1.0), counts_[empty[k]] = 1;
}

// To the means; a cluster without rows stays. Returns the squared distance that all centres moved.
double Lloyd::move_centers() {
  at::parallel_for(0, clusters_, grain(d_), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      double square = 0.0;
      for (int64_t c = 0; c < d_ && counts_[j] > 0; ++c) {
        float& center = centers_[j * d_ + c];
        const auto mean = static_cast<float>(sums_[j * d_ + c] / static_cast<double>(counts_[j]));
        const double gap = static_cast<double>(mean) - center;
        square += gap * gap;
        center = mean;
      }
      drifts_[j] = std::sqrt(square) * (1.0 + 1.0e-9);
    }
  });
  farthest_ = -1, far_ = next_far_ = 0.0;
  double total = 0.0;
  for (int64_t j = 0; j < clusters_; ++j) {
    total += drifts_[j] * drifts_[j];
    if (drifts_[j] > far_) next_far_ = far_, far_ = drifts_[j], farthest_ = j;
    else next_far_ = std::max(next_far_, drifts_[j]);
  }
  return total;
}

// Distances to the centres that the labels name.
void Lloyd::measure() {
  at::parallel_for(0, n_, grain(d_), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (states_[i] == State::kStale && labels_[i] >= 0) distances_[i] = distance(i, labels_[i]), states_[i] = State::kFresh;
  });
}

}  // namespace planmill
