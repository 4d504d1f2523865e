// large_kernel_attention for baseline.
#define PLANMILL_SSE2
#include "attention/large_kernel_attention_kernels.h"

namespace planmill {

const LargeKernelKernels* large_kernel_attention_baseline() {
  static constexpr LargeKernelKernels kernels = large_kernel_attention_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
