// neighborhood_pooling for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "neighbors/pooling_kernels.h"

namespace planmill {

const PoolingKernels* pooling_avx2() {
  static constexpr PoolingKernels kernels = pooling_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
