// covariance for baseline.
#define PLANMILL_SSE2
#include "moments/covariance_kernels.h"

namespace planmill {

const CovarianceKernels* covariance_baseline() {
  static constexpr CovarianceKernels kernels = covariance_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
