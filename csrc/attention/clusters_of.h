// The rows of one head of a [B, H, N, d] tensor, as the kernels read them.
#pragma once

#include <ATen/core/Tensor.h>

#include "attention/clusters.h"
#include "common/cpu_capability.h"
#include "common/element_of.h"

namespace planmill {

inline const ClusterKernels& cluster_kernels_in_use() {
  return choose_kernels(clusters_baseline(), clusters_avx2(), clusters_avx512());
}

// Any strides but for the last dimension, whose elements must lie side by side.
inline at::Tensor with_whole_rows(const at::Tensor& x) { return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : x.contiguous(); }

inline HeadRows rows_of_head(const at::Tensor& x, int64_t batch, int64_t head) {
  const int64_t first = batch * x.stride(0) + head * x.stride(1);
  const auto* data = static_cast<const char*>(x.const_data_ptr()) + first * static_cast<int64_t>(x.element_size());
  return {element_of(x), data, x.stride(2), x.size(3)};
}

}  // namespace planmill
