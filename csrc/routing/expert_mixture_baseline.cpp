// expert_mixture for baseline.
#define PLANMILL_SSE2
#include "routing/expert_mixture_kernels.h"

namespace planmill {

const ExpertMixtureKernels* expert_mixture_baseline() {
  static constexpr ExpertMixtureKernels kernels = expert_mixture_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
