// Projection of scores onto the simplex, sparsemax or 1.5-entmax, without sorting: weights max(y - tau, 0)^power that sum
// to one, of scores y = (v - the largest v) / width.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "neighbors/lookup.h"

namespace planmill {

class Simplex {
 public:
  Simplex(int64_t power, const LookupKernels& kernels) : power_(power), kernels_(&kernels) {}

  // tau of scores y [n] whose largest is 0, found from a bound below it: at -1 the weight of the largest alone is one. The
  // sum of the weights falls with tau and is convex in it, so the iterates of Newton's method rise and never pass it; of
  // sparsemax they reach it in finitely many steps (Michelot).
  double threshold(const double* y, int64_t n, double tau) const {
    for (int round = 0; round < kRounds; ++round) {
      const double next = step(y, n, tau);
      if (!(next > tau)) break;
      tau = next;
    }
    return closed_form(y, n, tau);
  }
  double weight(double y, double tau) const {
    const double above = std::max(y - tau, 0.0);
    return power_ == 1 ? above : above * above;
  }

 private:
  static constexpr int kRounds = 100;  // 18 are the most that was seen, up to a million scores

  double step(const double* y, int64_t n, double tau) const {
    const Above found = kernels_->above(y, n, tau);
    return tau + (power_ == 1 ? (found.sum - 1.0) / found.count : (found.squares - 1.0) / (2.0 * found.sum));
  }
  // From the support that the iteration found: what is left of its error is gone, and with it how it came there.
  double closed_form(const double* y, int64_t n, double tau) const {
    double sum = 0.0, squares = 0.0;
    int64_t count = 0;
    for (int64_t j = 0; j < n; ++j)
      if (y[j] > tau) sum += y[j], ++count;
    const double atoms = static_cast<double>(count), mean = sum / atoms;
    if (power_ == 1) return mean - 1.0 / atoms;
    for (int64_t j = 0; j < n; ++j)
      if (y[j] > tau) squares += (y[j] - mean) * (y[j] - mean);
    return mean - std::sqrt(std::max(1.0 - squares, 0.0) / atoms);
  }

  int64_t power_;
  const LookupKernels* kernels_;
};

// The atoms that may have a weight, given what has been screened so far: scores v are known within bounds, and `width` is
// the part of v that counts as one. tau rises with every score and with every further atom, so that of some atoms' lower
// bounds bounds the tau of all from below. The interface is that of Candidates (candidates.h).
class Support {
 public:
  Support(Simplex simplex, double width, int64_t limit)
      : simplex_(simplex), width_(width), limit_(static_cast<size_t>(limit)) {}
  float threshold() const { return threshold_; }
  bool started() const { return threshold_ > kLowest; }
  // Too many atoms for a list.
  bool abandoned() const { return abandoned_; }
  void start(float* bounds, int64_t groups, bool) {
    if (groups > 0) raise(bounds, groups);
  }
  void add(float low, float high, int32_t index) {
    if (high < threshold_ || abandoned_) return;
    low_.push_back(low);
    high_.push_back(high);
    index_.push_back(index);
    if (low_.size() >= capacity_) cut();
  }
  void cut() {
    if (low_.empty()) return;
    raise(low_.data(), static_cast<int64_t>(low_.size()));
    size_t kept = 0;
    for (size_t j = 0; j < low_.size(); ++j)
      if (high_[j] >= threshold_) low_[kept] = low_[j], high_[kept] = high_[j], index_[kept++] = index_[j];
    resize(kept);
    capacity_ = std::max(capacity_, 2 * kept);
  }
  // Once in a while: what was seen before says little about tau where many atoms share the weight.
  void check_length() {
    cut();
    abandoned_ |= low_.size() > limit_;
    if (abandoned_) resize(0);
  }
  // Ascending.
  const std::vector<int32_t>& atoms() {
    cut();
    return index_;
  }

 private:
  static constexpr float kLowest = -3.0e38f;

  void resize(size_t size) {
    low_.resize(size);
    high_.resize(size);
    index_.resize(size);
  }
  void raise(const float* bounds, int64_t count) {
    const double top = *std::max_element(bounds, bounds + count);
    if (!(top > kLowest)) return;
    const double least = std::max((threshold_ - top) / width_, -1.0);
    y_.clear();
    for (int64_t j = 0; j < count; ++j)
      if (const double y = (bounds[j] - top) / width_; y > least) y_.push_back(y);
    const double tau = top + width_ * simplex_.threshold(y_.data(), static_cast<int64_t>(y_.size()), least);
    if (tau > threshold_) threshold_ = std::nextafter(static_cast<float>(tau), kLowest);
  }

  Simplex simplex_;
  double width_;
  size_t limit_, capacity_ = 192;
  float threshold_ = kLowest;
  bool abandoned_ = false;
  std::vector<double> y_;
  std::vector<float> low_, high_;
  std::vector<int32_t> index_;
};

}  // namespace planmill
