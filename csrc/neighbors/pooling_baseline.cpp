// neighborhood_pooling for baseline.
#define PLANMILL_SSE2
#include "neighbors/pooling_kernels.h"

namespace planmill {

const PoolingKernels* pooling_baseline() {
  static constexpr PoolingKernels kernels = pooling_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
