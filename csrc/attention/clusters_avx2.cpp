// Attention in clusters for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "attention/clusters_kernels.h"

namespace planmill {

const ClusterKernels* clusters_avx2() {
  static constexpr ClusterKernels kernels = cluster_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
