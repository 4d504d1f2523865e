// covariance for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "moments/covariance_kernels.h"

namespace planmill {

const CovarianceKernels* covariance_avx2() {
  static constexpr CovarianceKernels kernels = covariance_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
