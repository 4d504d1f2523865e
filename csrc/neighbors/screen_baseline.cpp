// SSE2, for processors without AVX2.
#define PLANMILL_SSE2
#include "neighbors/screen_floats.h"

namespace planmill {

const ScreenKernels* screen_baseline() {
  static constexpr ScreenKernels kernels = integer_kernels<VecSse2, 4, 2>("baseline", 64);
  return &kernels;
}

const ScreenKernels* screen_floats_baseline() {
  static constexpr ScreenKernels kernels = float_kernels<VecSse2, 4, 2>("floats", 64);
  return &kernels;
}

}  // namespace planmill
