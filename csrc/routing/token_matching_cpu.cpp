// token_matching on the CPU: the screened search of the neighbours, on the rows that the partition names.
#include "common/torch_headers.h"

#include <limits>

#include "neighbors/scoring.h"
#include "neighbors/search.h"

namespace planmill {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// One over the lengths of rows: 0 for a zero row, NaN for one that holds NaN or infinity.
std::vector<double> inverse_lengths(const Rows& rows) {
  std::vector<double> inverse(static_cast<size_t>(rows.count()));
  at::parallel_for(0, rows.count(), std::max<int64_t>(1, 32768 / std::max<int64_t>(rows.width(), 1)),
                   [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(rows.width()));
    for (int64_t i = begin; i < end; ++i) {
      const float* x = rows.get(i, scratch.data());
      const double length = length_of_row(x, rows.width());
      inverse[i] = !finite_row(x, rows.width()) ? static_cast<double>(kNan) : length > 0.0 ? 1.0 / length : 0.0;
    }
  });
  return inverse;
}

// One entry of a batch.
struct Matching {
  const ScreenKernels& kernels;
  const Rows& src;
  const Rows& dst;
  const std::vector<double> src_inverse, dst_inverse;
  std::vector<Best> best;

  Matching(const Rows& src, const Rows& dst)
      : kernels(screen_kernels()),
        src(src),
        dst(dst),
        src_inverse(inverse_lengths(src)),
        dst_inverse(inverse_lengths(dst)),
        best(static_cast<size_t>(src.count()), Best{-kInfinity, -1}) {}

  void compare_all();
  void run(float* similarity, int32_t* index);
};

// Every pair evaluated directly: for problems too small to pack.
void Matching::compare_all() {
  const int64_t d = src.width();
  std::vector<float> scratch(static_cast<size_t>(d)), rows(static_cast<size_t>(dst.count() * d)), values(static_cast<size_t>(dst.count()));
  std::vector<const float*> y;
  std::vector<int32_t> where;
  for (int64_t j = 0; j < dst.count(); ++j) {
    if (std::isnan(dst_inverse[j])) continue;
    y.push_back(dst.get(j, rows.data() + j * d));
    where.push_back(static_cast<int32_t>(j));
  }
  for (int64_t i = 0; i < src.count(); ++i) {
    if (!(src_inverse[i] > 0.0)) continue;
    const float* x = src.get(i, scratch.data());
    kernels.dots(x, y.data(), static_cast<int64_t>(y.size()), d, values.data());
    for (size_t k = 0; k < y.size(); ++k) {
      const double product = product_in_range(values[k], x, y[k], d);
      const auto cosine = static_cast<float>(product * src_inverse[i] * dst_inverse[where[k]]);
      if (best[i].index < 0 || cosine > best[i].value) best[i] = {cosine, where[k]};
    }
  }
}

void Matching::run(float* similarity, int32_t* index) {
  const auto pairs = static_cast<double>(src.count()) * static_cast<double>(dst.count());
  int32_t first = 0;  // the lowest destination that can be matched
  while (first < dst.count() && std::isnan(dst_inverse[first])) ++first;
  if (pairs * static_cast<double>(src.width()) <= kPlainWork) {
    compare_all();
  } else if (first < dst.count()) {
    const std::vector<int64_t> whole{0, dst.count()};
    Search{kernels, Metric::kCosine, true, src, dst, whole, best.data(), src_inverse.data(), dst_inverse.data()}.run();
  }
  for (int64_t i = 0; i < src.count(); ++i) {
    const bool zero = src_inverse[i] == 0.0 && first < dst.count();
    similarity[i] = best[i].index >= 0 ? best[i].value : zero ? 0.0f : kNan;
    index[i] = best[i].index >= 0 ? best[i].index : zero ? first : 0;
  }
}

std::tuple<at::Tensor, at::Tensor> token_matching(const at::Tensor& metric, const at::Tensor& src, const at::Tensor& dst) {
  const at::Tensor x = metric.contiguous(), a = src.contiguous(), b = dst.contiguous();
  const int64_t batch = x.size(0), d = x.size(2), n = a.size(0), m = b.size(0);
  at::Tensor similarity = at::empty({batch, n}, at::kFloat), index = at::empty({batch, n}, at::kInt);
  if (similarity.numel() == 0) return {similarity, index};
  const auto entry = [&](int64_t i) {
    const at::Tensor own = x.select(0, i);
    const Rows sources(own, d, a.const_data_ptr<int32_t>(), n), destinations(own, d, b.const_data_ptr<int32_t>(), m);
    Matching(sources, destinations).run(similarity.data_ptr<float>() + i * n, index.data_ptr<int32_t>() + i * n);
  };
  if (batch < at::get_num_threads()) {
    for (int64_t i = 0; i < batch; ++i) entry(i);
  } else {
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) entry(i);
    });
  }
  return {similarity, index};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("token_matching", &token_matching); }

}  // namespace
}  // namespace planmill
