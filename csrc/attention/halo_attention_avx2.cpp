// halo_attention for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "attention/halo_attention_kernels.h"

namespace planmill {

const HaloKernels* halo_attention_avx2() {
  static constexpr HaloKernels kernels = halo_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
