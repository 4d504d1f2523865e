// mahalanobis for baseline.
#define PLANMILL_SSE2
#include "moments/mahalanobis_kernels.h"

namespace planmill {

const MahalanobisKernels* mahalanobis_baseline() {
  static constexpr MahalanobisKernels kernels = mahalanobis_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
