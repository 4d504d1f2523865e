// linear_attention for baseline.
#define PLANMILL_SSE2
#include "attention/linear_attention_kernels.h"

namespace planmill {

const LinearAttentionKernels* linear_attention_baseline() {
  static constexpr LinearAttentionKernels kernels = linear_attention_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
