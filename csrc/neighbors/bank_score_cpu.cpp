// bank_score, segmented_max and segmented_min on the CPU: the best row of each segment for every query.
#include "common/torch_headers.h"

#include <limits>

#include "neighbors/scoring.h"
#include "neighbors/search.h"

namespace planmill {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

at::Tensor bank_score(const at::Tensor& features, const at::Tensor& bank, double low, double high, double radius,
                      int64_t width, bool exact) {
  at::Tensor x = features.contiguous(), b = bank.contiguous();
  const int64_t n = x.size(0), p = x.size(1), m = b.size(0), q = b.size(1), d = x.size(2);
  const ScreenKernels& kernels = screen_kernels();
  const Rows queries(x, d), database(b, d);
  at::Tensor table = at::empty({n, p, m}, at::kFloat);
  float* entries = table.data_ptr<float>();
  std::fill_n(entries, table.numel(), kInfinity);
  const double work = static_cast<double>(n * p) * static_cast<double>(m * q) * static_cast<double>(d);
  if (radius >= 0 || work <= kPlainWork) {
    at::parallel_for(0, n * m, work <= kPlainWork ? n * m : 1, [&](int64_t first, int64_t last) {
      Workspace w;
      for (int64_t t = first; t < last; ++t)
        plain_distances(kernels, queries, t / m, p, database, t % m, q, radius, width, entries + t / m * p * m + t % m, m, w);
    });
    return interval_means(table, low, high, false);
  }
  std::vector<int64_t> offsets(static_cast<size_t>(m + 1));
  for (int64_t j = 0; j <= m; ++j) offsets[j] = j * q;
  std::vector<Best> best(static_cast<size_t>(n * p * m), Best{kInfinity, -1});
  Search{kernels, Metric::kL2, exact, queries, database, offsets, best.data()}.run();
  for (size_t k = 0; k < best.size(); ++k) entries[k] = best[k].value;
  return interval_means(table, low, high, false);
}

template <Metric metric>
std::tuple<at::Tensor, at::Tensor> best_of_segments(const at::Tensor& queries, const at::Tensor& database,
                                                    const at::Tensor& offsets) {
  at::Tensor q = queries.contiguous(), x = database.contiguous();
  const at::Tensor bounds = offsets.to(at::kLong).contiguous();
  const std::vector<int64_t> ends(bounds.const_data_ptr<int64_t>(), bounds.const_data_ptr<int64_t>() + bounds.size(0));
  const int64_t n = q.size(0), d = q.size(1), s = static_cast<int64_t>(ends.size()) - 1;
  at::Tensor values = at::empty({n, s}, at::kFloat), indices = at::empty({n, s}, at::kInt);
  std::vector<Best> best(static_cast<size_t>(n * s), Best{metric == Metric::kL2 ? kInfinity : -kInfinity, -1});
  if (n > 0 && s > 0 && x.size(0) > 0) {
    const Rows left(q, d), right(x, d);
    Search{screen_kernels(n, x.size(0)), metric, true, left, right, ends, best.data()}.run();
  }
  float* value = values.data_ptr<float>();
  int32_t* index = indices.data_ptr<int32_t>();
  for (size_t k = 0; k < best.size(); ++k) value[k] = best[k].value, index[k] = best[k].index;
  return {values, indices};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) {
  m.impl("bank_score", &bank_score);
  m.impl("segmented_max", &best_of_segments<Metric::kDot>);
  m.impl("segmented_min", &best_of_segments<Metric::kL2>);
}

}  // namespace
}  // namespace planmill
