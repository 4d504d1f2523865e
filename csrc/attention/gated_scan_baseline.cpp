// gated_scan for baseline.
#define PLANMILL_SSE2
#include "attention/gated_scan_kernels.h"

namespace planmill {

const GatedScanKernels* gated_scan_baseline() {
  static constexpr GatedScanKernels kernels = gated_scan_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
