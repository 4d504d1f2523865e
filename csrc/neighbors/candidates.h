// The rows that may be among the k best of one query, given what has been screened so far.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

namespace planmill {

class Candidates {
 public:
  // `limit`: with more rows than this the list is abandoned; a finer screen then pays.
  explicit Candidates(int64_t k, int64_t limit = int64_t{1} << 60)
      : k_(static_cast<size_t>(k)), capacity_(4 * k_ + 256), limit_(static_cast<size_t>(limit)) {}
  float threshold() const { return threshold_; }
  bool started() const { return threshold_ > kLowest; }
  bool abandoned() const { return abandoned_; }
  // A first threshold from the largest lower bounds of disjoint groups of rows: the k-th largest of them has k rows at or
  // above it; `more` rows more where that many of them may not count. Overwrites `bounds`.
  void start(float* bounds, int64_t groups, int64_t more) {
    const auto k = static_cast<int64_t>(k_) + more;
    if (groups < k) return;
    std::nth_element(bounds, bounds + k - 1, bounds + groups, std::greater<>());
    threshold_ = std::max(threshold_, bounds[k - 1]);
  }
  void add(float low, float high, int32_t index) {
    if (high < threshold_ || abandoned_) return;
    entries_.push_back({low, high, index, false});
    if (k_ == 1) threshold_ = std::max(threshold_, low);
    if (entries_.size() >= capacity_) cut();
  }
  // The rows of another list of the same query.
  void join(const Candidates& other) {
    abandoned_ |= other.abandoned_;
    threshold_ = std::max(threshold_, other.threshold_);
    for (const Entry& entry : other.entries_) add(entry.low, entry.high, entry.index);
  }
  // k rows have a lower bound of at least the k-th largest lower bound: a row whose upper bound is below it is out.
  void cut() {
    if (entries_.size() >= k_) {
      select([](const Entry& a, const Entry& b) { return a.low > b.low; });
      threshold_ = std::max(threshold_, entries_[k_ - 1].low);
    }
    drop();
    capacity_ = std::max(capacity_, 2 * entries_.size());
    if (entries_.size() > limit_) abandon();
  }
  // Gives the k rows that look best a better lower bound than the screen's, `bound(row)`, and cuts: a row needs to
  // exceed the k-th best by one error of the screen then, not by two.
  template <class Bound>
  void sharpen(Bound bound) {
    if (!settled()) {
      select([](const Entry& a, const Entry& b) { return a.low + a.high > b.low + b.high; });
      for (size_t j = 0; j < k_; ++j) {
        Entry& entry = entries_[j];
        if (!entry.sharp) entry.low = std::max(entry.low, bound(entry.index)), entry.sharp = true;
      }
    }
    cut();
  }
  // Whether there are too few rows for `sharpen` to pay.
  bool settled() const { return entries_.size() <= k_ + k_ / 2 + 1; }
  // Some row is known to reach `low`.
  void raise(float low) { threshold_ = std::max(threshold_, low); }
  // The `most` rows that look best.
  void best(int64_t most, std::vector<int32_t>& out) const {
    std::vector<Entry> sorted(entries_);
    const auto count = std::min<int64_t>(most, size());
    std::partial_sort(sorted.begin(), sorted.begin() + count, sorted.end(),
                      [](const Entry& a, const Entry& b) { return a.low + a.high > b.low + b.high; });
    out.clear();
    for (int64_t j = 0; j < count; ++j) out.push_back(sorted[j].index);
  }
  // What is left after a last `sharpen` or `cut`.
  int64_t size() const { return static_cast<int64_t>(entries_.size()); }
  void rows(std::vector<int32_t>& out) const {
    out.clear();
    for (const Entry& entry : entries_) out.push_back(entry.index);
  }

 private:
  static constexpr float kLowest = -3.0e38f;

  struct Entry {
    float low, high;
    int32_t index;
    bool sharp;  // `low` is as good as it gets
  };

  template <class Less>
  void select(Less less) {
    std::nth_element(entries_.begin(), entries_.begin() + static_cast<int64_t>(k_) - 1, entries_.end(), less);
  }
  void drop() {
    std::erase_if(entries_, [this](const Entry& entry) { return entry.high < threshold_; });
  }
  void abandon() {
    abandoned_ = true;
    entries_.clear();
  }

  size_t k_, capacity_, limit_;
  float threshold_ = kLowest;
  bool abandoned_ = false;
  std::vector<Entry> entries_;
};

}  // namespace planmill
