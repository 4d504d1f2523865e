// router_logits on the CPU: the block products of expert_mixture, so that every sum runs over the channels in order and
// a token's logits have the same bits in every batch.
#include "common/torch_headers.h"

#include <ATen/ops/zeros.h>

#include <cstdint>

#include "common/cpu_capability.h"
#include "routing/expert_mixture.h"

namespace planmill {
namespace {

constexpr int64_t kBlockRows = 48;  // tokens of a task: packing a weight costs as much as multiplying four rows

const ExpertMixtureKernels& kernels_in_use() {
  return choose_kernels(expert_mixture_baseline(), expert_mixture_avx2(), expert_mixture_avx512());
}

struct Rows {
  at::Tensor tensor;
  Storage storage;

  explicit Rows(const at::Tensor& x) : tensor(x.stride(1) == 1 ? x : x.contiguous()) {
    storage = tensor.scalar_type() == at::kFloat      ? Storage::kFloat
              : tensor.scalar_type() == at::kBFloat16 ? Storage::kBFloat16
                                                      : Storage::kHalf;
  }
  const char* at(int64_t row, int64_t column) const {
    return static_cast<const char*>(tensor.const_data_ptr()) +
           (row * tensor.stride(0) + column) * static_cast<int64_t>(tensor.element_size());
  }
};

struct Buffers {  // of one thread
  std::vector<float> x, panel, z;
};

// Logits of tokens [first, first + rows) for the experts of panels [begin, end).
void multiply(const ExpertMixtureKernels& kernels, const Rows& x, const Rows& w, const float* bias, int64_t first,
              int64_t rows, int64_t begin, int64_t end, float* out, Buffers& buffers) {
  const int64_t d = x.tensor.size(1), experts = w.tensor.size(0), width = kernels.panel_width;
  buffers.x.resize(static_cast<size_t>(rows * kChannelBlock));
  buffers.panel.resize(static_cast<size_t>(width * kChannelBlock));
  buffers.z.assign(static_cast<size_t>(rows * (end - begin) * width), 0.0f);
  const int64_t ldz = (end - begin) * width;
  for (int64_t c = 0; c < d; c += kChannelBlock) {
    const int64_t channels = std::min(kChannelBlock, d - c);
    for (int64_t i = 0; i < rows; ++i)
      kernels.load_row(x.at(first + i, c), x.storage, channels, 1.0f, buffers.x.data() + i * kChannelBlock);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t count = std::min(width, experts - p * width);
      kernels.pack(w.at(p * width, c), w.storage, w.tensor.stride(0), count, channels, buffers.panel.data());
      kernels.multiply(buffers.x.data(), rows, buffers.panel.data(), channels, buffers.z.data() + (p - begin) * width, ldz,
                       c == 0, nullptr, 0, 0);
    }
  }
  const int64_t from = begin * width, to = std::min(end * width, experts);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t e = from; e < to; ++e)
      out[(first + i) * experts + e] = buffers.z[static_cast<size_t>(i * ldz + e - from)] + (bias == nullptr ? 0.0f : bias[e]);
}

at::Tensor router_logits(const at::Tensor& tokens, const at::Tensor& weight, const at::Tensor& bias) {
  const int64_t count = tokens.size(0), d = tokens.size(1), experts = weight.size(0);
  at::Tensor out = at::zeros({count, experts}, tokens.options().dtype(at::kFloat));
  if (out.numel() == 0) return out;
  const ExpertMixtureKernels& kernels = kernels_in_use();
  const Rows x(tokens), w(weight);
  const at::Tensor added = bias.to(at::kFloat).contiguous();
  const float* own_bias = bias.numel() == 0 ? nullptr : added.const_data_ptr<float>();
  const int64_t panels = (experts + kernels.panel_width - 1) / kernels.panel_width;
  const int64_t blocks = (count + kBlockRows - 1) / kBlockRows;
  // Few tokens: threads share the experts instead.
  const int64_t parts = blocks >= at::get_num_threads() ? 1 : std::min<int64_t>(panels, at::get_num_threads());
  const int64_t work = std::min(count, kBlockRows) * d * experts / parts;
  at::parallel_for(0, blocks * parts, std::max<int64_t>(1, 65536 / std::max<int64_t>(work, 1)), [&](int64_t from, int64_t to) {
    static thread_local Buffers buffers;
    for (int64_t task = from; task < to; ++task) {
      const int64_t block = task / parts, part = task % parts;
      const int64_t first = count * block / blocks, last = count * (block + 1) / blocks;
      multiply(kernels, x, w, own_bias, first, last - first, panels * part / parts, panels * (part + 1) / parts,
               out.data_ptr<float>(), buffers);
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("router_logits", &router_logits); }

}  // namespace
}  // namespace planmill
