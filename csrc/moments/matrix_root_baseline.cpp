// matrix_root for baseline.
#define PLANMILL_SSE2
#include "moments/matrix_root_kernels.h"

namespace planmill {

const MatrixRootKernels* matrix_root_baseline() {
  static constexpr MatrixRootKernels kernels = matrix_root_kernels<VecSse2>();
  return &kernels;
}

}  // namespace planmill
