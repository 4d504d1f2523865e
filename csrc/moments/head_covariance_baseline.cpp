// head_covariance for baseline.
#define PLANMILL_SSE2
#include "moments/head_covariance_kernels.h"

namespace planmill {

const HeadCovarianceKernels* head_covariance_baseline() {
  static constexpr HeadCovarianceKernels kernels = head_covariance_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
