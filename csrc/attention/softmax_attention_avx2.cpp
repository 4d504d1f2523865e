// softmax_attention for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "attention/softmax_attention_kernels.h"

namespace planmill {

const SoftmaxAttentionKernels* softmax_attention_avx2() {
  static constexpr SoftmaxAttentionKernels kernels = softmax_attention_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
