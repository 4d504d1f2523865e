// softmax_free_attention for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "attention/softmax_free_attention_kernels.h"

namespace planmill {

const SoftKernels* softmax_free_attention_avx2() {
  static constexpr SoftKernels kernels = soft_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
