// stem_convolution for baseline.
#define PLANMILL_SSE2
#include "convolution/stem_kernels.h"

namespace planmill {

const StemKernels* stem_baseline() {
  static constexpr StemKernels kernels = stem_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
