// correlation attention for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "attention/correlation_kernels.h"

namespace planmill {

const CorrelationKernels* correlation_avx2() {
  static constexpr CorrelationKernels kernels = correlation_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
