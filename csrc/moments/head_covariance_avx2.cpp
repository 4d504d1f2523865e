// head_covariance for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "moments/head_covariance_kernels.h"

namespace planmill {

const HeadCovarianceKernels* head_covariance_avx2() {
  static constexpr HeadCovarianceKernels kernels = head_covariance_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
