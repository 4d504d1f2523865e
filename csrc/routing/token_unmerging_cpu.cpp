// token_unmerging on the CPU: rows by index, residual and scale in the same pass.
#include "common/torch_headers.h"

#include <cstring>

#include "common/element_of.h"
#include "routing/rows_of.h"

namespace planmill {
namespace {

at::Tensor token_unmerging(const at::Tensor& y, const at::Tensor& row_of_token, const at::Tensor& residual,
                           const at::Tensor& scale) {
  const at::Tensor from = y.contiguous(), map = row_of_token.contiguous(), base = residual.contiguous(),
                   factor = scale.contiguous();
  const int64_t batch = from.size(0), rows = from.size(1), d = from.size(2), tokens = map.size(1);
  at::Tensor out = at::empty({batch, tokens, d}, from.options());
  if (out.numel() == 0) return out;
  const RowKernels& kernels = row_kernels();
  const Element type = element_of(y);
  const int64_t bytes = d * bytes_of(type);
  const auto* source = static_cast<const char*>(from.const_data_ptr());
  const auto* added = base.numel() == 0 ? nullptr : static_cast<const char*>(base.const_data_ptr());
  const auto* scales = factor.numel() == 0 ? nullptr : factor.const_data_ptr<float>();
  auto* target = static_cast<char*>(out.data_ptr());
  const auto* row = map.const_data_ptr<int32_t>();
  at::parallel_for(0, batch * tokens, std::max<int64_t>(1, 32768 / d), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const char* own = source + (t / tokens * rows + row[t]) * bytes;
      if (added == nullptr && scales == nullptr) std::memcpy(target + t * bytes, own, static_cast<size_t>(bytes));
      else kernels.add(type, added == nullptr ? nullptr : added + t * bytes, scales, own, d, target + t * bytes);
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("token_unmerging", &token_unmerging); }

}  // namespace
}  // namespace planmill
