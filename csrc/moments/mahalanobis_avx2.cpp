// mahalanobis for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "moments/mahalanobis_kernels.h"

namespace planmill {

const MahalanobisKernels* mahalanobis_avx2() {
  static constexpr MahalanobisKernels kernels = mahalanobis_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
