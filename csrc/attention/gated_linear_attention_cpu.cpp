// gated_linear_attention on the CPU: heads and slices of their value channels, shared among the threads.
#include "common/torch_headers.h"

#include <memory>

#include "attention/gated_scan.h"
#include "common/cpu_capability.h"

namespace planmill {
namespace {

constexpr int64_t kGrain = 1 << 18;   // elements of the state, visited, that are worth a thread
constexpr double kPreparation = 0.2;  // time of a slice that its width does not change, as a part of the whole width's

Element element(at::ScalarType type) {
  return type == at::kFloat ? Element::kFloat : type == at::kBFloat16 ? Element::kBFloat16 : Element::kHalf;
}

// How many slices a head's value channels are cut into so that the busiest thread is done earliest.
int64_t choose_slices(int64_t heads, int64_t blocks, int64_t threads) {
  int64_t best = 1;
  double least = 1e300;
  for (int64_t slices = 1; slices <= std::min(blocks, threads); ++slices) {
    const double width = static_cast<double>((blocks + slices - 1) / slices) / static_cast<double>(blocks);
    const double time = static_cast<double>((heads * slices + threads - 1) / threads) * (kPreparation + width);
    if (time < least * 0.999) best = slices, least = time;
  }
  return best;
}

// One head's rows of x [B, N, H, d].
GatedRows rows_of(const at::Tensor& x, int64_t sample, int64_t head) {
  if (x.numel() == 0) return {nullptr, 0, 0};
  const int64_t at = sample * x.stride(0) + head * x.stride(2);
  return {static_cast<const char*>(x.const_data_ptr()) + at * x.element_size(), x.stride(1), x.stride(3)};
}

std::tuple<at::Tensor, at::Tensor> gated_linear_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                          const at::Tensor& log_gates, const at::Tensor& backward,
                                                          const at::Tensor& initial, double scale, bool return_state) {
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), keys = q.size(3), values = v.size(3);
  at::Tensor out = at::empty(v.sizes(), v.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor state = at::empty({return_state ? batch : 0, heads, keys, values}, q.options().dtype(at::kFloat));
  if (batch * heads * values == 0) return {out, state};
  const at::Tensor start = initial.contiguous();
  const bool both = backward.numel() != 0;
  const auto sequence = [&](int64_t unit) {
    const int64_t b = unit / heads, h = unit % heads, at = unit * keys * values;
    return GatedSequence{element(q.scalar_type()), element(log_gates.scalar_type()), tokens, keys, values,
                         rows_of(q, b, h), rows_of(k, b, h), rows_of(v, b, h), rows_of(log_gates, b, h),
                         rows_of(backward, b, h), static_cast<float>(both ? scale / 2 : scale),
                         static_cast<char*>(out.data_ptr()) + (b * tokens * heads + h) * values * out.element_size(),
                         heads * values, start.numel() != 0 ? start.const_data_ptr<float>() + at : nullptr,
                         return_state ? state.data_ptr<float>() + at : nullptr};
  };
  const GatedScanKernels& kernels = choose_kernels(gated_scan_baseline(), gated_scan_avx2(), gated_scan_avx512());
  const int64_t units = batch * heads, blocks = (values + kernels.value_block - 1) / kernels.value_block;
  const int64_t work = std::max<int64_t>(1, tokens * keys * values * (both ? 2 : 1));
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), std::max<int64_t>(1, units * work / kGrain));
  const int64_t slices = choose_slices(units, blocks, threads);
  const int64_t width = (blocks + slices - 1) / slices * kernels.value_block;
  at::parallel_for(0, units * slices, std::max<int64_t>(1, kGrain * slices / work), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[kernels.scratch(sequence(0), std::min(width, values))]);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % slices * width;
      if (first < values) kernels.attend(sequence(i / slices), first, std::min(width, values - first), scratch.get());
    }
  });
  return {out, state};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("gated_linear_attention", &gated_linear_attention); }

}  // namespace
}  // namespace planmill
