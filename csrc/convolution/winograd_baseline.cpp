// winograd_convolution for baseline.
#define PLANMILL_SSE2
#include "convolution/winograd_kernels.h"

namespace planmill {

const WinogradKernels* winograd_baseline() {
  static constexpr WinogradKernels kernels = winograd_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
