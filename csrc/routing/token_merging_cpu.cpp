// token_merging on the CPU: each output row is the sum or mean of the rows that its list names, in that order.
#include "common/torch_headers.h"

#include <cstring>

#include "common/element_of.h"
#include "routing/rows_of.h"

namespace planmill {
namespace {

at::Tensor token_merging(const at::Tensor& x, const at::Tensor& offsets, const at::Tensor& members, bool mean) {
  const at::Tensor from = x.contiguous(), ends = offsets.contiguous(), lists = members.contiguous();
  const int64_t batch = from.size(0), n = from.size(1), d = from.size(2), merged = ends.size(1) - 1, listed = lists.size(1);
  at::Tensor out = at::empty({batch, merged, d}, x.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const RowKernels& kernels = row_kernels();
  const Element type = element_of(x);
  const int64_t bytes = d * bytes_of(type);
  const auto* source = static_cast<const char*>(from.const_data_ptr());
  auto* target = static_cast<char*>(out.data_ptr());
  const auto* end = ends.const_data_ptr<int32_t>();
  const auto* list = lists.const_data_ptr<int32_t>();
  at::parallel_for(0, batch * merged, std::max<int64_t>(1, 32768 / d), [&](int64_t first, int64_t last) {
    std::vector<const void*> rows;
    for (int64_t row = first; row < last; ++row) {
      const int64_t entry = row / merged, slot = row % merged;
      const int32_t* own = end + entry * (merged + 1) + slot;
      rows.clear();
      for (int64_t k = own[0]; k < own[1]; ++k) rows.push_back(source + (entry * n + list[entry * listed + k]) * bytes);
      const auto count = static_cast<int64_t>(rows.size());
      if (count == 1) std::memcpy(target + row * bytes, rows[0], static_cast<size_t>(bytes));
      else kernels.sum(type, rows.data(), nullptr, count, d, mean && count > 0 ? 1.0f / static_cast<float>(count) : 1.0f,
                       target + row * bytes);
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(planmill, CPU, m) { m.impl("token_merging", &token_merging); }

}  // namespace
}  // namespace planmill
