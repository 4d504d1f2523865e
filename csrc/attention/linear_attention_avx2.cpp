// linear_attention for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "attention/linear_attention_kernels.h"

namespace planmill {

const LinearAttentionKernels* linear_attention_avx2() {
  static constexpr LinearAttentionKernels kernels = linear_attention_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
