// slot_weights for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "routing/slot_weights_kernels.h"

namespace planmill {

const SlotWeightsKernels* slot_weights_avx2() {
  static constexpr SlotWeightsKernels kernels = slot_weights_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
