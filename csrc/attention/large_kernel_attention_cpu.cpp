// large_kernel_attention on the CPU: the two depthwise convolutions plane by plane, then the product of all channels, a
// block of pixels and a group of channels at a time, with the product with x in its epilogue.
#include "common/torch_headers.h"

#include "attention/large_kernel_attention.h"
#include "common/cpu_capability.h"
#include "common/element_of.h"

namespace planmill {
namespace {

constexpr int64_t kGroup = 96;         // channels of a unit of the product
constexpr int64_t kGrain = 64 * 4096;  // multiplications that are worth a thread

int64_t groups(int64_t n, int64_t size) { return (n + size - 1) / size; }

at::Tensor large_kernel_attention(const at::Tensor& x, const at::Tensor& weight5, const at::Tensor& bias5,
                                  const at::Tensor& weight7, const at::Tensor& bias7, const at::Tensor& weight_point,
                                  const at::Tensor& bias_point) {
  const at::Tensor u = x.contiguous();
  const auto single = [](const at::Tensor& w) { return w.to(at::kFloat).contiguous(); };
  const at::Tensor w5 = single(weight5), b5 = single(bias5), w7 = single(weight7), b7 = single(bias7);
  const at::Tensor w1 = single(weight_point), b1 = single(bias_point);
  const int64_t batch = u.size(0), channels = u.size(1), height = u.size(2), width = u.size(3), pixels = height * width;
  at::Tensor out = at::empty(u.sizes(), u.options());
  if (out.numel() == 0) return out;
  const LargeKernelKernels& kernels = choose_kernels(large_kernel_attention_baseline(), large_kernel_attention_avx2(),
                                                     large_kernel_attention_avx512());
  const Element type = element_of(u);
  const int64_t bytes = bytes_of(type);
  const at::Tensor middle = at::empty(u.sizes(), at::kFloat);
  float* t = middle.data_ptr<float>();
  const auto* from = static_cast<const char*>(u.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const auto per_thread = [](int64_t work) { return std::max<int64_t>(1, kGrain / work); };

  at::parallel_for(0, batch * channels, per_thread(74 * pixels), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(kernels.plane_scratch(height, width)));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i % channels;
      kernels.plane({type, from + i * pixels * bytes, height, width, w5.const_data_ptr<float>() + 25 * c,
                     w7.const_data_ptr<float>() + 49 * c, b5.const_data_ptr<float>()[c], b7.const_data_ptr<float>()[c],
                     t + i * pixels},
                    scratch.data());
    }
  });

  const int64_t blocks = groups(pixels, kernels.block), parts = groups(channels, kGroup), units = blocks * parts;
  const int64_t work = std::min(pixels, kernels.block) * std::min(channels, kGroup) * channels;
  at::parallel_for(0, batch * units, per_thread(work), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(kernels.point_scratch(channels)));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / units * channels * pixels, block = i % units / parts, part = i % parts;
      const int64_t first = block * kernels.block, channel = part * kGroup;
      kernels.point({type, t + image, pixels, channels, pixels, w1.const_data_ptr<float>(), b1.const_data_ptr<float>(),
                     from + image * bytes, to + image * bytes},
                    channel, std::min(channel + kGroup, channels), first, std::min(first + kernels.block, pixels),
                    scratch.data());
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("large_kernel_attention", &large_kernel_attention); }

}  // namespace
}  // namespace planmill
