// matrix_root for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "moments/matrix_root_kernels.h"

namespace planmill {

const MatrixRootKernels* matrix_root_avx2() {
  static constexpr MatrixRootKernels kernels = matrix_root_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
