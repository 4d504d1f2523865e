#include "common/torch_headers.h"

#include <limits>

#include "neighbors/scoring.h"

namespace planmill {

Interval interval_of(double low, double high, int64_t count) {
  const auto position = [count](double edge) {
    return edge < 1.0 ? static_cast<int64_t>(edge * static_cast<double>(count))
                      : edge < static_cast<double>(count) ? static_cast<int64_t>(edge) : count;
  };
  int64_t begin = position(low), end = position(high);
  if (end < begin) std::swap(begin, end);
  end = std::max<int64_t>(end, 1);
  return {std::min(begin, end - 1), end};
}

at::Tensor interval_means(const at::Tensor& table, double low, double high, bool skip_self) {
  const int64_t n = table.size(0), p = table.size(1), m = table.size(2);
  at::Tensor scores = at::empty({n, p}, at::kFloat);
  const Interval span = interval_of(low, high, skip_self ? m - 1 : m);
  const float* rows = table.const_data_ptr<float>();
  float* out = scores.data_ptr<float>();
  at::parallel_for(0, n * p, std::max<int64_t>(1, 65536 / std::max<int64_t>(m, 1)), [&](int64_t first, int64_t last) {
    std::vector<float> row(static_cast<size_t>(m));
    for (int64_t r = first; r < last; ++r) {
      std::copy(rows + r * m, rows + (r + 1) * m, row.begin());
      auto stop = row.end();
      if (skip_self) {
        std::swap(row[static_cast<size_t>(r / p)], row.back());
        --stop;
      }
      std::partial_sort(row.begin(), row.begin() + span.end, stop);
      double sum = 0.0;
      for (int64_t k = span.begin; k < span.end; ++k) sum += row[static_cast<size_t>(k)];
      out[r] = static_cast<float>(sum / static_cast<double>(span.end - span.begin));
    }
  });
  return scores;
}

void plain_distances(const ScreenKernels& kernels, const Rows& images, int64_t i, int64_t patches, const Rows& others,
                     int64_t j, int64_t other_patches, double radius, int64_t width, float* out, int64_t stride,
                     Workspace& w) {
  const int64_t d = images.width();
  w.scratch.resize(static_cast<size_t>(d));
  w.scratch_rows.resize(static_cast<size_t>(other_patches * d));
  w.rows.resize(static_cast<size_t>(other_patches));
  w.values.resize(static_cast<size_t>(other_patches));
  std::vector<const float*> all(static_cast<size_t>(other_patches));
  for (int64_t q = 0; q < other_patches; ++q) {
    all[q] = others.get(j * other_patches + q, w.scratch_rows.data() + q * d);
    if (!finite_row(all[q], d)) all[q] = nullptr;
  }
  const int64_t reach = radius >= 0 ? static_cast<int64_t>(std::min(radius, 1e9)) : 0;
  for (int64_t p = 0; p < patches; ++p) {
    const float* x = images.get(i * patches + p, w.scratch.data());
    int64_t count = 0;
    if (radius < 0) {
      for (int64_t q = 0; q < other_patches; ++q)
        if (all[q] != nullptr) w.rows[count++] = all[q];
    } else {
      const int64_t y = p / width, column = p % width;
      for (int64_t v = std::max<int64_t>(0, y - reach); v <= std::min(y + reach, (other_patches - 1) / width); ++v)
        for (int64_t u = std::max<int64_t>(0, column - reach); u <= std::min(column + reach, width - 1); ++u) {
          const auto dy = static_cast<double>(v - y), dx = static_cast<double>(u - column);
          const int64_t q = v * width + u;
          if (dy * dy + dx * dx <= radius * radius && q < other_patches && all[q] != nullptr) w.rows[count++] = all[q];
        }
    }
    float best = std::numeric_limits<float>::infinity();
    if (count > 0 && finite_row(x, d)) {
      kernels.squared_distances(x, w.rows.data(), count, d, w.values.data());
      const float square = *std::min_element(w.values.begin(), w.values.begin() + count);
      if (square > 1.0e-30f && square < 1.0e37f) best = std::sqrt(square);
      else  // squares that left float32's range do not order the rows
        for (int64_t k = 0; k < count; ++k) best = std::min(best, distance_from_square(w.values[k], x, w.rows[k], d));
    }
    out[p * stride] = best;
  }
}

}  // namespace planmill
