// lora_mixture for baseline.
#define PLANMILL_SSE2
#include "routing/lora_mixture_kernels.h"

namespace planmill {

const LoraMixtureKernels* lora_mixture_baseline() {
  static constexpr LoraMixtureKernels kernels = lora_mixture_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
