// Sums of products of centred rows, for the ops that need a covariance.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "moments/covariance.h"

namespace planmill {

// The kernels of the level in use.
const CovarianceKernels& covariance_kernels();

// Sums over rows [n, d] of z z^T, z, |z|^2 z and |z|^4, where z is the row relative to its pivot. float32 within kBlocks
// blocks of rows, double beyond; the sums do not depend on the number of threads.
class ProductSums {
 public:
  ProductSums(const CovarianceKernels& kernels, int64_t d);

  // Rows that one call of `add` takes at most.
  int64_t chunk() const { return group_ * kCovarianceRows; }

  // x [rows, d]; one pivot [d] for each row.
  void add(const float* x, const float* const* pivots, int64_t rows);

  double linear(int64_t c) const { return first_[static_cast<size_t>(c)]; }
  double cubic(int64_t c) const { return third_[static_cast<size_t>(c)]; }
  double quartic() const { return fourth_; }
  double product(int64_t row, int64_t column) const;

 private:
  static int64_t rows_of(int64_t b, int64_t rows) {
    return rows - b * kCovarianceRows < kCovarianceRows ? rows - b * kCovarianceRows : kCovarianceRows;
  }
  int64_t sums_size() const { return 6 * padded_ + 1; }
  float* block(int64_t b) { return packed_.data() + b * panels_ * kernels_.stride(); }
  float* sums(int64_t b) { return sums_.data() + b * sums_size(); }
  void multiply(int64_t begin, int64_t end, int64_t first, int64_t last, int64_t rows, std::vector<float>& products);

  const CovarianceKernels& kernels_;
  int64_t d_, panel_, panels_, padded_, group_;
  std::vector<float> packed_, sums_;
  std::vector<double> first_, third_, second_;
  double fourth_ = 0.0;
};

}  // namespace planmill
