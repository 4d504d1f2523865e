// mahalanobis on the CPU: each position's triangle is read once for a batch of vectors, in bfloat16 or float32.
#include "common/torch_headers.h"

#include <ATen/ops/zeros.h>

#include "common/cpu_capability.h"
#include "moments/mahalanobis.h"

namespace planmill {
namespace {

const MahalanobisKernels& kernels_in_use() {
  return choose_kernels(mahalanobis_baseline(), mahalanobis_avx2(), mahalanobis_avx512());
}

constexpr int64_t kVectors = 32;  // that a triangle is read for at a time

struct Problem {
  const MahalanobisKernels& kernels;
  const float *x, *mean;  // [batch, positions, d], [positions, d]
  at::Tensor factor;      // [positions, d (d + 1) / 2]
  int64_t batch, positions, d, stride;

  // Distances of at most kVectors vectors [first, last) of position p.
  void measure(int64_t p, int64_t first, int64_t last, float* r, float* rows, float* out) const {
    const int64_t size = d * (d + 1) / 2, count = last - first;
    for (int64_t v = 0; v < count; ++v) {
      const float* source = x + ((first + v) * positions + p) * d;
      for (int64_t c = 0; c < d; ++c) r[v * stride + c] = source[c] - mean[p * d + c];
    }
    double squares[kVectors];
    if (factor.scalar_type() == at::kFloat)
      kernels.square_float(factor.const_data_ptr<float>() + p * size, d, r, stride, count, rows, squares);
    else
      kernels.square_bfloat16(reinterpret_cast<const uint16_t*>(factor.const_data_ptr()) + p * size, d, r, stride, count,
                              rows, squares);
    for (int64_t v = 0; v < count; ++v) out[(first + v) * positions + p] = static_cast<float>(std::sqrt(squares[v]));
  }
};

at::Tensor mahalanobis(const at::Tensor& features, const at::Tensor& mean, const at::Tensor& factor) {
  const at::Tensor x = features.to(at::kFloat).contiguous(), center = mean.contiguous();
  const int64_t batch = x.size(0), positions = x.size(1), d = x.size(2);
  at::Tensor out = at::zeros({batch, positions}, x.options());
  if (x.numel() == 0) return out;
  const MahalanobisKernels& kernels = kernels_in_use();
  const Problem problem{kernels, x.const_data_ptr<float>(), center.const_data_ptr<float>(), factor.contiguous(), batch,
                        positions, d, (d + kernels.width - 1) / kernels.width * kernels.width};
  const int64_t parts = (batch + kVectors - 1) / kVectors, size = (batch + parts - 1) / parts;
  at::parallel_for(0, positions * parts, std::max<int64_t>(1, 65536 / (size * d * d)), [&](int64_t begin, int64_t end) {
    std::vector<float> r(static_cast<size_t>(kVectors * problem.stride));
    std::vector<float> rows(static_cast<size_t>(kTriangleRows * problem.stride));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % parts * size;
      problem.measure(task / parts, first, std::min(first + size, batch), r.data(), rows.data(), out.data_ptr<float>());
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("mahalanobis", &mahalanobis); }

}  // namespace
}  // namespace planmill
