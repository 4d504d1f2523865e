// selective_scan on the CPU: blocks of channels of all samples side by side, float32; 16-bit inputs are converted whole.
#include "common/torch_headers.h"

#include <ATen/ops/add.h>
#include <ATen/ops/softplus.h>

#include <memory>

#include "attention/selective_scan.h"
#include "common/cpu_capability.h"

namespace planmill {
namespace {

constexpr int64_t kGrain = 1 << 13;  // exponentials that are worth a thread

// Row `first` on of sample b, for a tensor [B, rows, L].
ScanRows rows_of(const at::Tensor& x, int64_t b, int64_t first) {
  if (x.numel() == 0) return {nullptr, 0, 0};
  return {x.const_data_ptr<float>() + b * x.stride(0) + first * x.stride(1), x.stride(1), x.stride(2)};
}

std::tuple<at::Tensor, at::Tensor> selective_scan(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A,
                                                  const at::Tensor& B, const at::Tensor& C, const at::Tensor& D,
                                                  const at::Tensor& z, const at::Tensor& delta_bias, bool delta_softplus) {
  const int64_t batch = u.size(0), channels = u.size(1), length = u.size(2), states = A.size(1), groups = B.size(1);
  at::Tensor y = at::empty(u.sizes(), at::kFloat), last = at::empty({batch, channels, states}, at::kFloat);
  if (batch == 0 || channels == 0) return {y.to(u.scalar_type()), last};
  at::Tensor steps = delta.to(at::kFloat);
  if (delta_bias.numel() != 0) steps = at::add(steps, delta_bias.to(at::kFloat).unsqueeze(1));
  if (delta_softplus) steps = at::softplus(steps);
  const at::Tensor values = u.to(at::kFloat), gate = z.to(at::kFloat), into = B.to(at::kFloat), out = C.to(at::kFloat);
  const at::Tensor rates = A.to(at::kFloat).contiguous(), skip = D.to(at::kFloat).contiguous();
  const float* rate = rates.const_data_ptr<float>();
  const float* through = skip.numel() != 0 ? skip.const_data_ptr<float>() : nullptr;
  const bool decaying = delta_softplus && std::all_of(rate, rate + rates.numel(), [](float a) { return a <= 0.0f; });
  const ScanKernels& kernels =
      choose_kernels(selective_scan_baseline(), selective_scan_avx2(), selective_scan_avx512());
  const int64_t per_group = channels / groups, blocks = (per_group + kernels.channels - 1) / kernels.channels;
  const int64_t work = std::max<int64_t>(1, length * states * kernels.channels);
  float *to = y.data_ptr<float>(), *end = last.data_ptr<float>();
  at::parallel_for(0, batch * groups * blocks, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t stop) {
    const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(scan_scratch(states, kernels.channels))]);
    for (int64_t task = begin; task < stop; ++task) {
      const int64_t b = task / (groups * blocks), g = task / blocks % groups, at = task % blocks * kernels.channels;
      const int64_t first = g * per_group + at, row = b * channels + first;
      const ScanBlock block{std::min(kernels.channels, per_group - at), states, length, rows_of(values, b, first),
                            rows_of(steps, b, first), rows_of(gate, b, first), rows_of(into.select(1, g), b, 0),
                            rows_of(out.select(1, g), b, 0), rate + first * states,
                            through != nullptr ? through + first : nullptr, decaying, to + row * length,
                            end + row * states};
      kernels.scan(block, scratch.get());
    }
  });
  return {y.to(u.scalar_type()), last};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("selective_scan", &selective_scan); }

}  // namespace
}  // namespace planmill
