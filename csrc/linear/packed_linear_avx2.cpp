// packed_linear for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "linear/packed_linear_kernels.h"

namespace planmill {

const PackedLinearKernels* packed_linear_avx2() {
  static constexpr PackedLinearKernels kernels = packed_linear_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
