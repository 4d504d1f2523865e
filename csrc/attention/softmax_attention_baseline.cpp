// softmax_attention for baseline.
#define PLANMILL_SSE2
#include "attention/softmax_attention_kernels.h"

namespace planmill {

const SoftmaxAttentionKernels* softmax_attention_baseline() {
  static constexpr SoftmaxAttentionKernels kernels = softmax_attention_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
