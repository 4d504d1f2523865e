// packed_linear for baseline.
#define PLANMILL_SSE2
#include "linear/packed_linear_kernels.h"

namespace planmill {

const PackedLinearKernels* packed_linear_baseline() {
  static constexpr PackedLinearKernels kernels = packed_linear_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
