// Attention in clusters for baseline.
#define PLANMILL_SSE2
#include "attention/clusters_kernels.h"

namespace planmill {

const ClusterKernels* clusters_baseline() {
  static constexpr ClusterKernels kernels = cluster_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
