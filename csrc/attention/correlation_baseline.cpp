// correlation attention for baseline.
#define PLANMILL_SSE2
#include "attention/correlation_kernels.h"

namespace planmill {

const CorrelationKernels* correlation_baseline() {
  static constexpr CorrelationKernels kernels = correlation_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
