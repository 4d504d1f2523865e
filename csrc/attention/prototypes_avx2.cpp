// prototype attention for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "attention/prototypes_kernels.h"

namespace planmill {

const PrototypeKernels* prototypes_avx2() {
  static constexpr PrototypeKernels kernels = prototypes_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
