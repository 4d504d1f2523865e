// slot_weights on the CPU: columns in blocks of two vectors, which stay in the first-level cache over their passes, and rows.
#include "common/torch_headers.h"

#include "common/cpu_capability.h"
#include "routing/slot_weights.h"

namespace planmill {
namespace {

constexpr int64_t kRowBlock = 16;
constexpr int64_t kGrain = 8192;  // logits that are worth a thread

const SlotWeightsKernels& slot_kernels() {
  return choose_kernels(slot_weights_baseline(), slot_weights_avx2(), slot_weights_avx512());
}

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

std::tuple<at::Tensor, at::Tensor> slot_weights(const at::Tensor& logits, const at::Tensor& scale, const at::Tensor& mask,
                                                std::string_view weighting, bool scale_dispatch) {
  const at::Tensor l = logits.to(at::kFloat).contiguous(), r = scale.contiguous(), m = mask.contiguous();
  const int64_t batch = l.size(0), tokens = l.size(1), slots = l.size(2);
  at::Tensor dispatch = at::empty(l.sizes(), at::kFloat), combine = at::empty(l.sizes(), at::kFloat);
  if (l.numel() == 0) return {dispatch, combine};
  const SlotWeightsKernels& kernels = slot_kernels();
  const int64_t column_blocks = blocks(slots, kernels.column_block), row_blocks = blocks(tokens, kRowBlock);
  const int64_t padded = column_blocks * kernels.column_block;
  const bool linear = weighting == "linear";
  std::vector<float> moments(linear ? static_cast<size_t>(3 * batch * padded) : 0);
  const float* source = l.const_data_ptr<float>();
  const float* scales = r.numel() != 0 ? r.const_data_ptr<float>() : nullptr;
  const auto* masks = m.numel() != 0 ? reinterpret_cast<const uint8_t*>(m.const_data_ptr<bool>()) : nullptr;
  float* d = dispatch.data_ptr<float>();
  float* c = combine.data_ptr<float>();
  const auto image = [&](int64_t b) {
    float* own = linear ? moments.data() + 3 * b * padded : nullptr;
    const int64_t at = b * tokens * slots, token = b * tokens;
    return SlotImage{source + at, scales != nullptr ? scales + token : nullptr, masks != nullptr ? masks + token : nullptr,
                     tokens, slots, scale_dispatch, d + at, c + at, own, linear ? own + padded : nullptr,
                     linear ? own + 2 * padded : nullptr};
  };
  // Blocks of columns, then blocks of rows, counted over all images. Rows wait for the columns only where they need moments.
  const int64_t all_columns = batch * column_blocks, all = all_columns + batch * row_blocks;
  const auto run = [&](int64_t begin, int64_t end) {
    const int64_t work = std::max(tokens * kernels.column_block, kRowBlock * slots);
    at::parallel_for(begin, end, std::max<int64_t>(1, kGrain / work), [&](int64_t first, int64_t last) {
      std::vector<float> scratch(static_cast<size_t>(std::max(2 * tokens * kernels.column_block, padded)));
      for (int64_t i = first; i < last; ++i) {
        if (i < all_columns) {
          kernels.columns(image(i / column_blocks), i % column_blocks * kernels.column_block, scratch.data());
        } else {
          const int64_t row = (i - all_columns) % row_blocks * kRowBlock;
          kernels.rows(image((i - all_columns) / row_blocks), row, std::min(row + kRowBlock, tokens), scratch.data());
        }
      }
    });
  };
  if (linear) run(0, all_columns), run(all_columns, all);
  else run(0, all);
  return {dispatch, combine};
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("slot_weights", &slot_weights); }

}  // namespace
}  // namespace planmill
