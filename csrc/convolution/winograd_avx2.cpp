// winograd_convolution for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "convolution/winograd_kernels.h"

namespace planmill {

const WinogradKernels* winograd_avx2() {
  static constexpr WinogradKernels kernels = winograd_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
