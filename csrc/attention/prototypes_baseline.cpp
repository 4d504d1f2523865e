// prototype attention for baseline.
#define PLANMILL_SSE2
#include "attention/prototypes_kernels.h"

namespace planmill {

const PrototypeKernels* prototypes_baseline() {
  static constexpr PrototypeKernels kernels = prototypes_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
