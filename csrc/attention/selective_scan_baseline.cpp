// selective_scan for baseline.
#define PLANMILL_SSE2
#include "attention/selective_scan_kernels.h"

namespace planmill {

const ScanKernels* selective_scan_baseline() {
  static constexpr ScanKernels kernels = scan_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
