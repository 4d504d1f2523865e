// neighborhood_pooling for avx512.
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define PLANMILL_AVX512
#include "neighbors/pooling_kernels.h"

namespace planmill {

const PoolingKernels* pooling_avx512() {
  static constexpr PoolingKernels kernels = pooling_kernels<VecAvx512>();
  return &kernels;
}

}  // namespace planmill
