// stem_convolution for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "convolution/stem_kernels.h"

namespace planmill {

const StemKernels* stem_avx2() {
  static constexpr StemKernels kernels = stem_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
