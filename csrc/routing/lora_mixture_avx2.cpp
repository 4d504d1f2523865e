// lora_mixture for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "routing/lora_mixture_kernels.h"

namespace planmill {

const LoraMixtureKernels* lora_mixture_avx2() {
  static constexpr LoraMixtureKernels kernels = lora_mixture_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
