// The k best of a stream: of exact values (Best), and of values known within bounds (Shortlist).
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

namespace planmill {

constexpr float kLowest = -3.0e38f;  // below every value that can be chosen

// The k smallest of a stream by `operator<`: sorted and cut whenever the buffer is full.
template <class T>
class Best {
 public:
  explicit Best(int64_t k) : k_(static_cast<size_t>(k)) { kept_.reserve(2 * k_ + 64); }
  void add(const T& item) {
    if (full_ && !(item < worst_)) return;
    kept_.push_back(item);
    if (kept_.size() == 2 * k_ + 64) cut();
  }
  void cut() {
    if (kept_.size() <= k_) return;
    std::nth_element(kept_.begin(), kept_.begin() + static_cast<int64_t>(k_) - 1, kept_.end());
    kept_.resize(k_);
    worst_ = kept_.back();
    full_ = true;
  }
  std::vector<T>& sorted() {
    cut();
    std::sort(kept_.begin(), kept_.end());
    return kept_;
  }

 private:
  size_t k_;
  std::vector<T> kept_;
  T worst_{};
  bool full_ = false;
};

// The rows that may be among the k best of one query, given what has been screened so far. Larger is better; nothing
// below `least` is wanted.
class Shortlist {
 public:
  Shortlist(int64_t k, float least) : k_(static_cast<size_t>(k)), capacity_(3 * k_ + 96), threshold_(least) {}
  float threshold() const { return threshold_; }
  // A first threshold from the largest lower bounds of disjoint groups of rows: the k-th largest of them has k rows at or
  // above it. `more` where that many rows among them do not count. Overwrites `bounds`.
  void start(float* bounds, int64_t groups, int64_t more) {
    const auto k = static_cast<int64_t>(k_) + more;
    if (groups < k) return;
    std::nth_element(bounds, bounds + k - 1, bounds + groups, std::greater<>());
    threshold_ = std::max(threshold_, bounds[k - 1]);
  }
  void add(float low, float high, int32_t index) {
    if (high < threshold_) return;
    low_.push_back(low);
    high_.push_back(high);
    index_.push_back(index);
    if (low_.size() >= capacity_) cut();
  }
  // k rows have a lower bound of at least the k-th largest lower bound: a row whose upper bound is below it is out.
  void cut() {
    if (low_.size() >= k_) {
      std::vector<float> sorted(low_);
      std::nth_element(sorted.begin(), sorted.begin() + static_cast<int64_t>(k_) - 1, sorted.end(), std::greater<>());
      threshold_ = std::max(threshold_, sorted[k_ - 1]);
    }
    size_t kept = 0;
    for (size_t j = 0; j < low_.size(); ++j)
      if (high_[j] >= threshold_) low_[kept] = low_[j], high_[kept] = high_[j], index_[kept++] = index_[j];
    low_.resize(kept);
    high_.resize(kept);
    index_.resize(kept);
    capacity_ = std::max(capacity_, 2 * kept);
  }
  const std::vector<int32_t>& rows() {
    cut();
    return index_;
  }

 private:
  size_t k_, capacity_;
  float threshold_;
  std::vector<float> low_, high_;
  std::vector<int32_t> index_;
};

}  // namespace planmill
