// large_kernel_attention for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "attention/large_kernel_attention_kernels.h"

namespace planmill {

const LargeKernelKernels* large_kernel_attention_avx2() {
  static constexpr LargeKernelKernels kernels = large_kernel_attention_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
