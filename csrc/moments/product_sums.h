// Sums of products of centred rows, for the ops that need a covariance.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "moments/covariance.h"

namespace planmill {

// The kernels of the level in use.
const CovarianceKernels& covariance_kernels();

// Sums over rows [n, d] of z z^T and, if `higher`, of z, |z|^2 z and |z|^4, where z is the row relative to its pivot.
// Products are float32 within kRun blocks of rows, double beyond; the sums do not depend on the number of threads.
class ProductSums {
 public:
  ProductSums(const CovarianceKernels& kernels, int64_t d, int64_t rows, bool higher);

  // Rows that one call of `add` takes at most; all calls but the last one take as many.
  int64_t chunk() const { return group_ * kCovarianceRows; }

  // x [rows, d]; one pivot [d] for each row.
  void add(const float* x, const float* const* pivots, int64_t rows);

  double linear(int64_t c) const { return first_[static_cast<size_t>(c)]; }
  double cubic(int64_t c) const { return third_[static_cast<size_t>(c)]; }
  double quartic() const { return fourth_; }

  // After the last `add`: scatter [d, d] = sum z z^T - count off off^T, both triangles; along [d] += sum z z^T off.
  void finish(const double* off, double count, float* scatter, double* along);

  // After `finish`: of sum z z^T.
  double trace() const;

 private:
  static int64_t rows_of(int64_t b, int64_t rows) {
    return rows - b * kCovarianceRows < kCovarianceRows ? rows - b * kCovarianceRows : kCovarianceRows;
  }
  int64_t pairs() const { return panels_ * (panels_ + 1) / 2; }
  int64_t sums_size() const { return 2 * padded_ + 1; }
  float* block(int64_t b) { return packed_.data() + b * panels_ * kernels_.stride(); }
  float* sums(int64_t b) { return higher_ ? sums_.data() + b * sums_size() : nullptr; }
  void multiply(int64_t begin, int64_t end, const float* packed, int64_t rows);
  void flush(int64_t begin, int64_t end);
  void write_tile(int64_t i, int64_t j, const double* off, double count, float* scatter, double* along) const;

  const CovarianceKernels& kernels_;
  bool higher_;
  int64_t d_, panel_, panels_, padded_, group_, blocks_ = 0;
  std::vector<float> packed_, sums_, products_;
  std::vector<double> first_, third_, second_;
  double fourth_ = 0.0;
};

}  // namespace planmill
