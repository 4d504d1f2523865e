// expert_mixture for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "routing/expert_mixture_kernels.h"

namespace planmill {

const ExpertMixtureKernels* expert_mixture_avx2() {
  static constexpr ExpertMixtureKernels kernels = expert_mixture_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
