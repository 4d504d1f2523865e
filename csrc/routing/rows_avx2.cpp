// Sums of rows for avx2.
#pragma GCC target("avx2,fma,f16c")
#define PLANMILL_AVX2
#include "routing/rows_kernels.h"

namespace planmill {

const RowKernels* rows_avx2() {
  static constexpr RowKernels kernels = row_kernels<VecAvx2>();
  return &kernels;
}

}  // namespace planmill
