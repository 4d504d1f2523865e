// lora_mixture on the CPU: adapters first, then the library's matrix product on top of them.
//
// A linear layer writes its bias into the result and adds the product to it. Here the bias and the adapters' part are written
// in that one pass, so that mixing adapters costs the product with `down` and no other pass over the result.
#include "common/torch_headers.h"

#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>

#include "common/cpu_capability.h"
#include "routing/lora_mixture.h"

namespace planmill {
namespace {

constexpr int64_t kGrain = 32768;  // multiply-adds that are worth a thread
constexpr int64_t kWidened = 16;   // rows from which a product in float32 pays for widening 16-bit weights

const LoraMixtureKernels& lora_kernels() {
  return choose_kernels(lora_mixture_baseline(), lora_mixture_avx2(), lora_mixture_avx512());
}

// y [rows, O] (float32, contiguous): the base (bias, or what it holds) and the adapters' part.
void expand_rows(const at::Tensor& y, const at::Tensor& bias, bool add, const at::Tensor& x, const at::Tensor& down,
                 const at::Tensor& up, const at::Tensor& omega, double scale) {
  const int64_t ranks = down.size(0) * down.size(1), rank = down.size(1), rows = x.size(0), width = y.size(1);
  const at::Tensor p = at::matmul(x, down.reshape({ranks, x.size(1)}).t()).contiguous();
  const at::Tensor u = up.contiguous(), w = omega.contiguous(), b = bias.contiguous();
  const int64_t tokens = rows / omega.size(0), n = omega.size(1);
  float* target = y.data_ptr<float>();
  float* product = p.data_ptr<float>();
  const float* weights = w.const_data_ptr<float>();
  const float* base = !add && b.numel() != 0 ? b.const_data_ptr<float>() : nullptr;
  const float* expanded = u.const_data_ptr<float>();
  const auto factor = static_cast<float>(scale);
  const LoraMixtureKernels& kernels = lora_kernels();
  const int64_t grain = std::max<int64_t>(1, kGrain / ((ranks + 1) * width));
  at::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t j = 0; j < ranks; ++j) product[t * ranks + j] *= factor * weights[t / tokens * n + j / rank];
    kernels.expand(target + first * width, last - first, width, base, add, product + first * ranks, expanded, ranks);
  });
}

at::Tensor lora_mixture(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& down,
                        const at::Tensor& up, const at::Tensor& omega, double scale) {
  const int64_t rows = x.size(0) * x.size(1), inputs = x.size(2), outputs = weight.size(0);
  if (rows * outputs == 0) return at::empty({x.size(0), x.size(1), outputs}, x.options());
  const bool full = x.scalar_type() == at::kFloat;
  const bool widen = full || (rows >= kWidened && cpu_capability() <= CpuCapability::kAvx2);
  const at::Tensor source = x.reshape({rows, inputs}), wide = source.to(at::kFloat);
  const at::Tensor a = down.to(at::kFloat), b = up.to(at::kFloat);
  at::Tensor y;
  if (widen) {
    y = at::empty({rows, outputs}, at::kFloat);
    expand_rows(y, bias.to(at::kFloat), false, wide, a, b, omega, scale);
    y.addmm_(wide, weight.to(at::kFloat).t());
  } else {
    y = at::linear(source, weight, bias.numel() != 0 ? bias : at::Tensor()).to(at::kFloat);
    expand_rows(y, bias, true, wide, a, b, omega, scale);
  }
  return y.to(x.scalar_type()).view({x.size(0), x.size(1), outputs});
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("lora_mixture", &lora_mixture); }

}  // namespace
}  // namespace planmill
