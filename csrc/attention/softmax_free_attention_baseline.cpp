// softmax_free_attention for baseline.
#define PLANMILL_SSE2
#include "attention/softmax_free_attention_kernels.h"

namespace planmill {

const SoftKernels* softmax_free_attention_baseline() {
  static constexpr SoftKernels kernels = soft_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
