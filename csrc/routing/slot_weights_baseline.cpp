// slot_weights for baseline.
#define PLANMILL_SSE2
#include "routing/slot_weights_kernels.h"

namespace planmill {

const SlotWeightsKernels* slot_weights_baseline() {
  static constexpr SlotWeightsKernels kernels = slot_weights_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
