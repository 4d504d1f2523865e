// neighborhood_pooling on the CPU: one read for the mean, one for the window.
//
// The scale of the LayerNorm and the divisor of the average cancel when a row is brought to length one, so that a row is
// sum(x - mean) over its window, divided by its length. The mean is kept as a sum of two floats: x - high is exact where x
// is near the mean, so that an image far from the origin loses nothing.
#include "common/torch_headers.h"

#include <ATen/Dispatch.h>

#include "common/cpu_capability.h"
#include "neighbors/pooling.h"

namespace planmill {
namespace {

const PoolingKernels& pooling_kernels() {
  return choose_kernels(pooling_baseline(), pooling_avx2(), pooling_avx512());
}

struct Mean {
  float high, low;
};

Mean mean_of(const PoolingKernels& kernels, const float* image, int64_t n) {
  const float first = static_cast<float>(kernels.shifted_sum(image, n, 0.0f) / static_cast<double>(n));
  const double mean = first + kernels.shifted_sum(image, n, first) / static_cast<double>(n);
  const auto high = static_cast<float>(mean);
  return {high, static_cast<float>(mean - high)};
}

// For rows whose squares leave float32's range. A zero row stays zero; NaN stays NaN.
void scale_in_double(float* x, int64_t n) {
  double squares = 0.0;
  for (int64_t c = 0; c < n; ++c) squares += static_cast<double>(x[c]) * x[c];
  if (squares == 0.0) return;
  for (int64_t c = 0; c < n; ++c) x[c] = static_cast<float>(x[c] / std::sqrt(squares));
}

// Rows of the grid [first, last), counted over all images.
void pool_rows(const PoolingKernels& kernels, const float* x, const std::vector<Mean>& means, float* out, int64_t first,
               int64_t last, int64_t height, int64_t width, int64_t channels, int64_t size) {
  const int64_t reach = size / 2;
  std::vector<float> columns(static_cast<size_t>(width * channels));  // vertical sums of one row of the grid
  std::vector<const float*> window(static_cast<size_t>(size));
  for (int64_t row = first; row < last; ++row) {
    const int64_t image = row / height, y = row % height;
    const float* source = x + image * height * width * channels;
    int64_t count = 0;
    for (int64_t v = std::max<int64_t>(0, y - reach); v <= std::min(y + reach, height - 1); ++v)
      window[count++] = source + v * width * channels;
    kernels.sum_shifted(columns.data(), window.data(), count, width * channels, means[image].high, means[image].low);
    for (int64_t u = 0; u < width; ++u) {
      count = 0;
      for (int64_t v = std::max<int64_t>(0, u - reach); v <= std::min(u + reach, width - 1); ++v)
        window[count++] = columns.data() + v * channels;
      float* target = out + (row * width + u) * channels;
      const float squares = kernels.sum_rows(target, window.data(), count, channels);
      if (squares > 1.0e-30f && squares < 1.0e37f) kernels.scale(target, channels, 1.0f / std::sqrt(squares));
      else scale_in_double(target, channels);
    }
  }
}

at::Tensor neighborhood_pooling(const at::Tensor& features, int64_t height, int64_t width, int64_t size) {
  const at::Tensor x = features.to(at::kFloat).contiguous();
  const int64_t n = x.size(0), image = x.size(1) * x.size(2), channels = x.size(2);
  at::Tensor out = at::empty(x.sizes(), at::kFloat);
  if (out.numel() == 0) return out.to(features.scalar_type());
  const PoolingKernels& kernels = pooling_kernels();
  const float* source = x.const_data_ptr<float>();
  float* target = out.data_ptr<float>();
  std::vector<Mean> means(static_cast<size_t>(n));
  at::parallel_for(0, n, std::max<int64_t>(1, 32768 / image), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) means[i] = mean_of(kernels, source + i * image, image);
  });
  at::parallel_for(0, n * height, std::max<int64_t>(1, 32768 / (width * channels)), [&](int64_t first, int64_t last) {
    pool_rows(kernels, source, means, target, first, last, height, width, channels, size);
  });
  return out.to(features.scalar_type());
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("neighborhood_pooling", &neighborhood_pooling); }

}  // namespace
}  // namespace planmill
