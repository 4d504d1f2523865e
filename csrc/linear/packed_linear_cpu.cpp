// packed_linear on the CPU: blocks of rows times groups of output channels, dealt out to the threads.
#include "common/torch_headers.h"

#include <string_view>

#include "common/cpu_capability.h"
#include "linear/packed_linear.h"

namespace planmill {
namespace {

constexpr int64_t kRowsOfABlock = 240;       // at 384 channels 360 KB, which a second-level cache holds
constexpr int64_t kPanelsOfAGroup = 2;       // what a register tile of AVX-512 takes
constexpr int64_t kLeastWork = 1 << 18;      // multiplications that are worth another thread

int64_t whole(int64_t n, int64_t size) { return (n + size - 1) / size; }

LinearActivation activation_of(std::string_view name) {
  if (name == "none") return LinearActivation::kNone;
  if (name == "gelu") return LinearActivation::kGelu;
  if (name == "gelu_tanh") return LinearActivation::kGeluTanh;
  if (name == "relu") return LinearActivation::kRelu;
  TORCH_CHECK_VALUE(name == "silu", "packed_linear: activation must be none, gelu, gelu_tanh, relu or silu, got ", name);
  return LinearActivation::kSilu;
}

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& bias,
                         std::string_view activation) {
  const at::Tensor u = x.contiguous(), panels = packed.contiguous(), shift = bias.contiguous();
  const int64_t channels = u.size(-1), outputs = shift.size(0);
  std::vector<int64_t> sizes = u.sizes().vec();
  sizes.back() = outputs;
  at::Tensor out = at::empty(sizes, u.options());
  if (out.numel() == 0) return out;
  const int64_t rows = out.numel() / outputs;
  const PackedLinearKernels& kernels =
      choose_kernels(packed_linear_baseline(), packed_linear_avx2(), packed_linear_avx512());
  const PackedLinear linear{u.const_data_ptr<float>(), rows, channels, outputs, panels.const_data_ptr<float>(),
                            shift.const_data_ptr<float>(), activation_of(activation), out.mutable_data_ptr<float>()};
  const int64_t groups = whole(panels.size(0), kPanelsOfAGroup), threads = at::get_num_threads();
  // A thread takes neighbours: groups of one block of rows first. More blocks where there are few groups to deal out.
  const int64_t wanted = std::max(whole(rows, kRowsOfABlock), threads > 1 ? whole(4 * threads, groups) : 1);
  const int64_t block = whole(whole(rows, wanted), kernels.rows) * kernels.rows, blocks = whole(rows, block);
  const int64_t work = std::min(block, rows) * channels * kPanelsOfAGroup * kLinearPanel;
  const int64_t grain = std::max<int64_t>(1, kLeastWork / std::max<int64_t>(work, 1));
  at::parallel_for(0, blocks * groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t row = i / groups * block, group = i % groups, last = std::min(groups, group + end - i);
      kernels.run(linear, row, std::min(rows, row + block), group * kPanelsOfAGroup,
                  std::min(panels.size(0), last * kPanelsOfAGroup));
      i += last - group;
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("packed_linear", &packed_linear); }

}  // namespace
}  // namespace planmill
