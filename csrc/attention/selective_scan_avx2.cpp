// selective_scan for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "attention/selective_scan_kernels.h"

namespace planmill {

const ScanKernels* selective_scan_avx2() {
  static constexpr ScanKernels kernels = scan_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
