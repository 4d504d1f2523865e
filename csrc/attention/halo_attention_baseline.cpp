// halo_attention for baseline.
#define PLANMILL_SSE2
#include "attention/halo_attention_kernels.h"

namespace planmill {

const HaloKernels* halo_attention_baseline() {
  static constexpr HaloKernels kernels = halo_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
