// gated_scan for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "attention/gated_scan_kernels.h"

namespace planmill {

const GatedScanKernels* gated_scan_avx2() {
  static constexpr GatedScanKernels kernels = gated_scan_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
