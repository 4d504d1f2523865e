// covariance on the CPU: one pass over the rows, relative to a pivot near their mean; what the pivot is off from the mean
// is taken out at the end, in double.
#include "common/torch_headers.h"

#include <ATen/ops/zeros.h>

#include <tuple>

#include "moments/product_sums.h"

namespace planmill {
namespace {

constexpr int64_t kPivotRows = 256;

struct Outputs {  // of one set
  float *mean, *rest, *scatter, *third, *fourth;
};

// Moments about the mean from sums about the pivot.
void finish(ProductSums& sums, const float* pivot, int64_t count, int64_t d, const Outputs& out) {
  const auto n = static_cast<double>(count);
  std::vector<double> off(static_cast<size_t>(d)), along(static_cast<size_t>(d));  // mean - pivot; S2 (mean - pivot)
  double square = 0.0, cross = 0.0, product = 0.0;
  for (int64_t c = 0; c < d; ++c) {
    off[c] = sums.linear(c) / n;
    const double mean = pivot[c] + off[c];
    out.mean[c] = static_cast<float>(mean);
    out.rest[c] = static_cast<float>(mean - out.mean[c]);
    square += off[c] * off[c];
    cross += off[c] * sums.cubic(c);
  }
  sums.finish(off.data(), n, out.scatter, along.data());
  const double trace = sums.trace();
  for (int64_t c = 0; c < d; ++c) product += off[c] * along[c];
  // With a = |z|^2, b = z . off and e = |off|^2, the squared distance from the mean is a - 2 b + e.
  for (int64_t c = 0; c < d; ++c)
    out.third[c] =
        static_cast<float>(sums.cubic(c) - 2 * along[c] + n * square * off[c] - off[c] * (trace - n * square));
  *out.fourth =
      static_cast<float>(sums.quartic() + 4 * product - 3 * n * square * square - 4 * cross + 2 * square * trace);
}

void moments_of_set(const CovarianceKernels& kernels, const at::Tensor& x, const Outputs& out) {
  const int64_t n = x.size(0), d = x.size(1);
  // Rows from the whole set: where its mean drifts, the first ones would mislead.
  const at::Tensor some = x.slice(0, 0, n, std::max<int64_t>(1, n / kPivotRows)).to(at::kDouble).mean(0).to(at::kFloat);
  const float* pivot = some.const_data_ptr<float>();
  ProductSums sums(kernels, d, n, true);
  const std::vector<const float*> pivots(static_cast<size_t>(sums.chunk()), pivot);
  for (int64_t row = 0; row < n; row += sums.chunk()) {
    const at::Tensor rows = x.narrow(0, row, std::min(sums.chunk(), n - row)).to(at::kFloat).contiguous();
    sums.add(rows.const_data_ptr<float>(), pivots.data(), rows.size(0));
  }
  finish(sums, pivot, n, d, out);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> covariance(const at::Tensor& x) {
  const int64_t sets = x.size(0), n = x.size(1), d = x.size(2);
  const auto options = x.options().dtype(at::kFloat);
  at::Tensor mean = at::zeros({sets, d}, options), rest = at::zeros({sets, d}, options);
  at::Tensor scatter = at::zeros({sets, d, d}, options);
  at::Tensor third = at::zeros({sets, d}, options), fourth = at::zeros({sets}, options);
  if (n == 0 || d == 0) return {mean, rest, scatter, third, fourth};
  const CovarianceKernels& kernels = covariance_kernels();
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      moments_of_set(kernels, x.select(0, s),
                     {mean.data_ptr<float>() + s * d, rest.data_ptr<float>() + s * d,
                      scatter.data_ptr<float>() + s * d * d, third.data_ptr<float>() + s * d,
                      fourth.data_ptr<float>() + s});
  };
  if (sets >= at::get_num_threads()) at::parallel_for(0, sets, 1, run);
  else run(0, sets);
  return {mean, rest, scatter, third, fourth};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("covariance", &covariance); }

}  // namespace
}  // namespace planmill
