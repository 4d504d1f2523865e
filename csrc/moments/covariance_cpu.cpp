// covariance on the CPU: one pass over the rows. A block of rows is centred by a pivot near its mean and packed, then the
// panels of one triangle are multiplied; what the pivot is off from the mean is taken out at the end, in double.
//
// Sums do not depend on the number of threads: every product of panels adds its blocks in the order of the rows.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/cpu_capability.h"
#include "moments/covariance.h"

namespace planmill {
namespace {

constexpr int64_t kPivotRows = 256;
constexpr int64_t kBlocks = 4;  // blocks summed in float32 before the sum goes on in double

const CovarianceKernels& covariance_kernels() {
  switch (cpu_capability()) {
    case CpuCapability::kAmx:
    case CpuCapability::kAvx512:
      return *covariance_avx512();
    case CpuCapability::kAvx2:
      return *covariance_avx2();
    default:
      return *covariance_baseline();
  }
}

// Moments of one set of rows [n, d].
class Accumulator {
 public:
  Accumulator(const CovarianceKernels& kernels, int64_t d)
      : kernels_(kernels),
        d_(d),
        panel_(kernels.panel),
        panels_((d + panel_ - 1) / panel_),
        padded_(panels_ * panel_),
        pivot_(static_cast<size_t>(padded_)),
        first_(static_cast<size_t>(padded_)),
        third_(static_cast<size_t>(padded_)),
        second_(static_cast<size_t>(panels_ * (panels_ + 1) / 2 * panel_ * panel_)) {
    group_ = kBlocks * (at::in_parallel_region() ? 1 : at::get_num_threads());
    packed_.resize(static_cast<size_t>(group_ * panels_ * kernels.stride()));
    sums_.resize(static_cast<size_t>(group_ * sums_size()));
  }

  // Rows taken at a time.
  int64_t chunk() const { return group_ * kCovarianceRows; }

  // Rows are taken relative to the pivot; any value near the mean will do.
  void set_pivot(const at::Tensor& pivot) { std::copy_n(pivot.const_data_ptr<float>(), d_, pivot_.data()); }

  void add(const float* x, int64_t rows) {
    const int64_t blocks = (rows + kCovarianceRows - 1) / kCovarianceRows;
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        kernels_.pack(x + b * kCovarianceRows * d_, rows_of(b, rows), d_, pivot_.data(), block(b), sums(b));
    });
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t c = 0; c < padded_; ++c) first_[c] += sums(b)[c], third_[c] += sums(b)[padded_ + c];
      fourth_ += sums(b)[2 * padded_];
    }
    at::parallel_for(0, panels_ * (panels_ + 1) / 2, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> products(static_cast<size_t>((end - begin) * panel_ * panel_));
      for (int64_t group = 0; group < blocks; group += kBlocks)
        multiply(begin, end, group, std::min(group + kBlocks, blocks), rows, products);
    });
    count_ += rows;
  }

  void finish(float* mean, float* rest, float* scatter, float* third, float* fourth) {
    if (count_ == 0) {
      std::fill_n(mean, d_, 0.0f), std::fill_n(rest, d_, 0.0f), std::fill_n(third, d_, 0.0f);
      std::fill_n(scatter, d_ * d_, 0.0f);
      *fourth = 0.0f;
      return;
    }
    const auto n = static_cast<double>(count_);
    std::vector<double> off(static_cast<size_t>(d_)), along(static_cast<size_t>(d_));  // mean - pivot; S2 (mean - pivot)
    double square = 0.0, trace = 0.0, cross = 0.0, product = 0.0;
    for (int64_t c = 0; c < d_; ++c) {
      off[c] = first_[c] / n;
      const double exact = pivot_[c] + off[c];
      mean[c] = static_cast<float>(exact);
      rest[c] = static_cast<float>(exact - mean[c]);
      square += off[c] * off[c];
      cross += off[c] * third_[c];
      trace += at(c, c);
    }
    at::parallel_for(0, d_, 64, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t c = 0; c < d_; ++c) {
          const double sum = at(std::min(r, c), std::max(r, c));
          along[r] += sum * off[c];
          scatter[r * d_ + c] = static_cast<float>(sum - n * off[r] * off[c]);
        }
    });
    for (int64_t c = 0; c < d_; ++c) product += off[c] * along[c];
    // With a = |z|^2, b = z . off and e = |off|^2, the squared distance from the mean is a - 2 b + e.
    for (int64_t c = 0; c < d_; ++c)
      third[c] = static_cast<float>(third_[c] - 2 * along[c] + n * square * off[c] - off[c] * (trace - n * square));
    *fourth = static_cast<float>(fourth_ + 4 * product - 3 * n * square * square - 4 * cross + 2 * square * trace);
  }

 private:
  static int64_t rows_of(int64_t b, int64_t rows) { return std::min(kCovarianceRows, rows - b * kCovarianceRows); }
  int64_t sums_size() const { return 6 * padded_ + 1; }
  float* block(int64_t b) { return packed_.data() + b * panels_ * kernels_.stride(); }
  float* sums(int64_t b) { return sums_.data() + b * sums_size(); }
  double at(int64_t row, int64_t column) const {  // of the triangle, row <= column
    const int64_t i = row / panel_, j = column / panel_;
    return second_[static_cast<size_t>(((j * (j + 1) / 2 + i) * panel_ + row % panel_) * panel_ + column % panel_)];
  }

  // Pairs of panels [begin, end) of the triangle, counted column by column; blocks [first, last). Block after block, so
  // that its panels are read from the second-level cache, and those of a column from the first.
  void multiply(int64_t begin, int64_t end, int64_t first, int64_t last, int64_t rows, std::vector<float>& products) {
    const int64_t size = panel_ * panel_, stride = kernels_.stride();
    std::fill(products.begin(), products.end(), 0.0f);
    int64_t column = 0;
    while ((column + 1) * (column + 2) / 2 <= begin) ++column;
    for (int64_t b = first; b < last; ++b) {
      const float* packed = block(b);
      int64_t j = column, i = begin - j * (j + 1) / 2;
      for (int64_t pair = begin; pair < end; ++pair) {
        kernels_.multiply(packed + i * stride, packed + j * stride, rows_of(b, rows), &products[(pair - begin) * size]);
        if (++i > j) i = 0, ++j;
      }
    }
    double* target = second_.data() + begin * size;
    for (size_t e = 0; e < products.size(); ++e) target[e] += products[e];
  }

  const CovarianceKernels& kernels_;
  int64_t d_, panel_, panels_, padded_, group_ = kBlocks, count_ = 0;
  std::vector<float> pivot_, packed_, sums_;
  std::vector<double> first_, third_, second_;
  double fourth_ = 0.0;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> covariance(const at::Tensor& x) {
  const int64_t sets = x.size(0), n = x.size(1), d = x.size(2);
  const auto options = x.options().dtype(at::kFloat);
  at::Tensor mean = at::empty({sets, d}, options), rest = at::empty({sets, d}, options);
  at::Tensor scatter = at::empty({sets, d, d}, options);
  at::Tensor third = at::empty({sets, d}, options), fourth = at::empty({sets}, options);
  const CovarianceKernels& kernels = covariance_kernels();
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      Accumulator moments(kernels, d);
      const at::Tensor set = x.select(0, s);
      if (n > 0) {  // rows from the whole set: where its mean drifts, the first ones would mislead
        const at::Tensor some = set.slice(0, 0, n, std::max<int64_t>(1, n / kPivotRows)).to(at::kDouble);
        moments.set_pivot(some.mean(0).to(at::kFloat));
      }
      for (int64_t row = 0; row < n; row += moments.chunk()) {
        const at::Tensor rows = set.narrow(0, row, std::min(moments.chunk(), n - row)).to(at::kFloat).contiguous();
        moments.add(rows.const_data_ptr<float>(), rows.size(0));
      }
      moments.finish(mean.data_ptr<float>() + s * d, rest.data_ptr<float>() + s * d,
                     scatter.data_ptr<float>() + s * d * d, third.data_ptr<float>() + s * d, fourth.data_ptr<float>() + s);
    }
  };
  if (sets >= at::get_num_threads()) at::parallel_for(0, sets, 1, run);
  else run(0, sets);
  return {mean, rest, scatter, third, fourth};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("covariance", &covariance); }

}  // namespace
}  // namespace planmill
