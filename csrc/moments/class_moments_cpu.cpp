// class_moments on the CPU: rows are counted and grouped by label without being moved, each class is averaged, and the
// pooled scatter is summed over the rows in their own order, each relative to the mean of its class.
#include "common/torch_headers.h"

#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <numeric>
#include <tuple>

#include "moments/product_sums.h"

namespace planmill {
namespace {

constexpr int64_t kRun = 512;
constexpr int64_t kRowsOfTask = 256;  // rows averaged by one thread before another may help

struct Groups {
  std::vector<int64_t> first;  // [classes + 1]: where the rows of a class begin in `rows`
  std::vector<int64_t> rows;   // labelled rows, grouped by class, in order within it
};

Groups group(const int64_t* labels, int64_t n, int64_t classes) {
  Groups groups{std::vector<int64_t>(static_cast<size_t>(classes + 1)), {}};
  for (int64_t i = 0; i < n; ++i) {
    TORCH_CHECK_VALUE(labels[i] >= -1 && labels[i] < classes, "class_moments: labels must be from -1 to ", classes - 1,
                      ", got ", labels[i], " in row ", i);
    if (labels[i] >= 0) ++groups.first[static_cast<size_t>(labels[i] + 1)];
  }
  std::partial_sum(groups.first.begin(), groups.first.end(), groups.first.begin());
  groups.rows.resize(static_cast<size_t>(groups.first.back()));
  std::vector<int64_t> next(groups.first.begin(), groups.first.end() - 1);
  for (int64_t i = 0; i < n; ++i)
    if (labels[i] >= 0) groups.rows[static_cast<size_t>(next[static_cast<size_t>(labels[i])]++)] = i;
  return groups;
}

// The mean of the rows of one class, relative to the first of them: float32 over at most kRun rows, double beyond.
void average_rows(const CovarianceKernels& kernels, const float* x, const int64_t* rows, int64_t count, int64_t d,
                  float* mean) {
  std::vector<float> pivot(x + rows[0] * d, x + (rows[0] + 1) * d), run(static_cast<size_t>(d));
  std::vector<double> sum(static_cast<size_t>(d));
  for (float& value : pivot)
    if (value - value != 0.0f) value = 0.0f;  // NaN and infinity are left to the sum
  for (int64_t first = 0; first < count; first += kRun) {
    const int64_t last = std::min(first + kRun, count);
    std::fill(run.begin(), run.end(), 0.0f);
    for (int64_t r = first; r < last; ++r)
      kernels.accumulate(x + rows[r] * d, pivot.data(), x + rows[std::min(r + 1, count - 1)] * d, d, run.data());
    for (int64_t c = 0; c < d; ++c) sum[c] += run[c];
  }
  for (int64_t c = 0; c < d; ++c) mean[c] = static_cast<float>(pivot[c] + sum[c] / static_cast<double>(count));
}

void average(const at::Tensor& x, const Groups& groups, int64_t classes, float* means) {
  const int64_t d = x.size(1), n = static_cast<int64_t>(groups.rows.size());
  const CovarianceKernels& kernels = covariance_kernels();
  const float* source = x.const_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, kRowsOfTask * classes / std::max<int64_t>(n, 1));
  at::parallel_for(0, classes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = groups.first[k], count = groups.first[k + 1] - first;
      if (count == 0) std::fill(means + k * d, means + (k + 1) * d, 0.0f);
      else average_rows(kernels, source, groups.rows.data() + first, count, d, means + k * d);
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> class_moments(const at::Tensor& features, const at::Tensor& labels,
                                                             int64_t classes) {
  const int64_t n = features.size(0), d = features.size(1);
  const at::Tensor x = features.to(at::kFloat).contiguous(), y = labels.to(at::kLong).contiguous();
  const auto options = features.options();
  at::Tensor counts = at::empty({classes}, options.dtype(at::kInt));
  at::Tensor means = at::empty({classes, d}, options.dtype(at::kFloat));
  at::Tensor scatter = at::zeros({d, d}, options.dtype(at::kFloat));
  const Groups groups = group(y.const_data_ptr<int64_t>(), n, classes);
  for (int64_t k = 0; k < classes; ++k)
    counts.data_ptr<int32_t>()[k] = static_cast<int32_t>(groups.first[k + 1] - groups.first[k]);
  average(x, groups, classes, means.data_ptr<float>());
  if (d == 0) return {means, scatter, counts};

  std::vector<const float*> pivots;  // of the labelled rows
  std::vector<int64_t> labelled;
  const int64_t* label = y.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < n; ++row)
    if (label[row] >= 0) pivots.push_back(means.const_data_ptr<float>() + label[row] * d), labelled.push_back(row);
  const auto count = static_cast<int64_t>(labelled.size());
  const at::Tensor rows = count == n ? x : x.index_select(0, at::tensor(labelled));
  ProductSums sums(covariance_kernels(), d, count, false);
  for (int64_t row = 0; row < count; row += sums.chunk())
    sums.add(rows.const_data_ptr<float>() + row * d, pivots.data() + row, std::min(sums.chunk(), count - row));
  std::vector<double> off(static_cast<size_t>(d)), along(static_cast<size_t>(d));  // rows are relative to their means
  sums.finish(off.data(), 0.0, scatter.data_ptr<float>(), along.data());
  return {means, scatter, counts};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("class_moments", &class_moments); }

}  // namespace
}  // namespace planmill
